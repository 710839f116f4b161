"""The flags that `launch` and `worker` share: a recipe by --dataset, each of its fields a flag, and the job's."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from ali_dist.cli import data_folder, did_you_mean
from ali_dist.data.index import Index, held_out_split, load_index
from ali_dist.data.stream import shares
from ali_dist.recipe import Job, Recipe, UserError
from ali_dist.recipes import RECIPES, find
from ali_dist.remote import is_bucket, run_at
from ali_dist.run import RunFolder
from ali_dist.tables import NETWORKS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a command line says."""

    recipe: Recipe
    job: Job
    conditional: bool = False
    """Conditional ALI: all networks are given the image's class or attributes."""
    dry_run: bool = False
    """Print the resolved recipe and the job, and stop."""


def parse(program: str, description: str, argv: list[str] | None = None) -> Settings:
    """Reads the flags; usage errors exit with code 2, wrong values raise UserError."""
    argv = _spelled_out(sys.argv[1:] if argv is None else argv)
    name = _value(argv, "--dataset")
    if name is None and not {"-h", "--help"} & set(argv):
        raise UserError(f"--dataset is missing: one of {', '.join(RECIPES)}")
    recipe = find(name or "digits", "--conditional" in argv, _value(argv, "--labels") not in (None, "0"))
    settings = tyro.cli(
        Annotated[Settings, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes],
        prog=f"python -m ali_dist.{program}",
        description=description,
        args=argv,
        default=Settings(recipe=recipe, job=Job()),
    )
    networks = settings.recipe.networks
    if settings.conditional and networks in NETWORKS and not NETWORKS[networks].labels:
        raise UserError(f"--conditional needs networks that take labels: --networks {networks} do not")
    storage = settings.job.storage
    if "://" not in storage:  # Ray's workers have a working directory of their own.
        storage = str(Path(storage).expanduser().absolute())
    job = replace(settings.job, storage=storage, data=str(data_folder(settings.job.data)))
    return replace(settings, job=job)


def _spelled_out(argv: list[str]) -> list[str]:
    """The words of a command line, with `--num-workers A:B` as `--min-workers A --num-workers B`."""
    words = list(argv)
    for flag in ("--num-workers", "--num_workers"):
        least, colon, most = (_value(argv, flag) or "").partition(":")
        if colon:
            at = next(i for i, word in enumerate(words) if word.split("=")[0] == flag)
            words[at : at + 2 - ("=" in words[at])] = ["--min-workers", least, "--num-workers", most]
    return words


def _value(argv: list[str], flag: str) -> str | None:
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.split("=", 1)[1]
    return None


def run_folder(recipe: Recipe, job: Job) -> RunFolder:
    return run_at(job.storage, job.name or default_name(recipe))


def default_name(recipe: Recipe) -> str:
    """The data set's name, and what is special about the training."""
    if recipe.semi.labels:
        return f"{recipe.dataset}-{recipe.semi.name}"
    conditional = recipe.networks in NETWORKS and NETWORKS[recipe.networks].labels
    return recipe.dataset + ("-conditional" if conditional else "")


def checked_index(recipe: Recipe, job: Job, *, patient: bool = False) -> Index:
    """The prepared data, after all checks that need no cluster: UserError says what is wrong and what to do.

    `job.num_workers` is the number of workers that will train. `patient`: data that are away are waited for.
    """
    if recipe.networks not in NETWORKS:
        raise did_you_mean("networks", recipe.networks, NETWORKS)
    if job.num_workers <= 0:
        raise UserError(f"--num-workers must be positive, not {job.num_workers}")
    if not 0 <= job.min_workers <= job.num_workers:
        raise UserError(f"--min-workers must be between 1 and --num-workers {job.num_workers}, not {job.min_workers}")
    if job.cpus_per_worker < 0 or job.max_failures < 0:
        raise UserError("--cpus-per-worker and --max-failures must not be negative")
    if recipe.micro_batch < job.num_workers:
        raise UserError(
            f"--batch-size {recipe.optim.batch_size} in {recipe.optim.accumulate} micro-batch(es) is smaller than "
            f"--num-workers {job.num_workers}: every worker needs at least one image"
        )
    for workers in range(job.min_workers or job.num_workers, job.num_workers + 1):
        if recipe.streamed and not shares(recipe.streamed, recipe.lanes, workers):
            raise UserError(
                f"--lanes {recipe.lanes} can't feed --num-workers {workers} in batches of {recipe.streamed}: "
                f"give a multiple of the workers as --lanes (a new run's only)"
            )
    if job.repeats < 1:
        raise UserError(f"--repeats must be positive, not {job.repeats}")
    if job.repeats > 1 and (not recipe.semi.labels or job.num_workers > 1):
        raise UserError("--repeats is for semi-supervised training (--labels), with one worker each")
    if recipe.train_embedding and not NETWORKS[recipe.networks].labels:
        raise UserError("--train-embedding is for --conditional: these networks have no embedding")
    if job.repeats > 1 and is_bucket(job.storage):
        raise UserError("--repeats needs a folder as --storage, not an address")
    if job.cache_gb <= 0:
        raise UserError(f"--cache-gb must be positive, not {job.cache_gb}")
    index = load_index(
        data_folder(job.data),
        recipe.dataset,
        cache=Path(job.cache).expanduser().absolute() if job.cache else None,
        cache_bytes=int(job.cache_gb * 1e9),
        skip_bad=job.on_bad_shard == "skip",
        patient=patient,
    )
    index.shards(recipe.train_split)
    check_fits(recipe, index)
    return index


def check_fits(recipe: Recipe, index: Index) -> None:
    """UserError when the networks take other images or labels than the data set has."""
    nets = NETWORKS[recipe.networks]
    if tuple(index.shape) != nets.image:
        raise UserError(
            f"data set {recipe.dataset} has images of shape {tuple(index.shape)}, "
            f"but networks {recipe.networks} take {nets.image}"
        )
    kind = "attributes" if index.attributes else "classes"
    if nets.labels not in (0, len(index.attributes or index.classes)):
        raise UserError(
            f"data set {recipe.dataset} has {len(index.attributes or index.classes)} {kind}, "
            f"but networks {recipe.networks} take {nets.labels}"
        )
    counts = index.notes[recipe.train_split].label_counts if recipe.train_split in index.notes else ()
    if nets.labels and index.classes and counts and sum(counts) < index.images(recipe.train_split):
        raise UserError(f"--train-split {recipe.train_split} has images without a class, --conditional needs it")
    check_classes(recipe, index)


def check_classes(recipe: Recipe, index: Index) -> None:
    """UserError when D's classes, the labels asked for and the data set do not go together."""
    known, labels = NETWORKS[recipe.networks].classes, recipe.semi.labels
    if bool(known) != bool(labels):
        want = "without --labels" if known else "with --labels"
        raise UserError(f"--networks {recipe.networks} can't be trained {want}: leave --networks out")
    if known != len(index.classes) and labels:
        raise UserError(
            f"data set {recipe.dataset} has {len(index.classes)} classes, but D of networks {recipe.networks} tells "
            f"{known} apart"
        )
    if labels and labels % known:
        raise UserError(f"--labels {labels} is not a multiple of the {known} classes: each gets as many")
    counts = index.notes[recipe.train_split].label_counts if recipe.train_split in index.notes else ()
    if labels and counts and labels // known > min(counts):
        raise UserError(f"--labels {labels}: a class has only {min(counts)} images in {recipe.train_split}")
    if labels and recipe.train_split == held_out_split(index):
        raise UserError(f"--train-split {recipe.train_split} is the split to test on: train on another")


def describe_job(recipe: Recipe, job: Job, run: RunFolder) -> str:
    return json.dumps({"run": str(run), "recipe": recipe.to_json(), "num_workers": job.num_workers}, indent=2)


def summary(run: RunFolder) -> str:
    """Where a run's results are, and how to look at them."""
    saves = run.saved()
    pictures = sorted(run.figures.glob("samples-*.png"))
    lines = [f"run              {run}"]
    if pictures:
        sample = run.shown(pictures[-1])
        lines += [f"samples          {sample}", f"reconstructions  {sample.replace('samples-', 'reconstructions-')}"]
    if saves:
        lines.append(f"checkpoint       {run.shown(saves[-1])}")
    lines.append(f"TensorBoard      tensorboard --logdir '{run.shown(run.tensorboard)}'")
    return "\n".join(lines)
