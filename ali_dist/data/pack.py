"""Samples to shards and index.json, in a folder that appears only once it is complete."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ali_dist.data.index import BLOCK, VERSION
from ali_dist.data.types import DatasetSpec, OpenSource, Samples
from ali_dist.recipe import UserError

SHARD = 8 * BLOCK  # images
PERMUTATION_SEED = 0
MEAN_IMAGES = 500  # the authors take the decoder's output bias from the mean of this many images


def pack(
    spec: DatasetSpec,
    opened: OpenSource,
    source: Path | None,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes shards and, last, index.json into `folder`, holding one block in memory; the bytes depend on the source
    alone. `progress` is called with the images done so far and in all.

    UserError when a split has not the number of images that `spec` says, or when a sample is damaged.
    """
    check_counts(spec, opened, source)
    done, total = 0, sum(spec.counts.values())
    mean_images, mean_sum = 0, np.zeros(spec.shape, np.int64)
    splits = {}
    for split, count in spec.counts.items():
        order = np.arange(count)
        if split == "train":  # archives come sorted by class, and a block's images are always read together
            order = np.random.default_rng(PERMUTATION_SEED).permutation(count)
        shards = []
        for number, first in enumerate(range(0, count, SHARD)):
            with ShardWriter(folder / f"{split}-{number:06d}.tar") as shard:
                for x, y in _blocks(spec, opened.splits[split], order[first : first + SHARD]):
                    shard.add(x, y)
                    if split == "train":
                        head = x[: MEAN_IMAGES - mean_images]
                        mean_images += len(head)
                        mean_sum += head.sum(0, dtype=np.int64)
                    done += len(y)
                    progress(done, total)
            shards.append(shard.row())
        splits[split] = {"images": count, "shards": shards}
    index = {
        "version": VERSION,
        "name": spec.name,
        "shape": list(spec.shape),
        "block": BLOCK,
        "classes": list(opened.classes),
        "source": source and fingerprint(source),
        "mean_image": {"images": mean_images, "sum": mean_sum.ravel().tolist()},
        "splits": splits,
    }
    partial = folder / "index.json.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(index, file)
        _sync(file)
    os.replace(partial, folder / "index.json")


def check_counts(spec: DatasetSpec, opened: OpenSource, source: Path | None) -> None:
    """UserError when a split has not the number of images that `spec` says."""
    for split, count in spec.counts.items():
        found = len(opened.splits[split])
        if found != count:
            raise UserError(
                f"{source or spec.name} has {found:,} {split} images instead of {count:,}: "
                f"incomplete, or not {spec.name}; fetch it again"
            )


@contextlib.contextmanager
def new_folder(data: Path, name: str) -> Iterator[Path]:
    """An empty folder beside DATA/NAME that takes its place, and an older set's, when the block ends without error.

    Leftovers of killed processes of this machine are removed. UserError when something there is no prepared data set.
    """
    target = data / name
    if target.exists() and not (target / "index.json").exists():
        raise UserError(f"{target} is there but is no prepared data set: move it away or choose another --data")
    data.mkdir(parents=True, exist_ok=True)
    prefix = f".{name}.partial-{platform.node()}-"
    for leftover in data.glob(f"{prefix}*"):
        if not _is_running(leftover.name.removeprefix(prefix).removesuffix("-old")):
            shutil.rmtree(leftover, ignore_errors=True)
    partial, old = data / f"{prefix}{os.getpid()}", data / f"{prefix}{os.getpid()}-old"
    partial.mkdir()
    try:
        yield partial
        _sync_folder(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        _sync_folder(data)
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


class ShardWriter:
    """Writes one tar file whose bytes depend on its arrays alone; its checksum is taken while writing."""

    def __init__(self, path: Path) -> None:
        self.path, self.images, self.bytes, self.digest = path, 0, 0, hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        self.file = open(self.path, "wb")
        self.tar = tarfile.open(fileobj=self, mode="w|", format=tarfile.USTAR_FORMAT)
        self.blocks = 0
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self.file:
            if kind is None:
                self.tar.close()
                _sync(self.file)

    def write(self, data: bytes) -> int:
        """What tarfile calls."""
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Adds a block: x uint8 [n, C, H, W], y int64 [n]."""
        # Labels first: webdataset ends a group when it has read the next one's first member, so that one is small
        for name, array in (("y", y), ("x", x)):
            buffer = BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            member = tarfile.TarInfo(f"{self.blocks:06d}.{name}.npy")
            member.size = buffer.tell()
            buffer.seek(0)
            self.tar.addfile(member, buffer)
        self.blocks += 1
        self.images += len(y)

    def row(self) -> dict[str, Any]:
        """The shard's row in index.json."""
        return {
            "name": self.path.name,
            "bytes": self.bytes,
            "images": self.images,
            "sha256": self.digest.hexdigest(),
        }


def fingerprint(source: Path) -> dict[str, Any]:
    """Name, bytes and SHA-256 of an archive; of a folder, over its files' relative names and contents, sorted."""
    if source.is_file():
        with open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        return {"name": source.name, "bytes": source.stat().st_size, "sha256": digest.hexdigest()}
    digest, size = hashlib.sha256(), 0
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(source).as_posix()}\0{len(content)}\0".encode() + content)
        size += len(content)
    return {"name": source.name, "bytes": size, "sha256": digest.hexdigest()}


def _blocks(spec: DatasetSpec, samples: Samples, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, len(order), BLOCK):
        xs, ys = zip(*(samples[int(i)] for i in order[first : first + BLOCK]), strict=True)
        x = np.stack(xs)
        if x.shape[1:] != spec.shape or x.dtype != np.uint8:
            raise ValueError(f"the reader of {spec.name} gives {x.dtype}{list(x.shape[1:])}")
        yield x, np.array(ys, np.int64)


def _is_running(pid: str) -> bool:
    """Whether another process has this id; our own id on a leftover is a dead process's, as happens in containers."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
