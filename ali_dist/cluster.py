"""The other door to Ray: tasks, actors and Tune's trials, for work that is not one training job."""

import itertools
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ali_dist.recipe import UserError

T, R = TypeVar("T"), TypeVar("R")
Report = Callable[[dict[str, float]], None]
QUIET = {"RAY_AIR_NEW_OUTPUT": "0"}  # the older output has one table, with columns of our choice


def start_ray(dashboard: bool = False) -> None:
    """Joins the cluster that $RAY_ADDRESS or a submitted job names, else starts a Ray of this program's own.

    `dashboard` asks for one there: ten processes, which pay for a long job alone.

    Ray writes a new token, by which that one answers, readable by everybody: here it becomes the user's alone.
    UserError when the cluster can't be reached, as one that another user has started on this machine.
    """
    import ray

    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING, include_dashboard=dashboard)
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
    resources: Mapping[str, int] | None = None,
    max_failures: int = 2,
) -> None:
    """Calls `function(piece, report)` for each named piece, as many at a time as the cluster (or `parallel`) holds.

    To be called while `connected`. A piece gets `resources` (default: one CPU core, and one GPU where the cluster has
    any). A table of the pieces shows `columns` (metric -> heading) of what they report. `folder` holds Tune's own files
    meanwhile: a piece continues from what it has saved itself. UserError names those that failed more than
    `max_failures` times.
    """
    from ray import tune

    try:
        resources = dict(resources or {_kind()[0]: 1, "CPU": 1})

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
                failure_config=tune.FailureConfig(max_failures=max_failures),
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
        raise UserError(f"these failed more than {max_failures} times: {'; '.join(failed)}")


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


@contextmanager
def ordered_map(workers: int) -> Iterator[Callable[[Callable[[T], R], Sequence[T]], Iterator[R]]]:
    """Inside it, a `map` by so many actors, with one GPU each where the cluster has any, else one core.

    Results come in the items' order; at most two of each actor wait to be taken. An actor keeps the last function it
    was given. What that raises ends all; UserError when the cluster has fewer GPUs or cores, or an actor dies for good.
    """
    import ray
    from ray.exceptions import ActorDiedError, RayTaskError

    with connected():
        kind, there = _kind()
        if workers > there:
            raise UserError(f"--num-workers {workers}: the cluster has {there} {kind}s, one is needed for each")
        options = {"num_cpus": 1, "num_gpus": int(kind == "GPU"), "max_restarts": 2, "max_task_retries": 2}
        actors = [ray.remote(_Holder).options(**options).remote() for _ in range(workers)]

        def run(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
            stored, waiting = [ray.put(function)], deque()  # in a list, as Ray would unpack it for each call
            try:
                for actor, item in zip(itertools.cycle(actors), items, strict=False):
                    waiting.append(actor.call.remote(stored, item))
                    if len(waiting) == 2 * workers:
                        yield ray.get(waiting.popleft())
                while waiting:
                    yield ray.get(waiting.popleft())
            except RayTaskError as error:
                raise error.cause from error
            except ActorDiedError as error:
                raise UserError(f"a Ray worker died again and again ({error})") from error

        yield run


class _Holder:
    """An actor that fetches a function once for many calls."""

    def __init__(self) -> None:
        self.stored, self.function = None, None

    def call(self, stored: list[Any], item: Any) -> Any:
        import ray

        if stored != self.stored:
            self.stored, self.function = stored, ray.get(stored[0])
        return self.function(item)


def map_actors(make: Callable[[], Callable[[T], R]], items: Sequence[T], workers: int = 0) -> Iterator[R]:
    """`make()(item)` for all items, in any order, by Ray Data; items and results are dicts of numbers and strings.

    To be called while `connected`. Each actor makes its function once and has one GPU where the cluster has any, else
    one CPU core; `workers` bounds them (default: as many as there is room for). One that dies is replaced, and its
    item done again. UserError when the function raises it.
    """
    import ray
    import ray.data

    kind, room = _kind()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the caller shows progress
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _Actor,
        fn_constructor_args=(make,),
        compute=ray.data.ActorPoolStrategy(size=max(1, min(workers or room, room, len(items)))),
        **{f"num_{kind.lower()}s": 1},
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


def _kind() -> tuple[str, int]:
    """What each piece of work takes one of, GPUs where the cluster has any, else CPUs; and how many there are."""
    import ray

    cluster = ray.cluster_resources()
    kind = "GPU" if cluster.get("GPU") else "CPU"
    return kind, int(cluster.get(kind, 0))


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)
