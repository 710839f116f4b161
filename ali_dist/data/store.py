"""Where shards lie: a folder, or an address of s3, gs, http or https. Parts of files are read, never whole shards.

Runs may lie in s3 and gs too: see `ali_dist.mirror`.
"""

import contextlib
import functools
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from ali_dist.data.parts import Away, Damaged, Part, Store
from ali_dist.recipe import UserError

if TYPE_CHECKING:
    import pyarrow
    import requests

ATTEMPTS = 5  # at a part of a remote file
FIRST_PAUSE = 0.5  # seconds, doubled after each attempt
SECONDS = 30  # without an answer, until a connection counts as dead
SCHEMES = ("http", "https", "s3", "gs")
BUCKETS = ("s3", "gs")  # those of them that can be written to
CHUNK = 8 * 2**20  # bytes of a file held in memory
CHUNKS_AT_ONCE = 4  # sent beside each other

T = TypeVar("T")


class Folder(Store):
    """A local folder."""

    remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        with self._reading(name):
            return (self.path / name).read_bytes()

    def part(self, name: str, offset: int, size: int) -> Part:
        with self._reading(name):
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                stat = os.fstat(descriptor)
                data = os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        return Part(data, stat.st_size, (stat.st_ino, stat.st_size, stat.st_mtime_ns))

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:  # as EIO, or ESTALE of a network's file system
            raise Away(f"cannot read {self.path / name} ({error.strerror}): check the disk, or its server") from error


class Web(Store):
    """A folder behind http or https, on a server that gives parts of files (Range)."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def __str__(self) -> str:
        return without_password(self.address)

    def __getstate__(self) -> dict[str, str]:
        return {"address": self.address}

    @functools.cached_property
    def session(self) -> "requests.Session":
        import requests

        return requests.Session()

    def read(self, name: str) -> bytes:
        return self._get(name, {}, lambda response: response.content)

    def part(self, name: str, offset: int, size: int) -> Part:
        def received(response: "requests.Response") -> Part:
            place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or not place or int(place[1]) != offset:
                raise UserError(f"{self} does not give parts of files (Range): use another server, or copy the data")
            if len(response.content) != min(size, int(place[2]) - offset):
                raise OSError("the answer was cut short")
            return Part(response.content, int(place[2]), None)

        return self._get(name, {"Range": f"bytes={offset}-{offset + size - 1}"}, received)

    def _get(self, name: str, headers: dict[str, str], received: Callable[["requests.Response"], T]) -> T:
        def attempt() -> T:
            headers_sent = {"Accept-Encoding": "identity", **headers}
            with self.session.get(
                f"{self.address}/{quote(name)}", headers=headers_sent, timeout=SECONDS, stream=True
            ) as response:
                if response.status_code in (404, 410):
                    raise FileNotFoundError(f"{response.status_code} {response.reason}")
                if response.status_code in (401, 403):
                    raise PermissionError(f"{response.status_code} {response.reason}")
                if response.status_code == 416:
                    raise Damaged("is shorter than it should be")
                if not response.ok:
                    raise OSError(f"{response.status_code} {response.reason}")
                return received(response)

        return persistently(f"read {self}/{name}", attempt)


class Bucket(Store):
    """A prefix of an s3 or gs bucket, by pyarrow: credentials and region as its SDKs find them.

    Besides a store's own methods, which try again by themselves, those of a run's mirror: they raise OSError when the
    bucket does not answer, and FileNotFoundError when it has no such file.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def __str__(self) -> str:
        return without_password(self.address)

    def __getstate__(self) -> dict[str, str]:
        return {"address": self.address}

    @functools.cached_property
    def place(self) -> tuple["pyarrow.fs.FileSystem", str]:
        import pyarrow.fs

        address = self.address
        if address.startswith("gs:") and "retry_limit_seconds=" not in address:  # else a quarter of an hour
            address += f"{'&' if '?' in address else '?'}retry_limit_seconds={SECONDS}"
        try:
            filesystem, root = pyarrow.fs.FileSystem.from_uri(address)
        except (ValueError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"cannot open {self} ({_line(error)}): check the address") from error
        return filesystem, root.rstrip("/")

    def read(self, name: str) -> bytes:
        return persistently(f"read {self}/{name}", lambda: self.get(name))

    def part(self, name: str, offset: int, size: int) -> Part:
        def attempt() -> Part:
            with self._open(name) as file:
                total = file.size()
                data = file.read_at(size, offset) if offset < total else b""
                if len(data) != min(size, max(total - offset, 0)):
                    raise OSError("the answer was cut short")
                return Part(data, total, None)

        return persistently(f"read {self}/{name}", attempt)

    def get(self, name: str) -> bytes:
        """A whole small file."""
        with self._open(name) as file:
            return file.read()

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to the local `path`."""
        with self._open(name) as file, open(path, "wb") as copy:
            while chunk := file.read(CHUNK):
                copy.write(chunk)

    def put(self, name: str, content: bytes | Path, arrived: Callable[[], object] = lambda: None) -> None:
        """Writes a file, from bytes whole or not at all, or from a local file, as far as that can be read.

        `arrived` is called whenever some more of a local file is there.
        """
        filesystem, root = self.place
        with filesystem.open_output_stream(f"{root}/{name}", compression=None) as copy:
            if isinstance(content, bytes):
                copy.write(content)
                return
            with open(content, "rb") as file:
                for count in itertools.count(1):
                    if not (chunk := file.read(CHUNK)):
                        return
                    copy.write(chunk)
                    if count % CHUNKS_AT_ONCE == 0:
                        copy.flush()  # waits for what pyarrow sends in the background
                        arrived()

    def has(self, *names: str) -> set[str]:
        """Those of the names that are files there."""
        filesystem, root = self.place
        found = filesystem.get_file_info([f"{root}/{name}" for name in names])
        return {name for name, info in zip(names, found, strict=True) if info.is_file}

    def files(self, below: str = "", deep: bool = True) -> dict[str, tuple[int, int]]:
        """Name -> bytes and Unix time in ns of each file below the folder, of those of its folders too where `deep`."""
        import pyarrow.fs

        filesystem, root = self.place
        folder = f"{root}/{below}".rstrip("/")
        selector = pyarrow.fs.FileSelector(folder, recursive=deep, allow_not_found=True)
        infos = filesystem.get_file_info(selector)
        return {info.path.removeprefix(f"{root}/"): (info.size, info.mtime_ns or 0) for info in infos if info.is_file}

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""
        filesystem, root = self.place
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(f"{root}/{name}")

    def delete_folder(self, name: str) -> None:
        """Deletes all below a folder."""
        filesystem, root = self.place
        with contextlib.suppress(FileNotFoundError):  # gs: the files are gone, a marker of the folder never was
            filesystem.delete_dir(f"{root}/{name}")

    def _open(self, name: str) -> "pyarrow.NativeFile":
        filesystem, root = self.place
        return filesystem.open_input_file(f"{root}/{name}")


def open_bucket(address: str, name: str) -> Bucket:
    """The prefix `name` below an address of s3 or gs."""
    parts = urlsplit(address)
    return Bucket(urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}".rstrip("/"))))


def open_store(data: Path | str, name: str) -> Store:
    """The folder of data set `name` below `data`, a path or an address; UserError for an address of another kind."""
    scheme, colon, _ = str(data).partition(":")
    if scheme in SCHEMES:
        below = open_bucket(str(data), name)
        return below if scheme in BUCKETS else Web(below.address)
    if colon and re.fullmatch(r"[a-z][a-z0-9+.-]+", scheme) and not Path(data).exists():
        raise UserError(f"--data {data}: give a folder, or an address that begins with {', '.join(SCHEMES)}://")
    return Folder(Path(data) / name)


def is_address(data: Path | str) -> bool:
    """Whether `data` names a remote store and not a path."""
    return str(data).partition("://")[0] in SCHEMES


def persistently(what: str, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, tried again after errors that may pass; Away "cannot {what}" when none succeeds."""
    for i in range(ATTEMPTS):
        try:
            return attempt()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            last = error
            if i + 1 < ATTEMPTS:
                time.sleep(FIRST_PAUSE * 2**i)
    raise Away(
        f"cannot {what}, {ATTEMPTS} times in a row ({_line(last)}): check the address, your credentials and the network"
    ) from last


def without_password(address: str) -> str:
    """The address without what may be a secret: a user's name and password, and the query of a signed one."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
