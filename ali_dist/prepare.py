"""`python -m ali_dist.prepare`: an official archive to verified shards."""

import dataclasses
import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ali_dist import cli
from ali_dist.data.index import Index, load_index, outdated
from ali_dist.data.pack import Run, check_counts, image_counts, new_folder, pack, plan
from ali_dist.data.processes import map_processes
from ali_dist.data.progress import Progress
from ali_dist.data.source import addresses, download, downloads, local_source
from ali_dist.data.table import DATASETS
from ali_dist.data.types import SHARD, BadImage, DatasetSpec, OpenSource
from ali_dist.recipe import UserError
from ali_dist.recipes import RECIPES
from ali_dist.tables import NETWORKS

KNOWN = "; ".join(f"{name}: {spec.source or 'none, it comes with a library'}" for name, spec in DATASETS.items())
FEW = 40  # labels that are listed one by one
NAMED = 5  # images of a kind that are named; index.json names more


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Turn a data set's official archive into checked shards, once, before any training."""

    dataset: Annotated[str, tyro.conf.arg(help="Data set, and its --source: " + KNOWN)]
    source: str = ""
    """The official archive, its unpacked folder, or an http(s) address; default: downloaded, where that is allowed."""
    mirror: tuple[str, ...] = ()
    """Addresses of folders that hold the official archives too, tried first and in this order."""
    data: str = ""
    """Folder of prepared shards; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    size: int = 0
    """Height and width of the images of `--dataset folder`: 64 (default) or 32."""
    workers: int = 0
    """Processes, or with --ray tasks at a time; default: the machine's or the cluster's cores. Sets without images to
    decode (CIFAR-10, SVHN, digits) are packed by one process in any case."""
    ray: bool = False
    """Share the work out over a Ray cluster, whose nodes must all see the source and --data."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does: stop, or be left out, counted and named in the report and in index.json."""
    compress: bool = False
    """Store the images in about 0.6 of their bytes, lossless; reading them then takes several times as long."""
    force: bool = False
    """Build again what is already there; the old one stays until the new one is complete."""
    dry_run: bool = False
    """Open the source and say what would be written, but write nothing."""
    verify: bool = False
    """Read all shards, those already there or those just built, and check them against index.json."""


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m ali_dist.prepare")
    if args.dataset not in DATASETS:
        raise cli.did_you_mean("data set", args.dataset, DATASETS)
    if args.workers < 0:
        raise UserError(f"--workers must not be negative, not {args.workers}")
    spec, data = sized(DATASETS[args.dataset], args.size), cli.data_folder(args.data)
    if isinstance(data, str):
        raise UserError(f"--data {data}: shards are written to a folder; copy it to an address once it is complete")
    try:
        prepare(spec, data, args)
    except OSError as error:
        raise UserError(f"cannot write to {data}: {error.strerror or error}") from error


def sized(spec: DatasetSpec, size: int) -> DatasetSpec:
    """The data set with images of another size; UserError when it has one size only, or no networks fit."""
    if not size:
        return spec
    if not spec.resizable:
        raise UserError(f"--size {size}: the images of {spec.name} are {spec.shape[1]}x{spec.shape[2]}, leave it out")
    shape = (spec.shape[0], size, size)
    known = sorted({nets.image[1] for nets in NETWORKS.values() if nets.image[0] == spec.shape[0]})
    if size not in known:
        raise UserError(f"--size {size}: there are networks for images of {' and '.join(map(str, known))} pixels only")
    return dataclasses.replace(spec, shape=shape, open=functools.partial(spec.open, size=size))


def prepare(spec: DatasetSpec, data: Path, args: Arguments) -> None:
    """Packs, or finds, the data set in the folder `data`, and prints a report."""
    target, old = data / spec.name, outdated(data, spec.name)
    if old:
        print(f"{target} is of another version: {spec.name} is prepared again")
    if target.exists() and not (args.force or old):
        index = load_index(data, spec.name)
        print(f"{spec.name} is already prepared in {target} (--force builds it again, --verify checks it)")
    else:
        files = addresses(spec, data, args.source, args.mirror)
        if files and args.dry_run:
            for urls in files.values():
                print(f"would fetch {' or '.join(urls)} into {downloads(spec, data)}")
            return
        source = download(spec, data, files) if files else local_source(spec, args.source)
        opened = spec.open(source, spec.counts)
        check_counts(spec, opened, source)
        if args.dry_run:
            counts = image_counts(spec, opened).items()
            shards = ", ".join(f"{n:,} {split} images in {-(-n // SHARD)} shards" for split, n in counts)
            print(f"would write {shards}, to {target}")
            return
        index = build(spec, data, source, opened, args)
    if args.verify:
        from ali_dist.data.shards import verify  # slow to import, and worker processes import this file

        started = time.perf_counter()
        verify(index, Progress("images"))
        print(f"verified: every byte, checksum and image count is right ({time.perf_counter() - started:.1f} s)")
    print(report(index))


def build(spec: DatasetSpec, data: Path, source: Path | None, opened: OpenSource, args: Arguments) -> Index:
    """Packs the source, going on from where the same command ended before."""
    started, counts = time.perf_counter(), image_counts(spec, opened)
    with new_folder(data, spec.name, plan(spec, counts, source, args.compress)) as folder:
        done = len(list((folder / "rows").glob("*.json")))
        if done:
            print(f"going on with {done:,} shards that an earlier run finished, once their checksums are found right")
        skip = args.on_bad_image == "skip"
        try:
            options = {"run": runner(args), "skip_bad": skip, "compress": args.compress}
            pack(spec, opened, source, folder, Progress("images"), **options)
        except BadImage as error:
            hint = "or leave such images out, counted and named, with --on-bad-image skip"
            raise UserError(f"{error}, {hint}") from error
    seconds, index = time.perf_counter() - started, load_index(data, spec.name)
    images = sum(map(index.images, index.splits))
    print(f"packed {images:,} images in {seconds:.1f} s ({images / seconds:,.0f} images/s) into {index.store}")
    return index


def runner(args: Arguments) -> Run:
    """How the work is shared out, as the flags say."""
    if args.ray:
        from ali_dist.cluster import map_tasks

        return functools.partial(map_tasks, workers=args.workers)
    workers = args.workers or len(os.sched_getaffinity(0))
    return map if workers == 1 else functools.partial(map_processes, workers=workers)


def report(index: Index) -> str:
    """Images, shards and bytes of each split, its labels, and what was unusual about its images."""
    lines = [f"{'split':8} {'images':>10} {'shards':>7} {'bytes':>15}"]
    for split, shards in index.splits.items():
        size = sum(shard.bytes for shard in shards)
        lines.append(f"{split:8} {index.images(split):>10,} {len(shards):>7,} {size:>15,}")
    names, kind = (index.attributes, "attribute") if index.attributes else (index.classes, "class")
    for split, notes in index.notes.items():
        counts = notes.label_counts
        if not any(counts):
            lines.append(f"{split}: images without {kind}")
        elif len(counts) <= FEW:
            each = ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
            lines.append(f"{split}, images of each {kind}: {each}")
        else:
            lines.append(f"{split}: {min(counts):,} to {max(counts):,} images in each of {len(counts):,} classes")
        for what, (count, seen) in notes.odd.items():
            lines.append(f"{split}: {count:,} {what} images converted ({_some(seen, count)})")
        if notes.bad:
            lines.append(f"{split}: {len(notes.bad):,} images LEFT OUT, all named in {index.store}/index.json:")
            lines += [f"  {name} {reason}" for name, reason in notes.bad[:NAMED]]
    recipe = RECIPES.get(index.name)
    fitting = [name for name, nets in NETWORKS.items() if nets.image == index.shape]
    if recipe and fitting and recipe.networks not in fitting:
        lines.append(f"train with: python -m ali_dist.launch --dataset {index.name} --networks {fitting[0]}")
    return "\n".join(lines)


def _some(names: tuple[str, ...], count: int) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if count > NAMED else "")


if __name__ == "__main__":
    cli.run(main)
