"""Samples to shards and index.json, in a folder that appears only once it is complete."""

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from ali_dist.data import block
from ali_dist.data.fingerprint import fingerprint, mark
from ali_dist.data.index import VERSION
from ali_dist.data.types import BLOCK, DatasetSpec, OpenSource
from ali_dist.data.write import NAMED, Job, Packer, jobs, write_json
from ali_dist.recipe import UserError

ORDER = 2  # of the samples: shards of another order are not gone on with, though a finished set is read
MEAN_IMAGES = 500  # the authors take the decoder's output bias from the mean of this many images

Run = Callable[[Packer, list[Job]], Iterable[dict[str, Any]]]
"""Like `map`, but may run in other processes and give the results in any order."""


def pack(
    spec: DatasetSpec,
    opened: OpenSource,
    source: Path | None,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    run: Run = map,
    skip_bad: bool = False,
    compress: bool = False,
) -> None:
    """Fills the `folder` of `new_folder`: shards/ with the shards and, last, index.json. Each process holds one block
    in memory; the bytes depend on the source alone. `progress` is called with the images done so far and in all.

    UserError when a split has not the number of images that `spec` says, or when an image cannot be read, unless
    `skip_bad` leaves those out; index.json names them.
    """
    check_counts(spec, opened, source)
    counts = image_counts(spec, opened)
    splits = {split: opened.splits[split] for split in counts}
    labels = len(opened.attributes or opened.classes)
    packer = Packer(spec.name, spec.shape, labels, splits, folder, skip_bad, compress)
    todo = list(jobs(counts))
    images_of = {job.name: job.last - job.first for job in todo}
    done, total, records, stop = 0, sum(counts.values()), {}, threading.Event()
    with ThreadPoolExecutor(1) as beside:
        content = beside.submit(lambda: source and fingerprint(source, stop))
        try:
            for record in (map if opened.serial else run)(packer, todo):
                records[record["job"]] = record
                done += images_of[record["job"]]
                progress(done, total)
        except BaseException:
            stop.set()
            raise
        sums = content.result()
    index = {
        "version": VERSION,
        "name": spec.name,
        "shape": list(spec.shape),
        "block": BLOCK,
        "classes": list(opened.classes),
        **({"attributes": list(opened.attributes)} if opened.attributes else {}),
        "source": sums,
        "mean_image": {},
        "splits": {
            split: _split([records[job.name] for job in todo if job.split == split], labels) for split in counts
        },
    }
    index["mean_image"] = _mean_image(spec, folder, index["splits"]["train"]["shards"])
    write_json(folder / "shards" / "index.json", index)


def image_counts(spec: DatasetSpec, opened: OpenSource) -> dict[str, int]:
    """Images of each split: what `spec` says, or what was found for a data set of any size."""
    return dict(spec.counts) or {split: len(samples) for split, samples in opened.splits.items()}


def check_counts(spec: DatasetSpec, opened: OpenSource, source: Path | None) -> None:
    """UserError when a split has not the number of images that `spec` says."""
    for split, count in spec.counts.items():
        found = len(opened.splits[split])
        if found != count:
            raise UserError(
                f"{source or spec.name} has {found:,} {split} images instead of {count:,}: "
                f"incomplete, or not {spec.name}; fetch it again"
            )


def plan(spec: DatasetSpec, counts: dict[str, int], source: Path | None, compress: bool = False) -> dict[str, Any]:
    """All that decides the shards' bytes: what an earlier process left is gone on with only when this is the same."""
    return {
        "version": VERSION,
        "order": ORDER,
        "shape": list(spec.shape),
        "images": counts,
        "source": source and mark(source),
        "pillow": PIL.__version__,
        "compress": compress,
    }


@contextlib.contextmanager
def new_folder(data: Path, name: str, plan: dict[str, Any] | None = None) -> Iterator[Path]:
    """A folder beside DATA/NAME whose shards/ takes its place, and an older set's, when the block ends without error.

    With the same `plan` as an earlier one that ended in an error or was killed, its finished shards are still there.
    UserError when something at DATA/NAME is no prepared data set, or when another process prepares it now.
    """
    target, partial, old = data / name, data / f".{name}.partial", data / f".{name}.old"
    data.mkdir(parents=True, exist_ok=True)
    with _locked(partial, name):
        if old.exists() and not target.exists():
            old.rename(target)  # killed between the two renamings below
        if target.exists() and not (target / "index.json").exists():
            shutil.rmtree(partial)
            raise UserError(f"{target} is there but is no prepared data set: move it away or choose another --data")
        try:
            _begin(partial, plan)
            yield partial
            _sync_folder(partial / "shards")
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            (partial / "shards").rename(target)
            _sync_folder(data)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(partial)
        finally:
            if partial.exists() and not any((partial / "rows").glob("*.json")):
                shutil.rmtree(partial, ignore_errors=True)  # nothing in it to go on with


@contextlib.contextmanager
def _locked(partial: Path, name: str) -> Iterator[None]:
    """Holds `partial`, made if need be, for this process; the system lets go of it when the process dies."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            file = open(partial / "lock", "w")
        except FileNotFoundError:
            continue  # its last owner has just removed the folder
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{name} is being prepared in {partial.parent} by another process: wait for it"
                ) from None
            try:
                if os.stat(partial / "lock").st_ino != os.fstat(file.fileno()).st_ino:
                    continue
            except FileNotFoundError:
                continue
            yield
            return


def _begin(partial: Path, plan: dict[str, Any] | None) -> None:
    """Leaves only what the same plan has finished."""
    saved = partial / "plan.json"
    try:
        same = plan is not None and json.loads(saved.read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        same = False
    for folder in (partial / "shards", partial / "rows"):
        if not same:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        for half_written in folder.glob(".*"):
            half_written.unlink()
    (partial / "shards" / "index.json").unlink(missing_ok=True)
    write_json(saved, plan or {})


def _split(records: list[dict[str, Any]], labels: int) -> dict[str, Any]:
    """A split's part of index.json."""
    odd: dict[str, dict[str, Any]] = {}
    for record in records:
        for kind, seen in record["odd"].items():
            all_seen = odd.setdefault(kind, {"images": 0, "names": []})
            all_seen["images"] += seen["images"]
            all_seen["names"] += seen["names"][: NAMED - len(all_seen["names"])]
    shards = [record["shard"] for record in records if record["shard"]]
    return {
        "images": sum(shard["images"] for shard in shards),
        "shards": shards,
        "label_counts": np.sum([record["label_counts"] for record in records] or [[0] * labels], axis=0).tolist(),
        "odd": odd,
        "bad": [row for record in records for row in record["bad"]],
    }


def _mean_image(spec: DatasetSpec, folder: Path, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Number and sum of the first training images, as they are stored."""
    images, total = 0, np.zeros(spec.shape, np.int64)
    for shard in shards:
        left = shard["images"]
        with open(folder / "shards" / shard["name"], "rb") as file:
            for offset, size, _ in shard["blocks"]:
                file.seek(offset)
                x = block.images(block.members(file.read(size)), (min(BLOCK, left), *spec.shape))
                left -= len(x)
                head = x[: MEAN_IMAGES - images]
                images += len(head)
                total += head.sum(0, dtype=np.int64)
                if images == MEAN_IMAGES:
                    return {"images": images, "sum": total.ravel().tolist()}
    return {"images": images, "sum": total.ravel().tolist()}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
