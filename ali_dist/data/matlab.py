"""MATLAB's version 5 files as streams: scipy.io.loadmat would hold a whole array, and SVHN's has 1.6 GB.

Format: https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf. Only real arrays of numbers are understood.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

HEADER = 128  # bytes, ends in the version and "IM" for little-endian
MATRIX, COMPRESSED = 14, 15
DTYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
NUMERIC_CLASSES = range(6, 16)  # double to uint64
CHUNK = 1 << 20
SMALL = 1 << 16  # bytes: flags, dimensions and names have far fewer


@dataclass(frozen=True, slots=True)
class Variable:
    """An array whose numbers come, in Fortran's order, out of `read(bytes)`, which raises ValueError at a damage."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], bytes]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """All of it, in memory."""
        return np.frombuffer(self.read(self.bytes), self.dtype).reshape(self.shape, order="F")


def variables(path: Path) -> Iterator[Variable]:
    """The file's arrays, each to be read before the next; ValueError when it is damaged or something else."""
    with open(path, "rb") as file:
        header = file.read(HEADER)
        if not header.startswith(b"MATLAB 5.0 MAT-file") or header[126:] != b"IM":
            raise ValueError("no little-endian MATLAB 5.0 file")
        while tag := file.read(8):
            kind, size = struct.unpack("<II", _whole(tag, 8))
            end = file.tell() + size
            inflated = _Inflated(file, size) if kind == COMPRESSED else None
            read = inflated.read if inflated else _reader(file)
            if inflated:
                kind, size = struct.unpack("<II", read(8))
            if kind != MATRIX:
                raise ValueError(f"an element of type {kind}, which is no array")
            yield _variable(read)
            if inflated:
                inflated.finish()
            file.seek(end)


def _variable(read: Callable[[int], bytes]) -> Variable:
    """Reads up to the array's numbers."""
    _, flags = _small(read)
    _, dimensions = _small(read)
    _, name = _small(read)
    if not flags or flags[0] not in NUMERIC_CLASSES or len(flags) < 2 or flags[1] & 0x08:
        raise ValueError(f"variable {name!r} is no array of real numbers")
    kind, size, rest = _tag(read)
    shape = tuple(np.frombuffer(dimensions, "<i4").tolist())
    if kind not in DTYPES or min(shape, default=-1) < 0:
        raise ValueError(f"variable {name!r} holds numbers of type {kind}, shape {shape}")
    source = read if rest is None else lambda count: _whole(rest[:count], count)
    variable = Variable(name.decode("latin1"), shape, np.dtype(DTYPES[kind]), source)
    if size != variable.bytes:
        raise ValueError(f"variable {name!r} of shape {shape} has {size} bytes")
    return variable


def _tag(read: Callable[[int], bytes]) -> tuple[int, int, bytes | None]:
    """Type, size, and the content itself when it is so small that it lies in the tag."""
    kind, size = struct.unpack("<II", read(8))
    if kind >> 16:
        kind, size, content = kind & 0xFFFF, kind >> 16, struct.pack("<I", size)
        return kind, size, content[:size]
    return kind, size, None


def _small(read: Callable[[int], bytes]) -> tuple[int, bytes]:
    kind, size, content = _tag(read)
    if content is None:
        if size > SMALL:
            raise ValueError(f"a description of {size} bytes")
        content = read(size)
        read(-size % 8)  # padding
    return kind, content


def _reader(file: BinaryIO) -> Callable[[int], bytes]:
    return lambda count: _whole(file.read(count), count)


def _whole(data: bytes, count: int) -> bytes:
    if len(data) != count:
        raise ValueError("the file is cut short")
    return data


class _Inflated:
    """Reads `size` compressed bytes of a file, unpacking no more of them than are asked for."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.inflater, self.packed = file, size, zlib.decompressobj(), b""

    def read(self, count: int) -> bytes:
        parts = []
        while count:
            if not self.packed:
                self.packed = self.file.read(min(CHUNK, self.left))
                self.left -= len(self.packed)
            try:
                part = self.inflater.decompress(self.packed, count)
            except zlib.error as error:
                raise ValueError(str(error)) from error
            if not part and not self.packed:
                raise ValueError("the file is cut short")
            self.packed = self.inflater.unconsumed_tail
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def finish(self) -> None:
        """Holds the checksum at the end against what was read; only padding may be left."""
        self.packed += self.file.read(self.left)
        try:
            self.inflater.decompress(self.packed, 8)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if not self.inflater.eof:
            raise ValueError("the file is cut short, or its array is longer than it says")
