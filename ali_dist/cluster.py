"""Ray tasks: work shared out over a cluster, or over a Ray of this machine where there is none."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ali_dist.recipe import UserError

T, R = TypeVar("T"), TypeVar("R")


def map_tasks(function: Callable[[T], R], items: Sequence[T], workers: int = 0) -> Iterator[R]:
    """`function(item)` for all items, in any order, at most `workers` at a time (default: as many as there are cores).

    The function is stored in the cluster once. What it raises ends all; UserError when a worker dies for good.
    """
    import ray
    from ray.exceptions import RayTaskError, WorkerCrashedError

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False)
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


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)
