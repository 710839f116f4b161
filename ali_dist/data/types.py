"""The words between the readers, the table and the packer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class Samples(Protocol):
    """A split of an open source, by index: x uint8 [C, H, W] and its class; UserError for a damaged sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]: ...


@dataclass(frozen=True, slots=True)
class OpenSource:
    """What a reader gives: the classes' names in label order, and the splits in source order."""

    classes: tuple[str, ...]
    splits: dict[str, Samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """A data set's row in the table.

    `open(source, counts)` opens an archive or folder (None when the data set comes with a library) and raises
    UserError when it is damaged or is something else; it may leave it to the caller to hold the number of images
    of each split against `counts`.
    """

    name: str
    shape: tuple[int, int, int]
    counts: Mapping[str, int]
    open: Callable[[Path | None, Mapping[str, int]], OpenSource]
    source: str | None = None
    """What to fetch and where, for help and errors; None when there is nothing to fetch."""
