"""CIFAR-10 from its official python or binary archive, packed or unpacked."""

import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ali_dist.data import unpickle
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
    return OpenSource(classes=meta, splits=splits, serial=True)


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
        tree = unpickle.load(data)
        if name == "batches.meta":
            return tuple(unpickle.text(label) for label in tree["label_names"])
        x, y = tree["data"], np.array(tree["labels"], np.int64)
        if x.dtype != np.uint8:
            raise ValueError(f"an array of {x.dtype} instead of uint8")
        return Arrays(x.reshape(len(y), *SHAPE), y)
    # A damaged pickle can raise nearly anything
    except Exception as error:
        raise UserError(f"{source}: {name} is damaged or not CIFAR-10's: fetch it again ({error})") from error


def _parse_binary(name: str, data: bytes) -> Any:
    """Records of one label byte and 3,072 pixels; or one class name a line."""
    if name == "batches.meta.txt":
        return tuple(data.decode("ascii").split())
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return Arrays(records[:, 1:].reshape(-1, *SHAPE), records[:, 0].astype(np.int64))
