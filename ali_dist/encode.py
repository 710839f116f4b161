"""python -m ali_dist.encode RUN --out DIR: features of a whole prepared data set as Parquet, by Ray Data."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ali_dist import cli
from ali_dist.cluster import connected, map_actors
from ali_dist.data.index import Index, load_index
from ali_dist.data.progress import Progress
from ali_dist.data.store import is_address, open_bucket
from ali_dist.encoding import FEATURES, LAYERS, Encoder, Manifest, Part, alone, described, parts
from ali_dist.model import Model, Weights, find, load
from ali_dist.recipe import UserError

HELP = "Columns, separated by commas: " + "; ".join(f"{name} ({text})" for name, text in FEATURES.items())


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Encodes every image of a prepared data set, in stored order. Stopped at any moment, the same command goes on."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder or address of a run (its newest checkpoint) or of one checkpoint, folder of an exported model, or a run's
    name below --storage."""
    storage: str = "runs"
    """Folder or address of runs."""
    out: str
    """Folder of the results, SPLIT/FIRST-LAST.parquet; on a cluster, one that every node sees."""
    source: str = ""
    """Folder or address of one prepared data set, DATA/NAME; default: that of the run's data set in --data."""
    data: str = ""
    """Folder or address of prepared data sets; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    splits: str = "all"
    """Splits, separated by commas."""
    features: Annotated[str, tyro.conf.arg(help=HELP)] = "mu,log_sigma"
    weights: Weights = "averaged"
    """Averaged or raw weights."""
    seed: int = 0
    """Seed of the draws z."""
    num_workers: int = 0
    """Ray actors, one GPU each where there are any, else one core; default: all. The results are the same for any."""
    dry_run: bool = False
    """Say what would be written, and stop."""


def names(words: str, what: str, known: list[str]) -> list[str]:
    """The known names in a list separated by commas; UserError for another."""
    found = [word.strip() for word in words.split(",")]
    for name in found:
        if name not in known:
            raise cli.did_you_mean(what, name, known)
    return list(dict.fromkeys(found))


def place(flags: Flags, dataset: str) -> tuple[Path | str, str]:
    """Folder or address of prepared data sets, and the name of the one to encode."""
    if not flags.source:
        return cli.data_folder(flags.data), dataset
    if flags.data:
        raise UserError("--source and --data exclude each other: --source is one data set, --data is a folder of them")
    if is_address(flags.source):
        data, _, name = flags.source.rstrip("/").rpartition("/")
        return data, name
    path = Path(flags.source).expanduser().absolute()
    return path.parent, path.name


def check(model: Model, index: Index, splits: list[str], features: list[str]) -> None:
    """UserError when the model can't encode these images."""
    if tuple(index.shape) != tuple(model.shape):
        raise UserError(f"{index.store} has images of shape {tuple(index.shape)}, the model takes {tuple(model.shape)}")
    if not model.labels:
        return
    layers = [name for name in features if name in LAYERS]
    if layers:
        raise UserError(f"--features {','.join(layers)} need an encoder that is not given the label: it is conditional")
    if model.labels != len(index.attributes or index.classes):
        raise UserError(f"the model is given one of {model.labels} labels, {index.store} has others")
    for split in splits:
        if index.classes and split in index.notes and sum(index.notes[split].label_counts) < index.images(split):
            raise UserError(f"split {split} has images without a class, which a conditional model needs: see --splits")


def encode(todo: list[Part], done: int, manifest: Manifest, encoder: partial, workers: int) -> None:
    """Has all parts written by Ray's actors; `done` images are there already."""
    total, progress = done + sum(part.last - part.first for part in todo), Progress("images")
    with connected():
        for row in map_actors(encoder, [asdict(part) for part in todo], workers):
            manifest.add(row)
            done += row["rows"]
            progress(done, total)


def main() -> None:
    flags = tyro.cli(Flags, prog="python -m ali_dist.encode")
    if flags.num_workers < 0 or flags.seed < 0:
        raise UserError("--num-workers and --seed must not be negative")
    features = names(flags.features, "feature", list(FEATURES))
    out = cli.local_folder("--out", flags.out)
    model = load(find(flags.run, flags.storage), flags.weights)
    data, name = place(flags, model.recipe.dataset)
    index = load_index(data, name)
    splits = list(index.splits) if flags.splits == "all" else names(flags.splits, "split", list(index.splits))
    check(model, index, splits, features)
    wanted = parts(index, splits)
    images = sum(part.last - part.first for part in wanted)
    if flags.dry_run:
        print(f"would write {', '.join(features)} of {images:,} images to {out}, in {len(wanted)} files")
        return
    try:
        with alone(out):
            write(flags, model, index, (data, name), wanted, features, out)
    except OSError as error:
        raise UserError(f"can't write to {out} ({error.strerror}): give --out a writable folder") from error


def write(
    flags: Flags,
    model: Model,
    index: Index,
    source: tuple[Path | str, str],
    wanted: list[Part],
    features: list[str],
    out: Path,
) -> None:
    """Writes what is not there whole, and says so."""
    splits = list(dict.fromkeys(part.split for part in wanted))
    manifest = Manifest(out, described(model, flags.weights, index, splits, features, flags.seed))
    started, images = time.perf_counter(), sum(part.last - part.first for part in wanted)
    todo = [part for part in wanted if not manifest.whole(part)]
    for part in todo:
        if manifest.files.pop(part.name, None):
            print(f"{out / part.name} is missing or damaged: it is made again")
    left = sum(part.last - part.first for part in todo)
    if left < images:
        print(f"{images - left:,} of {images:,} images are encoded already, and their files' checksums are right")
    if todo:
        checkpoint = model.checkpoint.absolute()
        if model.bucket:  # which each host has to fetch
            checkpoint = open_bucket(model.bucket.address, f"checkpoints/{checkpoint.name}").address
        encoder = partial(Encoder, checkpoint, flags.weights, source, features, flags.seed, out)
        encode(todo, images - left, manifest, encoder, flags.num_workers)
        seconds = time.perf_counter() - started
        print(f"encoded {left:,} images in {seconds:.1f} s ({left / seconds:,.0f} images/s)")
    manifest.write(complete=True)
    print(f"{', '.join(features)} of {images:,} images in {out}: pandas.read_parquet('{out / splits[0]}')")


if __name__ == "__main__":
    cli.run(main)
