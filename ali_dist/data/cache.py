"""A folder on this host that keeps blocks of remote shards, within a number of bytes, for all workers of the host."""

import contextlib
import copy
import fcntl
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from ali_dist.data.parts import Part, Store
from ali_dist.recipe import UserError


class Cache(Store):
    """A remote store whose blocks are kept below `folder`, at most `bound` bytes of all data sets together.

    Blocks go by their SHA-256, so workers and jobs share them and no block is ever the wrong one. When it is full, the
    blocks of other data sets go, those first that were used longest ago, but no block of this one: every epoch
    reads all blocks once, and the least recently used one would always be the next to be needed.
    """

    def __init__(self, store: Store, folder: Path, bound: int, label: str) -> None:
        """`label` tells data sets apart: blocks of the same label do not displace each other."""
        self.store, self.folder, self.bound = store, folder / label, bound
        self.root, self._checked = folder, set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't write to --cache {folder} ({error.strerror}): give a writable folder") from error

    def __str__(self) -> str:
        return str(self.store)

    def read(self, name: str) -> bytes:
        return self.store.read(name)

    def part(self, name: str, offset: int, size: int) -> Part:
        return self.store.part(name, offset, size)

    def block(self, name: str, total: int, offset: int, size: int, sha256: str) -> bytes:
        data = self._kept(sha256)
        if data is None:
            data = self.store.block(name, total, offset, size, sha256)
            with contextlib.suppress(OSError):  # a full or read-only disk costs speed, not the run
                self._keep(sha256, data)
        return data

    def until(self, stop: threading.Event) -> "Cache":
        same = copy.copy(self)
        same.store = self.store.until(stop)
        return same

    def _kept(self, sha256: str) -> bytes | None:
        """The block, if it is there and right; a damaged one is removed."""
        path = self.folder / sha256
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                data = file.read()
            os.utime(path)
        except OSError:
            return None
        mark = (sha256, stat.st_ino)
        if mark not in self._checked:
            if hashlib.sha256(data).hexdigest() != sha256:
                path.unlink(missing_ok=True)
                return None
            self._checked.add(mark)
        return data

    def _keep(self, sha256: str, data: bytes) -> None:
        """Writes the block if there is room for it, or can be made."""
        with self._locked():
            if (self.folder / sha256).exists() or not self._make_room(len(data)):
                return
            partial = self.folder / f".{uuid.uuid4().hex}"
            try:
                partial.write_bytes(data)
                os.replace(partial, self.folder / sha256)
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        used, others = 0, []
        for entry in self._entries():
            stat = entry.stat()
            if entry.name.startswith("."):  # left half written by a killed worker: nobody writes but who has the lock
                os.unlink(entry.path)
                continue
            used += stat.st_size
            if Path(entry.path).parent != self.folder:
                others.append((stat.st_mtime_ns, stat.st_size, entry.path))
        others.sort(reverse=True)
        while used + size > self.bound and others:
            _, freed, path = others.pop()
            os.unlink(path)
            used -= freed
        return used + size <= self.bound

    def _entries(self) -> Iterator[os.DirEntry]:
        for folder in os.scandir(self.root):
            if folder.is_dir():
                yield from os.scandir(folder.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.root / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
