"""index.json: what a prepared data set holds, so that damage never passes for data."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

from ali_dist.data.cache import Cache
from ali_dist.data.parts import Store
from ali_dist.data.patient import Patient
from ali_dist.data.store import is_address, open_store
from ali_dist.data.table import DATASETS
from ali_dist.data.types import BLOCK
from ali_dist.recipe import UserError
from ali_dist.run import parse_json

VERSION = 2


class Block(NamedTuple):
    """A block's members in its shard: where they begin, their bytes with tar headers, and SHA-256 in hex."""

    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its name in the data set's folder, its size in bytes, images, SHA-256 in hex, and blocks."""

    name: str
    bytes: int
    images: int
    sha256: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Notes:
    """What a split's images were: images of each class, or with each attribute; how many were converted, by kind, with
    the first names; name and reason of each one left out."""

    label_counts: tuple[int, ...] = ()
    odd: Mapping[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    bad: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Index:
    """A prepared data set. `mean_image` is float64 [C, H, W] in [0, 1], over the first 500 training images.

    A set of attributes has no classes: its labels are uint8 [n, A], where others have int64 [n].
    """

    store: Store
    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean_image: Tensor
    splits: dict[str, tuple[Shard, ...]]
    attributes: tuple[str, ...] = ()
    skip_bad: bool = False
    """Whether images of a damaged shard are replaced when it is read, instead of raising UserError."""
    notes: Mapping[str, Notes] = field(default_factory=dict)

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The split's shards in stored order; UserError when there is no such split."""
        if split not in self.splits:
            raise UserError(f"data set {self.name!r} has no split {split!r}: it has {', '.join(self.splits)}")
        return self.splits[split]

    def images(self, split: str) -> int:
        return sum(shard.images for shard in self.shards(split))


def load_index(
    data: Path | str,
    name: str,
    *,
    cache: Path | None = None,
    cache_bytes: int = 0,
    skip_bad: bool = False,
    patient: bool = False,
) -> Index:
    """The index of data set `name` below `data`, a folder or an address of s3, gs, http or https.

    Blocks of an address are kept in the folder `cache`, within `cache_bytes`. UserError when the data set is not
    there, or when its index is damaged or of another version; the shards themselves are checked when they are read.
    `patient`: the data set was there, and is waited for while it is away, now and whenever the index's shards are read.
    """
    store = open_store(data, name)
    if patient:
        store = Patient(store)
    path = f"{store}/index.json"
    try:
        content = store.read("index.json")
    except FileNotFoundError:
        raise UserError(f"no data set {name!r} in {data}: {mending(data, name)}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if cache and store.remote:
        store = Cache(store, cache, cache_bytes, hashlib.sha256(content).hexdigest()[:16])
    try:
        index = replace(_parse(parse_json(content.decode("utf-8")), store), skip_bad=skip_bad)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({error}): {mending(data, name, '--force')}"
        ) from error
    if index.name != name:
        raise UserError(f"{path} describes data set {index.name!r}, not {name!r}: rename the folder")
    return index


def held_out_split(index: Index) -> str:
    """The split to test on: a data set without one is tested on its validation images."""
    return "test" if "test" in index.splits else "valid"


def outdated(data: Path, name: str) -> bool:
    """Whether the set prepared there is of another version than this one reads."""
    try:
        return parse_json((data / name / "index.json").read_text(encoding="utf-8"))["version"] != VERSION
    except (OSError, ValueError, KeyError, TypeError):
        return False  # none, or damaged: load_index says so


def prepare_command(data: Path | str, name: str) -> str:
    """The command that prepares a data set."""
    needs_source = name in DATASETS and DATASETS[name].source and not DATASETS[name].address
    source = " --source PATH" if needs_source else ""
    return f"python -m ali_dist.prepare --dataset {name}{source} --data {shlex.quote(str(data))}"


def mending(data: Path | str, name: str, *flags: str) -> str:
    """What to do about a data set that is not as it should be."""
    if is_address(data):
        return f"prepare {name} in a folder and copy it there whole"
    return f"run `{' '.join([prepare_command(data, name), *flags])}`"


def _parse(tree: dict[str, Any], store: Store) -> Index:
    import torch  # slow to import, and the processes that only write shards need none of it

    if tree["version"] != VERSION or tree["block"] != BLOCK:
        raise ValueError(f"version {tree['version']}, blocks of {tree['block']}")
    channels, height, width = shape = tuple(tree["shape"])
    if tree["mean_image"]["images"] < 1:
        raise ValueError("a mean of no image")
    mean = torch.tensor(tree["mean_image"]["sum"], dtype=torch.float64).reshape(shape)
    splits = {split: tuple(map(_shard, row["shards"])) for split, row in tree["splits"].items()}
    for split, shards in splits.items():
        if sum(shard.images for shard in shards) != tree["splits"][split]["images"]:
            raise ValueError(f"the shards of {split} do not add up to its images")
    return Index(
        store=store,
        name=tree["name"],
        shape=(channels, height, width),
        classes=tuple(tree["classes"]),
        mean_image=mean / (255 * tree["mean_image"]["images"]),
        splits=splits,
        attributes=tuple(tree.get("attributes", ())),
        notes={split: _notes(row) for split, row in tree["splits"].items()},
    )


def _shard(row: dict[str, Any]) -> Shard:
    shard = Shard(**{**row, "blocks": tuple(Block(*block) for block in row["blocks"])})
    ends = [0, *(block.offset + block.bytes for block in shard.blocks)]
    in_order = all(end <= block.offset for end, block in zip(ends, shard.blocks, strict=False))
    if Path(shard.name).name != shard.name or len(shard.blocks) != math.ceil(shard.images / BLOCK) or not shard.blocks:
        raise ValueError(f"shard {shard.name!r} of {shard.images} images in {len(shard.blocks)} blocks")
    if not in_order or ends[-1] > shard.bytes or any(block.bytes < 1 for block in shard.blocks):
        raise ValueError(f"the blocks of {shard.name} do not lie in it one after another")
    return shard


def _notes(row: dict[str, Any]) -> Notes:
    return Notes(
        label_counts=tuple(row.get("label_counts", ())),
        odd={kind: (seen["images"], tuple(seen["names"])) for kind, seen in row.get("odd", {}).items()},
        bad=tuple((image["name"], image["reason"]) for image in row.get("bad", ())),
    )
