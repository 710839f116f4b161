"""What the peers read or convert: the same images as shards, as one array, and as the files they came from."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ali_dist.data.images import Images, Unreadable, decode
from ali_dist.data.index import Index, load_index
from ali_dist.data.shards import Reader, blocks
from ali_dist.data.table import DATASETS
from ali_dist.data.types import SHARD
from ali_dist.data.write import stored_order
from ali_dist.recipe import UserError


def work_name(index: Index, images: int) -> str:
    """Name of the folder for these images' formats; other images get another."""
    shards = [shard.sha256 for shard in shards_of(index, images)]
    return f"{index.name}-{hashlib.sha256(' '.join(shards).encode()).hexdigest()[:12]}"


def shards_of(index: Index, images: int) -> list:
    """The first shards that hold so many training images; all for 0."""
    shards = index.shards("train")
    return list(shards[: -(-images // SHARD)] if images else shards)


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, which `make` filled now or in an earlier run."""
    done = folder.with_name(folder.name + ".done")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        done.touch()
    return folder


def shards(index: Index, data: Path, images: int, work: Path) -> Path:
    """A prepared data set of the first shards of the one in the folder `data`, which it links to."""

    folder = work / "shards" / index.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tree = json.loads((data / index.name / "index.json").read_text(encoding="utf-8"))
    kept = tree["splits"]["train"]["shards"][: len(shards_of(index, images))]
    tree["splits"] = {"train": {"images": sum(shard["images"] for shard in kept), "shards": kept}}
    (folder / "index.json").write_text(json.dumps(tree), encoding="utf-8")
    for shard in kept:
        os.symlink((data / index.name / shard["name"]).absolute(), folder / shard["name"])
    return folder


def pixels(folder: Path, work: Path) -> Path:
    """x.npy and y.npy with all images of the data set in `folder`."""

    def make(out: Path) -> None:
        index = load_index(folder.parent, folder.name)
        count, done = index.images("train"), 0
        xs = np.lib.format.open_memmap(out / "x.npy", "w+", np.uint8, (count, *index.shape))
        ys = np.empty(count, np.int64)
        for x, y in Reader(index, "train").read(blocks(index.shards("train"))):
            xs[done : done + len(y)], ys[done : done + len(y)] = x, y
            done += len(y)
        xs.flush()
        np.save(out / "y.npy", ys)

    return once(work / "pixels", make)


def files(index: Index, count: int, source: Path, work: Path) -> Path:
    """The original files of the first `count` images, a folder a class.

    UserError when the source holds no image files, or files of another size than the shards' images.
    """
    samples = DATASETS[index.name].open(source, {}).splits.get("train")
    if not isinstance(samples, Images):
        raise UserError(f"--source {source} holds no image files, which the JPEG readers need: leave it out")
    members, labels = samples.members, samples.labels
    try:
        width, height = decode(members.read(0))[0].size
    except Unreadable as error:
        raise UserError(f"--source {source}: {members.name(0)} {error}") from error
    if (height, width) != index.shape[1:]:
        raise UserError(f"--source {source} holds images of {width}x{height}: the JPEG readers would not resize them")

    def make(folder: Path) -> None:
        for i in stored_order("train", len(samples))[:count].tolist():
            name = Path(members.name(i))
            path = folder / f"{labels[i]:06d}" / f"{i:08d}{name.suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(members.read(i))

    return once(work / "files", make)
