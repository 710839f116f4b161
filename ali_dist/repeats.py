"""Repeats of a semi-supervised run: one job a seed, side by side on Ray, then the mean of their test errors."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from ali_dist.cluster import Report, connected, run_trials
from ali_dist.published import PUBLISHED
from ali_dist.recipe import Job, Recipe, UserError
from ali_dist.remote import start
from ali_dist.run import RunFolder, write_json
from ali_dist.settings import run_folder

COLUMNS = {"images": "images", "labelled": "error on labelled", "hours": "hours"}


def plan(recipe: Recipe, job: Job) -> dict[str, tuple[Recipe, Job]]:
    """Name -> recipe and job of each repeat, whose runs lie in one folder."""
    folder = run_folder(recipe, job).root
    return {
        f"seed-{seed}": (
            dataclasses.replace(recipe, seed=seed),
            dataclasses.replace(job, name=f"seed-{seed}", storage=str(folder), repeats=1),
        )
        for seed in range(recipe.seed, recipe.seed + job.repeats)
    }


def train_repeat(piece: dict[str, Any], report: Report) -> None:
    """One Ray Tune trial: a whole run on this process's GPU or CPU core."""
    import time

    import torch

    from ali_dist.worker import train_rank

    started, gpu = time.monotonic(), torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)

    def on_tick(num_images: int, scalars: dict[str, float]) -> None:
        hours = (time.monotonic() - started) / 3600
        report({"images": num_images, "labelled": scalars["error/labelled"], "hours": hours})

    train_rank(Recipe.from_json(piece["recipe"]), Job(**piece["job"]), gpu=gpu, on_tick=on_tick)


def run_repeats(recipe: Recipe, job: Job, resume: str) -> None:
    """Trains what is not finished, prints the mean beside published results and writes repeats.json."""
    runs = plan(recipe, job)
    folder = run_folder(recipe, job).root
    for one, its_job in runs.values():
        start(run_folder(one, its_job), one, resume)
    pieces = {
        name: {"recipe": one.to_json(), "job": dataclasses.asdict(its_job)} for name, (one, its_job) in runs.items()
    }
    with connected():
        run_trials(train_repeat, pieces, folder, columns=COLUMNS)
    errors = {name: final_error(run_folder(*run), recipe.schedule.num_images) for name, run in runs.items()}
    result = summarize(recipe, errors)
    write_json(folder / "repeats.json", result)
    print(as_text(recipe, result, folder))


def final_error(run: RunFolder, num_images: int) -> float:
    """The test error of the averaged weights after `num_images`; UserError when the run has not come so far."""
    from ali_dist.meter import read_ticks

    ticks = read_ticks(run.ticks)
    errors = [tick["test/error"] for tick in ticks if "test/error" in tick and tick["num_images"] >= num_images]
    if not errors:
        seen = max((tick["num_images"] for tick in ticks), default=0)
        raise UserError(
            f"{run.ticks} has no test error at the end: the run did not finish, it is at {seen:,} of {num_images:,} "
            "images; start the same command again"
        )
    return errors[-1]


def summarize(recipe: Recipe, errors: dict[str, float]) -> dict[str, Any]:
    """Test errors by run, their mean and their standard deviation, as shares."""
    values = list(errors.values())
    return {
        "dataset": recipe.dataset,
        "labels": recipe.semi.labels,
        "recipe": recipe.to_json(),
        "errors": errors,
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "published_percent": list(PUBLISHED.get((recipe.dataset, recipe.semi.labels), ())),
    }


def as_text(recipe: Recipe, result: dict[str, Any], folder: Path) -> str:
    spread = f" +- {100 * result['std']:.2f}" if result["std"] is not None else ""
    published = "; ".join(result["published_percent"]) or "nothing"
    if published != "nothing" and recipe.dataset == "cifar10":
        published += " (+- here is three standard deviations, ours is one)"
    return (
        f"{recipe.dataset}, {recipe.semi.name}: test error {100 * result['mean']:.2f}{spread} % "
        f"(mean and standard deviation of {len(result['errors'])} runs, averaged weights)\n"
        f"published, in %: {published}\n"
        f"runs  {folder}"
    )
