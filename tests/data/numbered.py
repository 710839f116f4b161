"""A small data set in which every image carries its own number."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ali_dist.data.index import Index, load_index
from ali_dist.data.pack import new_folder, pack
from ali_dist.data.types import DatasetSpec, OpenSource

SHAPE = (3, 4, 4)


@dataclass
class Numbered:
    """Image i: i's four bytes in its first row, then values that depend on i."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        x = np.random.default_rng(i).integers(0, 256, SHAPE, dtype=np.uint8)
        x[0, 0] = np.frombuffer(np.uint32(i).tobytes(), np.uint8)
        return x, i % 10


def open_numbered(source, counts) -> OpenSource:
    return OpenSource(tuple("abcdefghij"), {split: Numbered(count) for split, count in counts.items()})


NUMBERED = DatasetSpec(name="numbered", shape=SHAPE, counts={"train": 5003, "valid": 301}, open=open_numbered)


def prepare(data: Path, compress: bool = False, **counts: int) -> Index:
    spec = replace(NUMBERED, counts=counts or NUMBERED.counts)
    with new_folder(data, spec.name) as folder:
        pack(spec, spec.open(None, spec.counts), None, folder, compress=compress)
    return load_index(data, spec.name)


def numbers(x) -> np.ndarray:
    """The numbers of the images of a batch."""
    return np.ascontiguousarray(np.asarray(x)[:, 0, 0]).view(np.uint32)[:, 0].astype(np.int64)
