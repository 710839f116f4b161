"""Repeats of a semi-supervised run: one job a seed, side by side on Ray, then the mean of their test errors."""

import dataclasses
import signal
import statistics
import threading
from collections.abc import Callable
from contextlib import suppress
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
    """One Ray Tune trial: a whole run in this process, unless it is asked to stop before its turn has come."""
    import time

    import torch

    from ali_dist.worker import train_rank

    recipe, job, started = Recipe.from_json(piece["recipe"]), Job(**piece["job"]), time.monotonic()
    if run_folder(recipe, job).asked_to_stop():
        return
    torch.set_num_threads(piece["cpus"])

    def on_tick(num_images: int, scalars: dict[str, float]) -> None:
        hours = (time.monotonic() - started) / 3600
        report({"images": num_images, "labelled": scalars["error/labelled"], "hours": hours})

    train_rank(recipe, job, gpu=piece["gpu"], on_tick=on_tick)


def run_repeats(recipe: Recipe, job: Job, room: Callable[[Job], dict[str, int]]) -> None:
    """Trains what is not finished, prints the mean beside published results and writes repeats.json.

    `room` waits until the cluster has room for a job, here each repeat, and says what each takes of it. Stopped by
    SIGTERM or Ctrl-C, the same command goes on.
    """
    runs = plan(recipe, job)
    folder = run_folder(recipe, job).root
    for one, its_job in runs.values():
        start(run_folder(one, its_job), one, job.resume)
    with connected():
        resources = room(dataclasses.replace(job, cpus_per_worker=job.cpus_per_worker or 1))
        own = {"gpu": "GPU" in resources, "cpus": resources["CPU"]}
        pieces = {
            name: {"recipe": one.to_json(), "job": dataclasses.asdict(its_job), **own}
            for name, (one, its_job) in runs.items()
        }

        def train() -> None:
            run_trials(train_repeat, pieces, folder, None, COLUMNS, resources, job.max_failures)

        stopped = supervise(train, [run_folder(*run) for run in runs.values()])
    if stopped:
        print(f"stopped\nruns  {folder}")
        return
    errors = {name: final_error(run_folder(*run), recipe.schedule.num_images) for name, run in runs.items()}
    result = summarize(recipe, errors)
    write_json(folder / "repeats.json", result)
    print(as_text(recipe, result, folder))


def supervise(train: Callable[[], None], runs: list[RunFolder]) -> bool:
    """Calls `train` and raises what it raises; whether SIGTERM or Ctrl-C had the runs save and end meanwhile."""
    asked, failure, untold = threading.Event(), [], runs

    def target() -> None:
        try:
            train()
        except Exception as error:
            failure.append(error)

    def ask_to_stop(*_: object) -> None:  # no more: the storage may be away
        asked.set()
        print("stopping: each repeat saves a checkpoint at its next update", flush=True)

    # Ray's handler would end the driver at once, Tune's all repeats: it has none outside the main thread.
    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        if asked.is_set():
            untold = [run for run in untold if not tell_to_stop(run)]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if failure:
        raise failure[0]
    return asked.is_set()


def tell_to_stop(run: RunFolder) -> bool:
    """Asks a run to save and end; whether that could be written."""
    with suppress(OSError):  # the storage may be away for a while
        run.stop.touch()
        return True
    return False


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
