"""A job of `bench start`: ours up to its first update, or an empty TorchTrainer; each notes when it reaches what."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def mark(path: str, name: str) -> None:
    """Appends the moment in which `name` is over."""
    with open(path, "a") as file:
        file.write(json.dumps({"name": name, "time": time.time()}) + "\n")


def process_started() -> float:
    """Unix time at which this process began, to 10 ms."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def after(path: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a mark whenever it returns."""

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        mark(path, name)
        return result

    return marked


def empty_worker(path: str, config: dict[str, Any]) -> None:
    """An empty training function, in which PyTorch is there."""
    import torch.distributed

    if not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        mark(path, "workers run")


def empty(path: str, workers: int, storage: str) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    mark(path, "driver's imports")
    ray.init(log_to_driver=False)
    mark(path, "ray.init")
    TorchTrainer(
        functools.partial(empty_worker, path),
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=workers),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(storage_path=storage),
    ).fit()


def our_worker(path: str, config: dict[str, Any]) -> None:
    """`launch.train_worker`, which notes what it does on rank 0."""
    import torch.distributed

    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        path = os.devnull
    mark(path, "workers run")
    from ali_dist import fast, launch, worker

    mark(path, "worker's imports")
    worker.checked_index = after(path, "data opened", worker.checked_index)
    worker.TrainState = after(path, "networks built", worker.TrainState)
    worker.open_stream = after(path, "run and stream opened", worker.open_stream)
    begun = []

    def marked(update: Callable) -> Callable:
        def marked_once(*args: Any) -> Any:
            if begun:
                return update(*args)
            begun.append(True)
            mark(path, "first figures, first batch")
            return after(path, "first update", update)(*args)

        return marked_once

    for kind in (fast.PlainUpdates, fast.StaticUpdates):
        kind.__call__ = marked(kind.__call__)
    launch.train_worker(config)


def ours(path: str) -> None:
    from ali_dist import cli, launch

    mark(path, "driver's imports")
    launch.checked_index = after(path, "flags and data checked", launch.checked_index)
    launch.start_ray = after(path, "ray.init", launch.start_ray)
    launch.train_worker = functools.partial(our_worker, path)
    cli.run(launch.main)


def main() -> None:
    """start_job KIND MARKS: `ours` is given launch's flags, `empty` the number of workers and a folder for Ray."""
    kind, path, *flags = sys.argv[1:]
    with open(path, "a") as file:
        file.write(json.dumps({"name": "driver started", "time": process_started()}) + "\n")
    if kind == "empty":
        empty(path, int(flags[0]), flags[1])
        return
    sys.argv = ["launch", *flags]
    ours(path)
