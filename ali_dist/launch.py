"""The job: Ray Train workers (Ray actors, DDP) that train one recipe, as a driver for `ray job submit`.

Ray starts, places and restarts the workers. The run's folder is the only state between them: checkpoints there are
found again by every new group of workers, a file STOP there asks them to save and end, REGROUP to save and be started
again, a file FAILED says why going on would be useless. Where --storage is an address, the driver and rank 0 have a
copy of the folder each.
"""

import dataclasses
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from ali_dist import cli
from ali_dist.cluster import start_ray
from ali_dist.elastic import ClusterView, Growth, release
from ali_dist.lookout import Lookout
from ali_dist.mirror import followed
from ali_dist.patience import patiently
from ali_dist.prometheus import Exporter
from ali_dist.recipe import Job, Recipe, UserError
from ali_dist.remote import REQUESTS, copy_of, fail, heed, pull, start
from ali_dist.repeats import run_repeats
from ali_dist.room import wait_for_room
from ali_dist.run import RunFolder, Superseded
from ali_dist.settings import checked_index, describe_job, parse, run_folder, summary

SECONDS_TO_SAVE = 60  # that a stopped job needs at most: Ray's own default before SIGKILL is 3
DAY = 86_400
SECONDS_TO_END = 30
QUIET = {  # Ray prints a line a report and every print twice without these
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
SECONDS = {  # what Ray Train waits for, where its defaults would cost minutes
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # it asks each worker, in a thread that no step or save holds up,
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",  # and takes one that is silent for so long for dead
    # For room, before it looks again how much the cluster has: after a lost node it first asks for what was there.
    # Where there is room it is given in parts of a second, and asking again is no failure and has no bound
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}


class Regroup(Exception):
    """The workers have saved and ended so that they are started again, perhaps on other nodes."""


def train_worker(config: dict[str, Any]) -> None:
    """Runs inside each Ray Train worker, which has joined the process group already."""
    import ray.train
    import torch

    from ali_dist import dist
    from ali_dist.worker import device_for_this_rank, train_rank

    recipe, job = Recipe.from_json(config["recipe"]), Job(**config["job"])
    run, device, draining = run_folder(recipe, job), device_for_this_rank(config["gpu"]), []
    if not run.bucket:
        # A folder that is not there is not begun anew: the storage may be away, or not be mounted on this node
        patiently(run.recipe.stat, f"reach the run's folder {run.root}")
    if dist.rank() == 0:
        heed(run)
    # Whether there is a FAILED of the workers before these: going on would be useless
    if dist.from_rank0(float(run.failed.exists()), device):
        return

    due, mine = time.monotonic(), ""
    if dist.rank() == 0 and not run.bucket:
        with suppress(FileNotFoundError):  # only a driver makes it
            mine = run.job.read_text()

    def should_stop() -> bool:
        nonlocal due
        if mine and run.taken_from(mine):
            raise Superseded
        # A barrier of milliseconds, so that all are to ask together, and not after every update
        if dist.from_rank0(float(time.monotonic() >= due), device):
            draining[:] = [ray.train.get_preemption_info()]
            due = time.monotonic() + 1
        return any(draining) or run.asked_to_stop()

    torch.set_num_threads(config["cpus"])  # Ray sets OMP_NUM_THREADS to 1 where no CPUs are asked for
    train_rank(recipe, job, gpu=config["gpu"], should_stop=should_stop)
    again = dist.rank() == 0 and (any(draining) or run.regroup.exists()) and not run.stop.exists()
    again = again and int(run.saved()[-1].name) < recipe.schedule.num_images
    if dist.from_rank0(float(again), device):
        raise Regroup("a node is to leave, or there is room for more workers")


def fit(recipe: Recipe, job: Job, resources: dict[str, int], lookout: Lookout) -> None:
    """Blocks until the workers are done, or have failed too often without a new checkpoint: then that failure."""
    run, left = copy_of(run_folder(recipe, job), "job"), job.max_failures
    while not lookout.over:
        before, ended = run.saved()[-1:], lookout.ended
        try:
            return _fit(recipe, job, resources, run)
        except Exception:
            if lookout.over:
                return
            bring_up_to_date(run)
            progress = run.saved()[-1:] != before
            left = job.max_failures if progress else left - 1
            # Ray Train has counted the failures itself, but for its own end, which the lookout brings about
            if run.failed.exists() or not (progress or (lookout.ended > ended and left >= 0)):
                raise


def bring_up_to_date(run: RunFolder) -> None:
    """What the workers wrote is here, once their storage can be reached; UserError when it is away for long."""
    patiently(lambda: pull(run, spare=REQUESTS) if run.bucket else run.recipe.stat(), f"read {run}")


def _fit(recipe: Recipe, job: Job, resources: dict[str, int], run: RunFolder) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.config import LoggingConfig

    from ali_dist.interface import OverRaysNetwork, Trainer

    trainer = Trainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.to_json(),
            "job": dataclasses.asdict(job),
            "gpu": "GPU" in resources,
            "cpus": resources["CPU"],
        },
        scaling_config=ScalingConfig(
            num_workers=(job.min_workers, job.num_workers) if job.min_workers else job.num_workers,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=DAY,  # Ray would not have them save first: `Growth` does
        ),
        # Workers wait in a collective for as long as rank 0 saves; those that hang are Ray's and the watchdog's to find
        torch_config=OverRaysNetwork(backend="nccl" if "GPU" in resources else "gloo", timeout_s=DAY),
        run_config=RunConfig(
            name=f"{time.time_ns()}",  # Ray's own state is never resumed: ours is
            storage_path=str(run.ray),
            failure_config=FailureConfig(max_failures=job.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    requester = run.ray / "requester"  # still here after a driver that was killed
    with suppress(FileNotFoundError):
        release(requester.read_text())
    patiently(lambda: run.ray.mkdir(exist_ok=True), f"write to {run}")
    patiently(lambda: requester.write_text(f"train-{trainer.train_run_context.run_id}"), f"write to {run}")
    trainer.fit()


class Follow:
    """Copies what is appended to the run's log to stdout, so that the driver's output is the run's progress."""

    def __init__(self, run: RunFolder) -> None:
        self.path = run.log
        self.offset = self.path.stat().st_size if self.path.exists() else 0

    def __call__(self) -> None:
        with suppress(OSError), open(self.path) as file:  # no line yet, or the storage is away
            file.seek(self.offset)
            sys.stdout.write(file.read())
            sys.stdout.flush()
            self.offset = file.tell()


def supervise(recipe: Recipe, job: Job, resources: dict[str, int], mine: str) -> None:
    """Runs `fit` in a thread and follows the run; SIGTERM and Ctrl-C ask the workers to save and end.

    `mine` is this job's id. UserError when the workers have failed for good, or another job has taken the run over.
    """
    run = copy_of(run_folder(recipe, job), "job")
    follow, export, lookout, failure = Follow(run), Exporter(run), Lookout(run), []
    looks = [export, lookout, *([ClusterView(), Growth(run, job, resources)] if job.min_workers else [])]
    asked = threading.Event()

    def target() -> None:
        try:
            fit(recipe, job, resources, lookout)
        except Exception as error:
            failure.append(error)

    # After ray.init, whose own handlers would end the driver at once; fit leaves signals alone outside the main thread.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())  # no more: the storage may be away
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    with followed(run):
        taken = alone = False
        while thread.is_alive() and not (taken or alone):
            thread.join(0.5)
            follow()
            with suppress(OSError):  # the storage may be away for a while
                if asked.is_set():
                    run.stop.touch()
                    asked.clear()
                    print("stopping: the workers save a checkpoint at the next update", flush=True)
                for look in looks:
                    look()
                taken, alone = run.taken_from(mine), run.stop.exists() and lookout.alone
        if thread.is_alive():
            lookout.end_job()
            thread.join(SECONDS_TO_END)
    if taken:
        raise UserError(f"another job goes on with {run}: this one ends, and has saved nothing since")
    if alone:
        print("there were no workers to stop: the last checkpoint stands", flush=True)
    bring_up_to_date(run)
    with suppress(OSError):
        export()  # that it has ended
    follow()
    shutil.rmtree(run.ray, ignore_errors=True)
    if run.failed.exists():
        raise UserError(f"{run.failed.read_text()}; the last good checkpoint is in {run.shown(run.checkpoints)}")
    if failure:
        message = f"the workers failed more than --max-failures {job.max_failures} times: {failure[0]}"
        fail(run, message)
        raise UserError(message)
    print("stopped" if run.stop.exists() else "finished")
    print(summary(run))


def tell_about_stopping() -> None:
    """Inside a submitted job: Ray kills the driver 3 s after `ray job stop` unless the job was given longer."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) < SECONDS_TO_SAVE:
        print(
            "note: `ray job stop` would kill this job before it has saved; submit with "
            f'--runtime-env-json \'{{"env_vars": {{"RAY_JOB_STOP_WAIT_TIME_S": "{SECONDS_TO_SAVE}"}}}}\'',
            flush=True,
        )


def main() -> None:
    settings = parse("launch", "Trains ALI on a Ray cluster: inside `ray job submit`, or on a Ray of its own.")
    recipe, job = settings.recipe, settings.job
    checked_index(recipe, job)
    run = run_folder(recipe, job)
    if settings.dry_run:
        print(describe_job(recipe, job, run))
        return
    if job.repeats > 1:
        tell_about_stopping()
        run_repeats(recipe, job, wait_for_room)
        return
    mine = start(run, recipe, job.resume)
    os.environ.update(SECONDS | QUIET | {name: os.environ[name] for name in SECONDS if name in os.environ})

    import ray

    start_ray(dashboard=True)
    try:
        tell_about_stopping()
        resources = wait_for_room(job)
        number = f"{job.min_workers} to {job.num_workers}" if job.min_workers else f"{job.num_workers}"
        print(f"run {run}: {number} workers with {resources} each", flush=True)
        print(f"watch it with  tensorboard --logdir '{run.shown(run.tensorboard)}'", flush=True)
        supervise(recipe, job, resources, mine)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    cli.run(main)
