"""CIFAR-10 from its official python or binary archive, packed or unpacked."""

import pickle
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ali_dist.data.types import OpenSource
from ali_dist.recipe import UserError

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


@dataclass(frozen=True, slots=True)
class Arrays:
    """A split in memory: x uint8 [n, 3, 32, 32], y int64 [n]."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.x[i], int(self.y[i])


def open_cifar10(source: Path | None, counts: Mapping[str, int]) -> OpenSource:
    """Of the five training batches the last counts["valid"] images are for validation, the others for training."""
    files = dict(_files(source))
    binary = "batches.meta.txt" in files
    suffix = ".bin" if binary else ""
    wanted = ["batches.meta.txt" if binary else "batches.meta", *(b + suffix for b in (*BATCHES, "test_batch"))]
    for name in wanted:
        if name not in files:
            raise UserError(f"{source} has no file {name}: is it CIFAR-10's archive, and whole? fetch it again")
    meta, *batches = (_parse(source, name, files.pop(name), binary) for name in wanted)
    for name, batch in zip(wanted[1:], batches, strict=True):
        if len(batch) and not 0 <= batch.y.min() <= batch.y.max() < len(meta):
            raise UserError(f"{source}: {name} has labels outside 0..{len(meta) - 1}: fetch the archive again")
    x, y = (np.concatenate([getattr(batch, part) for batch in batches[:-1]]) for part in "xy")
    first = len(y) - counts["valid"]
    splits = {"train": Arrays(x[:first], y[:first]), "valid": Arrays(x[first:], y[first:]), "test": batches[-1]}
    return OpenSource(classes=meta, splits=splits)


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name without folder, and content, of every file of the archive or folder that may matter."""
    try:
        if source.is_dir():
            for path in sorted((*source.glob("*batch*"), *source.glob("*/*batch*"))):
                if path.is_file():
                    yield path.name, path.read_bytes()
            return
        with tarfile.open(source, "r:*") as archive:
            for member in archive:
                if member.isreg() and "batch" in member.name:
                    yield Path(member.name).name, archive.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{source} cannot be read, it is damaged or no tar.gz: fetch it again ({error})") from error


def _parse(source: Path, name: str, data: bytes, binary: bool) -> Any:
    """A batch as Arrays, the meta file as a tuple of class names."""
    try:
        if binary:
            return _parse_binary(name, data)
        tree = {_text(key): value for key, value in SafeUnpickler(BytesIO(data), encoding="latin1").load().items()}
        if name == "batches.meta":
            return tuple(_text(label) for label in tree["label_names"])
        y = np.array(tree["labels"], np.int64)
        return Arrays(tree["data"].value.reshape(len(y), *SHAPE), y)
    # A damaged pickle can raise nearly anything
    except Exception as error:
        raise UserError(f"{source}: {name} is damaged or not CIFAR-10's: fetch it again ({error})") from error


def _parse_binary(name: str, data: bytes) -> Any:
    """Records of one label byte and 3,072 pixels; or one class name a line."""
    if name == "batches.meta.txt":
        return tuple(data.decode("ascii").split())
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return Arrays(records[:, 1:].reshape(-1, *SHAPE), records[:, 0].astype(np.int64))


def _text(word: str | bytes) -> str:
    return word.decode("latin1") if isinstance(word, bytes) else word


class SafeUnpickler(pickle.Unpickler):
    """Builds lists, dicts, strings, bytes, numbers, and uint8 arrays by a stand-in; anything else is an error.

    No function or class named in the file is ever looked up, so a hostile file has nothing to call.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image archive needs") from None


class _Dtype:
    """numpy.dtype: only uint8 is understood."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if _text(code).lstrip("|") != "u1":
            raise pickle.UnpicklingError(f"an array of {code!r} instead of uint8")

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """numpy.ndarray: `value` is the array, uint8, once the state is known."""

    def __init__(self, *_: object) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, fortran_order, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran_order else "C")


def _encode(text: str, encoding: str) -> bytes:
    """_codecs.encode, by which Python 3 writes bytes in protocol 2."""
    if _text(encoding) not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
