"""A block of images in a shard: a group of tar members, as webdataset names them, and their arrays."""

import math
import re
import tarfile
from collections.abc import Iterator, Mapping
from io import BytesIO

import numpy as np

from ali_dist.data import lossless

HEADER = 512  # bytes; a member's content is padded to a multiple of them
MAGIC = b"\x93NUMPY\x01\x00"
NPY_HEADER = re.compile(rb"\{'descr': '([<|][iu][1248])', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n")


def encode(x: np.ndarray, y: np.ndarray, compress: bool) -> Iterator[tuple[str, bytes]]:
    """Name without the block's number, and content, of each member.

    x uint8 [n, C, H, W]; y int64 [n] of classes, or uint8 [n, A] of attributes.
    """
    yield ("y.npy" if y.ndim == 1 else "attributes.npy"), _npy(y)
    yield ("x.zst", lossless.encode(x)) if compress else ("x.npy", _npy(x))


def members(data: bytes) -> dict[str, memoryview]:
    """The members by name without number, read where they lie; ValueError or tarfile.TarError when there is a flaw."""
    found, at, view = {}, 0, memoryview(data)
    while at < len(data):
        info = tarfile.TarInfo.frombuf(data[at : at + HEADER], "utf-8", "strict")
        start = at + HEADER
        if start + info.size > len(data):
            raise ValueError(f"{info.name} is cut short")
        found[info.name.partition(".")[2]] = view[start : start + info.size]
        at = start + -(-info.size // HEADER) * HEADER
    return found


def images(found: Mapping[str, memoryview], shape: tuple[int, ...]) -> np.ndarray:
    """x uint8 of this shape [n, C, H, W]; ValueError when there is none."""
    if "x.zst" in found:
        return lossless.decode(found["x.zst"], shape)
    x = _array(found, "x.npy")
    if x.shape != shape or x.dtype != np.uint8:
        raise ValueError(f"it holds images {x.dtype}{list(x.shape)}")
    return x


def labels(found: Mapping[str, memoryview], n: int, attributes: int) -> np.ndarray:
    """y int64 [n], or uint8 [n, A] for A > 0 attributes; ValueError when there is none."""
    y = _array(found, "attributes.npy" if attributes else "y.npy")
    if (y.shape, y.dtype) != (((n, attributes), np.uint8) if attributes else ((n,), np.int64)):
        raise ValueError(f"it holds labels {y.dtype}{list(y.shape)}")
    return y


def _array(found: Mapping[str, memoryview], name: str) -> np.ndarray:
    """A .npy file's array of numbers, read where it lies.

    numpy's own reader parses the header with `ast`, of which CPython 3.11 cannot run two at a time in threads.
    """
    if name not in found:
        raise ValueError(f"it has no {name}")
    data = found[name]
    length = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 2], "little")
    start = len(MAGIC) + 2 + length
    header = NPY_HEADER.fullmatch(bytes(data[len(MAGIC) + 2 : start]))
    if bytes(data[: len(MAGIC)]) != MAGIC or not header:
        raise ValueError(f"{name} is no array of integers")
    shape = tuple(int(n) for n in header[2].split(b",") if n.strip())
    array = np.frombuffer(data[start:], np.dtype(header[1].decode()))
    if array.size != math.prod(shape):
        raise ValueError(f"{name} holds {array.size:,} numbers instead of {math.prod(shape):,}")
    return array.reshape(shape)


def _npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()
