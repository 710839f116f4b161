"""ImageNet as published at 64x64 (Chrabaszcz et al., arXiv:1707.08819): ten training batches and one of validation.

https://image-net.org/download gives each as npz or as a pickle, with `data` uint8 [n, 12288] (red, green, blue planes)
and `labels` 1..1000, which are ILSVRC2012's own numbers of the classes.
"""

import zipfile
from pathlib import Path

import numpy as np

from ali_dist.data import unpickle
from ali_dist.data.spool import Spool
from ali_dist.data.types import OpenSource
from ali_dist.recipe import UserError

SHAPE = (3, 64, 64)
CLASSES = 1000
BATCHES = {"train": [f"train_data_batch_{i}" for i in range(1, 11)], "valid": ["val_data"]}
NAMES = "map_clsloc.txt"  # a line a class: WordNet ID, number, name
CHUNK = 1 << 20


def is_downsampled(folder: Path) -> bool:
    """Whether the folder, or one below it, holds such batches."""
    return any(_paths(folder, BATCHES["train"][0]) + _paths(folder, BATCHES["valid"][0]))


def open_batches(folder: Path) -> OpenSource:
    """Label = the class's number - 1; with map_clsloc.txt beside the batches, its place among the sorted WordNet IDs,
    as for the other layouts, and its name.

    The images are copied to a temporary file, one batch at a time: 15.8 GB in all.
    """
    classes, label_of = _classes(folder)
    splits = {}
    for split, names in BATCHES.items():
        spool, labels = Spool(SHAPE), []
        for name in names:
            found = _paths(folder, name)
            if not found:
                raise UserError(
                    f"{folder} has no file {name} or {name}.npz: fetch it from https://image-net.org/download"
                )
            labels.append(label_of[_copy(found[0], spool) - 1])
        spool.y = np.concatenate(labels)
        splits[split] = spool
    return OpenSource(classes=classes, splits=splits, serial=True)


def _paths(folder: Path, name: str) -> list[Path]:
    """The files of that name, or that name with .npz, in the folder or one below it."""
    names = (name, f"{name}.npz")
    return [path for file in names for path in (folder / file, *folder.glob(f"*/{file}")) if path.is_file()]


def _copy(path: Path, spool: Spool) -> np.ndarray:
    """Appends a batch's images; its labels int64 [n], 1..1000."""
    try:
        copied, labels = (_copy_npz if path.suffix == ".npz" else _copy_pickle)(path, spool)
        if len(labels) != copied or not np.isin(labels, range(1, CLASSES + 1)).all():
            raise ValueError(f"{copied:,} images and {len(labels):,} labels, or labels outside 1..{CLASSES}")
        return labels
    except UserError:
        raise
    # A damaged pickle can raise nearly anything
    except Exception as error:
        raise UserError(f"{path} is damaged or not a batch of 64x64 ImageNet: fetch it again ({error})") from error


def _copy_npz(path: Path, spool: Spool) -> tuple[int, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        with archive.open("labels.npy") as member:
            labels = np.lib.format.read_array(member, allow_pickle=False)
        with archive.open("data.npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read_header[version](member)
            if len(shape) != 2 or shape[1] != spool.bytes or fortran or dtype != np.uint8:
                raise ValueError(f"data is {dtype}{list(shape)}")
            left = shape[0] * shape[1]
            while left:
                data = member.read(min(CHUNK, left))
                if not data:
                    raise EOFError("data is cut short")
                spool.write(data)
                left -= len(data)
            if member.read(1):  # also has the member's checksum held against what was read
                raise ValueError("data is longer than it says")
    return shape[0], labels.astype(np.int64).ravel()


def _copy_pickle(path: Path, spool: Spool) -> tuple[int, np.ndarray]:
    with open(path, "rb") as file:
        tree = unpickle.load(file)
    data = tree["data"]
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != spool.bytes:
        raise ValueError(f"data is {data.dtype}{list(data.shape)}")
    for first in range(0, len(data), 256):
        spool.write(data[first : first + 256].tobytes())
    return len(data), np.array(tree["labels"], np.int64).ravel()


def _classes(folder: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes' names, and int64 [1000]: the label of each of the classes' own numbers."""
    paths = [path for path in (folder / NAMES, *folder.glob(f"*/{NAMES}")) if path.is_file()]
    if not paths:
        return tuple(f"ILSVRC2012 class {i}" for i in range(1, CLASSES + 1)), np.arange(CLASSES)
    rows = [line.split(maxsplit=2) for line in paths[0].read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(row) != 3 for row in rows) or sorted(row[1] for row in rows) != sorted(map(str, range(1, CLASSES + 1))):
        raise UserError(f"{paths[0]} is not a list of WordNet ID, number 1..{CLASSES} and name: fetch it again")
    label_of = np.empty(CLASSES, np.int64)
    for label, (_, number, _) in enumerate(sorted(rows)):
        label_of[int(number) - 1] = label
    return tuple(name for _, _, name in sorted(rows)), label_of
