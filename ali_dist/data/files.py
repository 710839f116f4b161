"""Archives as sets of named files that are read one at a time, in any order and from any process."""

import os
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ali_dist.data.types import BadImage
from ali_dist.recipe import UserError


class Names:
    """Strings in one buffer: a million file names take their letters and 8 bytes each."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.letters, self.ends = bytearray(), array("q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        self.letters += os.fsencode(name)
        self.ends.append(len(self.letters))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(bytes(self.letters[self.ends[i - 1] if i else 0 : self.ends[i]]))


class Files:
    """The files of a zip archive or a folder, `names` relative to it with slashes, sorted.

    UserError when the source is neither.
    """

    def __init__(self, source: Path) -> None:
        self.source, self._zip = source, None
        if source.is_dir():
            self.names = sorted(_walk(source))
        else:
            self.names = sorted(info.filename for info in self._open().infolist() if not info.is_dir())

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "names": [], "_zip": None}  # readers keep the names they need

    def read(self, name: str) -> bytes:
        """A file's content; BadImage when it is not there or damaged."""
        try:
            if self._zip is None and self.source.is_dir():
                return (self.source / name).read_bytes()
            return self._open().read(name)
        except (KeyError, FileNotFoundError):
            raise BadImage(self.source, name, "is not there") from None
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
            raise BadImage(self.source, name, f"is damaged ({error})") from error

    def lines(self, name: str) -> list[str]:
        """A text file's lines."""
        return self.read(name).decode("utf-8", "replace").splitlines()

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self.source)
            except (OSError, zipfile.BadZipFile) as error:
                message = f"{self.source} is no zip archive or is cut short: fetch it again ({error})"
                raise UserError(message) from error
        return self._zip


class FileMembers:
    """Some files of a zip archive or folder, by index."""

    def __init__(self, files: Files, names: Iterable[str]) -> None:
        self.files, self.names, self.source = files, Names(names), files.source

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> bytes:
        return self.files.read(self.names[i])


class TarMembers:
    """Files inside an uncompressed tar archive, by index: their bytes are read where they lie, without unpacking."""

    def __init__(self, source: Path, found: Iterable[tuple[str, int, int]]) -> None:
        """`found`: name, offset and size in bytes of each file."""
        self.source, self.names, self.places, self._file = source, Names(), array("q"), None
        for name, offset, size in found:
            self.names.append(name)
            self.places.extend((offset, size))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> bytes:
        if self._file is None:
            try:
                self._file = open(self.source, "rb", buffering=0)
            except OSError as error:
                raise UserError(f"cannot read {self.source} ({error.strerror}): every worker must see it") from error
        offset, size = self.places[2 * i : 2 * i + 2]
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise BadImage(self.source, self.name(i), "is cut short")
        return data


def scan_tar(path: Path, start: int = 0) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file of the uncompressed tar archive that begins at `start` in the file.

    UserError when it is no such archive or is cut short; file contents are skipped, not read.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb", buffering=4096) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # reading ahead would read the contents too
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"it ends inside {member.name}")
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                    archive.members = []  # tarfile would keep them all
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path} is no tar archive or is cut short: fetch it again ({error})") from error


def _walk(folder: Path) -> Iterator[str]:
    for at, _, names in os.walk(folder, followlinks=True):
        for name in names:
            yield Path(at, name).relative_to(folder).as_posix()
