"""What a store of shards is: a folder whose files are read in parts, each checked before it is used."""

import hashlib
import threading
from abc import ABC, abstractmethod
from typing import NamedTuple

from ali_dist.recipe import UserError


class Part(NamedTuple):
    """Some bytes of a file."""

    data: bytes
    total: int
    """Bytes of the whole file."""
    mark: tuple | None
    """Equal for two parts when the file has not changed between them; None where nothing tells."""


class Damaged(Exception):
    """A file is not what the index says; the text completes "shard NAME ..."."""


class Away(UserError):
    """A store does not answer, or not even its index is there; it may come back."""


class Store(ABC):
    """A folder of files, wherever it is; `str()` gives its address without passwords."""

    remote = True

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole small file; FileNotFoundError when it is not there, Away when the store cannot be reached."""

    @abstractmethod
    def part(self, name: str, offset: int, size: int) -> Part:
        """`size` bytes of a file, fewer where it ends; raises as `read` does."""

    def block(self, name: str, total: int, offset: int, size: int, sha256: str) -> bytes:
        """The same bytes, if the file has `total` bytes and they this SHA-256; Damaged otherwise, Away as in `read`."""
        try:
            part = self.part(name, offset, size)
        except (FileNotFoundError, PermissionError):
            part = self._part_again(name, offset, size)
        if part.total != total:
            raise Damaged(f"has {part.total:,} bytes instead of {total:,}")
        mark = part.mark and (str(self), name, offset, sha256, part.mark)
        if mark not in _checked or mark is None:
            if hashlib.sha256(part.data).hexdigest() != sha256:
                raise Damaged("has changed since it was prepared (a SHA-256 differs)")
            _checked.add(mark)
        return part.data

    def until(self, stop: threading.Event) -> "Store":
        """The same store; one that waits for what is away gives up when `stop` is set."""
        return self

    def _part_again(self, name: str, offset: int, size: int) -> Part:
        """Damaged when the part cannot be had although the index can, before and after."""
        self._read_index()
        try:
            return self.part(name, offset, size)
        except (FileNotFoundError, PermissionError) as error:
            self._read_index()
            missing = isinstance(error, FileNotFoundError)
            raise Damaged("is missing" if missing else f"cannot be opened ({error.strerror or error})") from error

    def _read_index(self) -> None:
        try:
            self.read("index.json")
        except (FileNotFoundError, PermissionError) as error:
            raise Away(f"cannot read {self}/index.json any more ({error}): bring the data set back") from error


# Blocks of local files that this process has found right; a replaced file has another mark
_checked: set[tuple | None] = set()
