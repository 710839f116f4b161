"""The other door to Ray: tasks, actors and Tune's trials, for work that is not one training job."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ali_dist.recipe import UserError

T, R = TypeVar("T"), TypeVar("R")
Report = Callable[[dict[str, float]], None]
QUIET = {"RAY_AIR_NEW_OUTPUT": "0"}  # the older output has one table, with columns of our choice


def start_ray(env_vars: Mapping[str, str] | None = None) -> None:
    """Joins the cluster that $RAY_ADDRESS or a submitted job names, else starts a Ray of this program's own.

    `env_vars` are for all processes of this job, besides those that it was submitted with.
    Ray writes a new token, by which that one answers, readable by everybody: here it becomes the user's alone.
    UserError when the cluster can't be reached, as one that another user has started on this machine.
    """
    import ray

    try:
        runtime_env = {"env_vars": dict(env_vars)} if env_vars else None
        ray.init(log_to_driver=False, logging_level=logging.WARNING, runtime_env=runtime_env)
    except ConnectionError as error:
        raise UserError(f"{error}: correct $RAY_ADDRESS, or set it to 'local' for a Ray of its own") from error
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    with suppress(OSError):  # there is none, or it is not ours to change
        token.chmod(0o600)


@contextmanager
def connected() -> Iterator[None]:
    """Inside it, Ray is there; see `start_ray`."""
    os.environ.update(QUIET)
    import ray

    start_ray()
    try:
        yield
    finally:
        ray.shutdown()


def run_trials(
    function: Callable[[dict[str, Any], Report], None],
    pieces: Mapping[str, dict[str, Any]],
    folder: Path,
    parallel: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> None:
    """Calls `function(piece, report)` for each named piece, as many at a time as the cluster (or `parallel`) holds.

    To be called while `connected`. A piece gets one GPU where the cluster has any, else one CPU core. A table of the
    pieces shows `columns` (metric -> heading) of what they report. `folder` holds Tune's own files meanwhile: a piece
    continues from what it has saved itself. It is tried three times; UserError names those that failed.
    """
    import ray
    from ray import tune

    try:
        resources = {"GPU": 1, "CPU": 1} if ray.cluster_resources().get("GPU") else {"CPU": 1}

        def trial(config: dict[str, Any]) -> None:
            function(pieces[config["piece"]], tune.report)

        tuner = tune.Tuner(
            tune.with_resources(trial, resources),
            param_space={"piece": tune.grid_search(list(pieces))},
            tune_config=tune.TuneConfig(max_concurrent_trials=parallel, reuse_actors=True),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder.absolute()),
                verbose=1,
                failure_config=tune.FailureConfig(max_failures=2),
                progress_reporter=tune.CLIReporter(
                    metric_columns=dict(columns or {}), parameter_columns=["piece"], max_report_frequency=60
                ),
            ),
        )
        results = tuner.fit()
        failed = [f"{r.config['piece']} ({r.error})" for r in results if r.error]
    finally:
        shutil.rmtree(folder / "tune", ignore_errors=True)
    if failed:
        raise UserError(f"these failed three times: {'; '.join(failed)}")


def map_tasks(function: Callable[[T], R], items: Sequence[T], workers: int = 0) -> Iterator[R]:
    """`function(item)` for all items, in any order, at most `workers` at a time (default: as many as there are cores).

    The function is stored in the cluster once. What it raises ends all; UserError when a worker dies for good.
    """
    import ray
    from ray.exceptions import RayTaskError, WorkerCrashedError

    started_here = not ray.is_initialized()
    if started_here:
        start_ray()
    stored = ray.put(function)
    task = ray.remote(num_cpus=1)(_call)
    waiting, running = iter(items), set()
    limit = workers or int(ray.cluster_resources().get("CPU", 1))
    try:
        while True:
            running |= {
                task.remote(stored, item) for _, item in zip(range(limit - len(running)), waiting, strict=False)
            }
            if not running:
                return
            ready, rest = ray.wait(list(running))
            running = set(rest)
            yield from ray.get(ready)
    except RayTaskError as error:
        raise error.cause from error
    except WorkerCrashedError as error:
        raise UserError(f"a Ray worker died again and again: the same command goes on ({error})") from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if started_here:
            ray.shutdown()


def map_actors(make: Callable[[], Callable[[T], R]], items: Sequence[T], workers: int = 0) -> Iterator[R]:
    """`make()(item)` for all items, in any order, by Ray Data; items and results are dicts of numbers and strings.

    To be called while `connected`. Each actor makes its function once and has one GPU where the cluster has any, else
    one CPU core; `workers` bounds them (default: as many as there is room for). One that dies is replaced, and its
    item done again. UserError when the function raises it.
    """
    import ray
    import ray.data

    cluster = ray.cluster_resources()
    resources = {"num_gpus": 1} if cluster.get("GPU") else {"num_cpus": 1}
    room = int(cluster["GPU"] if cluster.get("GPU") else cluster.get("CPU", 1))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the caller shows progress
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _Actor,
        fn_constructor_args=(make,),
        compute=ray.data.ActorPoolStrategy(size=min(workers or room, room, len(items))),
        **resources,
    )
    for row in rows.iter_rows():
        if row.get("error"):
            raise UserError(row["error"])
        yield row


class _Actor:
    def __init__(self, make: Callable[[], Callable[[T], R]]) -> None:
        self.make, self.function = make, None

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            self.function = self.function or self.make()
            return self.function(item)
        except UserError as error:  # which Ray Data would try again and wrap
            return {"error": str(error)}


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)
