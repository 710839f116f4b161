"""One shard from its samples, in whatever process: plain tar files whose bytes depend on the samples alone."""

import functools
import hashlib
import json
import os
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ali_dist.data import block
from ali_dist.data.types import BLOCK, SHARD, UNLABELLED, BadImage, Sample, Samples

PERMUTATION_SEED = 0
NAMED = 20  # converted images of a kind that are named; of those left out, all are


@dataclass(frozen=True, slots=True)
class Job:
    """Shard `number` of a split: the images at places [first, last) of its stored order."""

    split: str
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"


def jobs(counts: Mapping[str, int]) -> Iterator[Job]:
    """All shards of splits of so many images, in order."""
    for split, count in counts.items():
        for number, first in enumerate(range(0, count, SHARD)):
            yield Job(split, number, first, min(first + SHARD, count))


@dataclass(frozen=True, slots=True)
class Packer:
    """Makes one job's shard in `folder`/shards and its record in `folder`/rows, holding one block in memory."""

    name: str
    shape: tuple[int, int, int]
    labels: int
    """Number of classes or attributes."""
    splits: Mapping[str, Samples]
    folder: Path
    skip_bad: bool
    """Leave out images that cannot be read, instead of raising BadImage."""
    compress: bool = False
    """Store images in fewer bytes, lossless (ali_dist.data.lossless)."""

    def __call__(self, job: Job) -> dict[str, Any]:
        """The shard's record; a shard that an earlier process finished is kept when its bytes are still right.

        The record holds the job's name, the shard's row for index.json (None when no image was left), images of each
        label, and the images converted and left out. BadImage unless `skip_bad`.
        """
        record = self._finished(job)
        if record is None:
            record = self._write(job)
        return record

    def _finished(self, job: Job) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / "rows" / f"{job.name}.json").read_text(encoding="utf-8"))
            row = record["shard"]
            if row:
                with open(self.folder / "shards" / row["name"], "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != row["sha256"]:
                        return None
            return record if self.skip_bad or not record["bad"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, job: Job) -> dict[str, Any]:
        kept = _Notes(np.zeros(self.labels, np.int64))
        shard = self.folder / "shards" / f"{job.name}.tar"
        # Renamed once complete; no other process may write to the same name, not even one left by a killed run
        partial = shard.with_name(f".{job.name}.{uuid.uuid4().hex}")
        try:
            with ShardWriter(partial, self.compress) as writer:
                for x, y in self._blocks(job, kept):
                    writer.add(x, y)
            if writer.images:
                os.replace(partial, shard)
        finally:
            partial.unlink(missing_ok=True)
        row = {**writer.row(), "name": shard.name} if writer.images else None
        record = {"job": job.name, "shard": row, **kept.to_json()}
        write_json(self.folder / "rows" / f"{job.name}.json", record)
        return record

    def _blocks(self, job: Job, notes: "_Notes") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        samples, xs, ys = self.splits[job.split], [], []
        order = stored_order(job.split, len(samples))
        for i in order[job.first : job.last].tolist():
            try:
                sample = Sample(*samples[i])
            except BadImage as error:
                if not self.skip_bad:
                    raise
                notes.bad.append({"name": error.name, "reason": error.reason})
                continue
            if sample.x.shape != self.shape or sample.x.dtype != np.uint8:
                raise ValueError(f"the reader of {self.name} gives {sample.x.dtype}{list(sample.x.shape)}")
            notes.add(sample)
            xs.append(sample.x)
            ys.append(sample.y)
            if len(xs) == BLOCK:
                yield _block(xs, ys)
                xs, ys = [], []
        if xs:
            yield _block(xs, ys)


@functools.lru_cache(maxsize=4)
def stored_order(split: str, count: int) -> np.ndarray:
    """int64 [count]: which sample of the source stands at each place of the split."""
    if split != "train":
        return np.arange(count)
    # Archives come sorted by class, and a block's images are always read together
    return np.random.default_rng(PERMUTATION_SEED).permutation(count)


class ShardWriter:
    """Writes one tar file whose bytes depend on its arrays alone; its checksum is taken while writing."""

    def __init__(self, path: Path, compress: bool = False) -> None:
        self.path, self.compress, self.images, self.bytes, self.digest = path, compress, 0, 0, hashlib.sha256()
        self.blocks: list[tuple[int, int, str]] = []

    def __enter__(self) -> "ShardWriter":
        self.file = open(self.path, "wb")
        self.tar = tarfile.open(fileobj=self, mode="w", format=tarfile.USTAR_FORMAT)
        self.block_digest = hashlib.sha256()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self.file:
            if kind is None:
                self.tar.close()
                sync(self.file)

    def write(self, data: bytes) -> int:
        """What tarfile calls."""
        self.digest.update(data)
        self.block_digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        """What tarfile calls."""
        return self.bytes

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Adds a block: x uint8 [n, C, H, W]; y int64 [n] of classes, or uint8 [n, A] of attributes."""
        start, self.block_digest = self.bytes, hashlib.sha256()
        for name, data in block.encode(x, y, self.compress):
            member = tarfile.TarInfo(f"{len(self.blocks):06d}.{name}")
            member.size = len(data)
            self.tar.addfile(member, BytesIO(data))
        self.blocks.append((start, self.bytes - start, self.block_digest.hexdigest()))
        self.images += len(y)

    def row(self) -> dict[str, Any]:
        """The shard's row in index.json."""
        return {
            "name": self.path.name,
            "bytes": self.bytes,
            "images": self.images,
            "sha256": self.digest.hexdigest(),
            "blocks": self.blocks,
        }


class _Notes:
    """What a shard's images were: int64 [labels] counts, conversions by kind, and those left out."""

    def __init__(self, counts: np.ndarray) -> None:
        self.counts, self.odd, self.bad = counts, {}, []

    def add(self, sample: Sample) -> None:
        if np.ndim(sample.y):
            self.counts[np.flatnonzero(sample.y)] += 1
        elif sample.y != UNLABELLED:
            self.counts[sample.y] += 1
        for kind in sample.odd:
            seen = self.odd.setdefault(kind, {"images": 0, "names": []})
            seen["images"] += 1
            if len(seen["names"]) < NAMED:
                seen["names"].append(sample.name)

    def to_json(self) -> dict[str, Any]:
        return {"label_counts": self.counts.tolist(), "odd": self.odd, "bad": self.bad}


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """The file is there complete, or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(tree, file)
        sync(file)
    os.replace(partial, path)


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _block(xs: list[np.ndarray], ys: list[int | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    y = np.array(ys)
    return np.stack(xs), y.astype(np.int64 if y.ndim == 1 else np.uint8)
