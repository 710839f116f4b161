"""python -m ali_dist.evaluate RUN --metrics linear,classes"""

import contextlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ali_dist import cli
from ali_dist.cluster import ordered_map
from ali_dist.data.index import Index, load_index
from ali_dist.evaluate.classes import check_classifier
from ali_dist.evaluate.data import identity
from ali_dist.evaluate.table import METRICS
from ali_dist.evaluate.work import Work, device_kind, exact_float32
from ali_dist.model import Model, Weights, find, load
from ali_dist.recipe import UserError
from ali_dist.remote import changing
from ali_dist.run import RunFolder, append_line
from ali_dist.settings import check_fits

LIBRARIES = ("ali_dist", "numpy", "scikit-learn", "torchmetrics")  # named beside a result, besides Python and PyTorch


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Numbers from a checkpoint; each is printed and appended to the run's metrics.jsonl."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder or address of a run (its newest checkpoint) or of one checkpoint, or a run's name below --storage."""
    storage: str = "runs"
    """Folder or address of runs."""
    metrics: Annotated[str, tyro.conf.arg(help="Names of metrics, separated by commas: " + ", ".join(METRICS))]
    weights: Weights = "averaged"
    """Averaged or raw weights."""
    data: str = ""
    """Folder of prepared shards; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    num_workers: int = 1
    """Ray workers that share the work, with a GPU each where the cluster has any; the numbers stay the same. 1: this
    process, without Ray."""
    images: int = 10_000
    """Of fid, kid, prdc and those like them: how many samples are compared with as many images. Published FIDs are
    mostly of 50,000, and only those of the same number are comparable; kid and prdc use 10,000 at most."""
    classifier: str = ""
    """Of classes: another run, trained with --labels, whose D judges the samples; default: an SVM on pixels."""
    reference: str = "train"
    """Of the same: the split whose first images those are; the training split is stored in a random order."""
    inception: str = ""
    """File pt_inception-2015-12-05-6726825d.pth for fid, kid and prdc; default: downloaded once, to --cache."""
    cache: str = "~/.cache/ali_dist/features"
    """Folder of weights and of what is known of a data set's features, which need to be computed once only."""
    dry_run: bool = False
    """Say what would be computed, and stop."""


def main() -> None:
    flags = tyro.cli(Flags, prog="python -m ali_dist.evaluate")
    names = [name.strip() for name in flags.metrics.split(",")]
    for name in names:
        if name not in METRICS:
            raise cli.did_you_mean("metric", name, METRICS)
    if flags.num_workers < 1:
        raise UserError(f"--num-workers must be at least 1, not {flags.num_workers}")
    model = load(find(flags.run, flags.storage), flags.weights)
    run = model.run  # an exported model is of none, which is said before anything is computed
    index = load_index(cli.data_folder(flags.data), model.recipe.dataset)
    index.shards(flags.reference)
    check_fits(model.recipe, index)
    classifier = None
    if flags.classifier:
        if "classes" not in names:
            raise UserError("--classifier is for --metrics classes: add it, or leave --classifier out")
        classifier = load(find(flags.classifier, flags.storage), flags.weights)
        check_classifier(model, classifier)
    if flags.dry_run:
        print(f"{', '.join(names)} of {model.place} on {index.store}")
        return
    alone = flags.num_workers == 1
    with contextlib.nullcontext(map) if alone else ordered_map(flags.num_workers) as map_in_order:
        exact_float32()
        device = next(iter(map_in_order(device_kind, [None])))
        if alone:
            model.net.to(device)
        work = Work(
            map=map_in_order,
            images=flags.images,
            reference=flags.reference,
            inception=Path(flags.inception).expanduser() if flags.inception else None,
            cache=Path(flags.cache).expanduser(),
            classifier=classifier,
        )
        for name in names:
            write(name, METRICS[name](model, index, work), model, index, flags.weights, device, run)


def write(
    name: str, found: dict[str, float | str], model: Model, index: Index, weights: Weights, device: str, run: RunFolder
) -> None:
    """Prints a result and appends it to the run's metrics.jsonl, with what it takes to repeat it.

    A metric itself says which splits it used, how many of their images, and the seed where it draws.
    """
    libraries = {library: version(library) for library in LIBRARIES}
    line = {
        "metric": name,
        **found,
        "checkpoint": model.place,
        "weights": weights,
        "dataset": index.name,
        "shards_sha256": {split: identity(index, split) for split in index.splits},
        "device": device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **libraries},
    }
    print(json.dumps(line), flush=True)
    try:
        with changing(run, run.metrics):
            append_line(run.metrics, line)
    except OSError as error:
        raise UserError(f"can't append to {run.metrics} ({error.strerror})") from error


if __name__ == "__main__":
    cli.run(main)
