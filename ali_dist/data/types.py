"""The words between the readers, the table and the packer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ali_dist.recipe import UserError

BLOCK = 256  # images of a member group; only a shard's last block may hold fewer
SHARD = 8 * BLOCK  # images
UNLABELLED = -1  # the class of an image that has none


class Sample(NamedTuple):
    """An image; a reader without images to convert may give a plain (x, y) instead."""

    x: np.ndarray
    """uint8 [C, H, W]."""
    y: int | np.ndarray
    """The class, or UNLABELLED, or uint8 [A] of attributes 0 or 1."""
    odd: tuple[str, ...] = ()
    """What had to be converted ("grey", "rotated", ...), for the report."""
    name: str = ""
    """The image's name in its source."""


class Samples(Protocol):
    """A split of an open source, by index: BadImage for a sample that cannot be had, UserError for a damaged source.

    It is sent to other processes unless its source is `serial`: open files are opened again there.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample | tuple[np.ndarray, int]: ...


@dataclass(frozen=True, slots=True)
class OpenSource:
    """What a reader gives: the classes' or attributes' names in label order, and the splits in source order."""

    classes: tuple[str, ...]
    splits: dict[str, Samples]
    attributes: tuple[str, ...] = ()
    """Names of the attributes; `classes` is empty then."""
    serial: bool = False
    """The samples lie in this process's memory or temporary files, and there is no decoding to share out."""


class BadImage(UserError):
    """One image of a source that cannot be read: `name` in `source`, and why."""

    def __init__(self, source: Path, name: str, reason: str) -> None:
        super().__init__(source, name, reason)  # the arguments, so that it survives the way between processes
        self.source, self.name, self.reason = source, name, reason

    def __str__(self) -> str:
        return f"{self.source}: {self.name} {self.reason}: mend it or fetch it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """A data set's row in the table.

    `open(source, counts)` opens an archive or folder (None when the data set comes with a library) and raises
    UserError when it is damaged or is something else; it may leave it to the caller to hold the number of images
    of each split against `counts`, which is empty for a data set of any size.
    """

    name: str
    shape: tuple[int, int, int]
    counts: Mapping[str, int]
    open: Callable[[Path | None, Mapping[str, int]], OpenSource]
    source: str | None = None
    """What to fetch and where, for help and errors; None when there is nothing to fetch."""
    archives: tuple[str, ...] = ()
    """Names of the files that make up the source."""
    address: str | None = None
    """Where they may be downloaded from without asking; None where the licence or the host wants a person."""
    md5: Mapping[str, str] = field(default_factory=dict)
    """Published checksums, by file name."""
    resizable: bool = False
    """Whether the images may be had in another size: `open` then takes a `size` too."""
