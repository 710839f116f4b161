"""A block of images in a shard: a group of tar members, as webdataset names them, and their arrays."""

import tarfile
from collections.abc import Iterator, Mapping
from io import BytesIO

import numpy as np

from ali_dist.data import lossless

HEADER = 512  # bytes; a member's content is padded to a multiple of them


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
    """A .npy file's array without copying it; nothing is unpickled."""
    if name not in found:
        raise ValueError(f"it has no {name}")
    data = found[name]
    head = BytesIO(data[: 10 + 65535])
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError(f"{name} is of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
    if dtype.hasobject or fortran:
        raise ValueError(f"{name} holds {dtype}")
    count = int(np.prod(shape, dtype=np.int64))
    if len(data) != head.tell() + count * dtype.itemsize:
        raise ValueError(f"{name} has {len(data):,} bytes")
    return np.frombuffer(data, dtype, count, head.tell()).reshape(shape)


def _npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()
