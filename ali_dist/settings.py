"""The flags that `launch` and `worker` share: a recipe by --dataset, each of its fields a flag, and the job's."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from ali_dist.cli import data_folder, did_you_mean
from ali_dist.data.index import Index, load_index
from ali_dist.data.stream import shares
from ali_dist.recipe import Job, Recipe, UserError
from ali_dist.recipes import RECIPES
from ali_dist.run import RunFolder
from ali_dist.tables import NETWORKS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a command line says."""

    recipe: Recipe
    job: Job
    dry_run: bool = False
    """Print the resolved recipe and the job, and stop."""


def parse(program: str, description: str, argv: list[str] | None = None) -> Settings:
    """Reads the flags; usage errors exit with code 2, wrong values raise UserError."""
    argv = sys.argv[1:] if argv is None else argv
    name = _dataset_flag(argv)
    if name is None and not {"-h", "--help"} & set(argv):
        raise UserError(f"--dataset is missing: one of {', '.join(RECIPES)}")
    if name is not None and name not in RECIPES:
        raise did_you_mean("data set", name, RECIPES)
    recipe = RECIPES[name or "digits"]
    settings = tyro.cli(
        Annotated[Settings, tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes],
        prog=f"python -m ali_dist.{program}",
        description=description,
        args=argv,
        default=Settings(recipe=recipe, job=Job()),
    )
    # Ray's workers have a working directory of their own.
    storage = Path(settings.job.storage).expanduser().absolute()
    job = replace(settings.job, storage=str(storage), data=str(data_folder(settings.job.data)))
    return replace(settings, job=job)


def _dataset_flag(argv: list[str]) -> str | None:
    for i, word in enumerate(argv):
        if word == "--dataset" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith("--dataset="):
            return word.split("=", 1)[1]
    return None


def run_folder(recipe: Recipe, job: Job) -> RunFolder:
    return RunFolder(Path(job.storage) / (job.name or recipe.dataset))


def checked_index(recipe: Recipe, job: Job) -> Index:
    """The prepared data, after all checks that need no cluster: UserError says what is wrong and what to do.

    `job.num_workers` is the number of workers that will train.
    """
    if recipe.networks not in NETWORKS:
        raise did_you_mean("networks", recipe.networks, NETWORKS)
    if job.num_workers <= 0:
        raise UserError(f"--num-workers must be positive, not {job.num_workers}")
    if job.cpus_per_worker < 0 or job.max_failures < 0:
        raise UserError("--cpus-per-worker and --max-failures must not be negative")
    if recipe.micro_batch < job.num_workers:
        raise UserError(
            f"--batch-size {recipe.optim.batch_size} in {recipe.optim.accumulate} micro-batch(es) is smaller than "
            f"--num-workers {job.num_workers}: every worker needs at least one image"
        )
    if not shares(recipe.micro_batch, recipe.lanes, job.num_workers):
        raise UserError(
            f"--lanes {recipe.lanes} can't feed --num-workers {job.num_workers} in batches of {recipe.micro_batch}: "
            f"give a multiple of the workers as --lanes (a new run's only)"
        )
    if job.cache_gb <= 0:
        raise UserError(f"--cache-gb must be positive, not {job.cache_gb}")
    index = load_index(
        data_folder(job.data),
        recipe.dataset,
        cache=Path(job.cache).expanduser().absolute() if job.cache else None,
        cache_bytes=int(job.cache_gb * 1e9),
        skip_bad=job.on_bad_shard == "skip",
    )
    expected = NETWORKS[recipe.networks].image
    if tuple(index.shape) != expected:
        raise UserError(
            f"data set {recipe.dataset} has images of shape {tuple(index.shape)}, "
            f"but networks {recipe.networks} take {expected}"
        )
    return index


def describe_job(recipe: Recipe, job: Job, run: RunFolder) -> str:
    return json.dumps({"run": str(run.root), "recipe": recipe.to_json(), "num_workers": job.num_workers}, indent=2)


def summary(run: RunFolder) -> str:
    """Where a run's results are, and how to look at them."""
    saves = run.saved()
    pictures = sorted(run.figures.glob("samples-*.png"))
    lines = [f"run              {run.root}"]
    if pictures:
        lines += [
            f"samples          {pictures[-1]}",
            f"reconstructions  {pictures[-1].with_name(pictures[-1].name.replace('samples', 'reconstructions'))}",
        ]
    if saves:
        lines.append(f"checkpoint       {saves[-1]}")
    lines.append(f"TensorBoard      tensorboard --logdir '{run.tensorboard}'")
    return "\n".join(lines)
