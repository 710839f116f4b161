"""`python -m ali_dist.prepare`: an official archive to verified shards."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ali_dist import cli
from ali_dist.data.index import Index, load_index, prepare_command
from ali_dist.data.pack import SHARD, check_counts, new_folder, pack
from ali_dist.data.shards import verify
from ali_dist.data.table import DATASETS
from ali_dist.data.types import DatasetSpec
from ali_dist.recipe import UserError

KNOWN = "; ".join(f"{name}: {spec.source or 'none, it comes with a library'}" for name, spec in DATASETS.items())


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Turn a data set's official archive into checked shards, once, before any training."""

    dataset: Annotated[str, tyro.conf.arg(help="Data set, and its --source: " + KNOWN)]
    source: str = ""
    """The official archive or its unpacked folder."""
    data: str = ""
    """Folder of prepared shards; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
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
    spec, data = DATASETS[args.dataset], cli.data_folder(args.data)
    try:
        prepare(spec, data, args)
    except OSError as error:
        raise UserError(f"cannot write to {data}: {error.strerror or error}") from error


def prepare(spec: DatasetSpec, data: Path, args: Arguments) -> None:
    """Packs, or finds, the data set in the folder `data`, and prints a report."""
    target = data / spec.name
    if target.exists() and not args.force:
        index = load_index(data, spec.name)
        print(f"{spec.name} is already prepared in {target} (--force builds it again, --verify checks it)")
    else:
        source = find_source(spec, data, args.source)
        if args.dry_run:
            check_counts(spec, spec.open(source, spec.counts), source)
            shards = ", ".join(f"{n:,} {split} images in {-(-n // SHARD)} shards" for split, n in spec.counts.items())
            print(f"would write {shards}, to {target}")
            return
        started = time.perf_counter()
        with new_folder(data, spec.name) as folder:
            pack(spec, spec.open(source, spec.counts), source, folder, progress)
        seconds, images = time.perf_counter() - started, sum(spec.counts.values())
        print(f"packed {images:,} images in {seconds:.1f} s ({images / seconds:,.0f} images/s) into {target}")
        index = load_index(data, spec.name)
    if args.verify:
        started = time.perf_counter()
        verify(index, progress)
        print(f"verified: every byte, checksum and image count is right ({time.perf_counter() - started:.1f} s)")
    print(report(index))


def find_source(spec: DatasetSpec, data: Path, given: str) -> Path | None:
    """The source's path, None for a data set that needs none; UserError when it is not as it should be."""
    if spec.source is None:
        if given:
            raise UserError(f"{spec.name} comes with a library: leave --source out")
        return None
    if not given:
        raise UserError(
            f"{spec.name} needs --source: fetch {spec.source}, then run `{prepare_command(data, spec.name)}`"
        )
    source = Path(given).expanduser()
    if not source.exists():
        raise UserError(f"--source {source} does not exist: {spec.name} is made from {spec.source}")
    return source


def report(index: Index) -> str:
    """One line a split: images, shards and bytes."""
    lines = [f"{'split':8} {'images':>10} {'shards':>7} {'bytes':>15}"]
    for split, shards in index.splits.items():
        size = sum(shard.bytes for shard in shards)
        lines.append(f"{split:8} {index.images(split):>10,} {len(shards):>7,} {size:>15,}")
    return "\n".join(lines)


def progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} images", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
