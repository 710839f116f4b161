"""The job: Ray Train workers (Ray actors, DDP) that train one recipe, as a driver for `ray job submit`.

Ray starts, places and restarts the workers. The run's folder is the only state between them: checkpoints there are
found again by every new group of workers, a file STOP there asks them to save and end, a file FAILED says why going
on would be useless.
"""

import dataclasses
import os
import shutil
import signal
import sys
import threading
import time
from typing import Any

from ali_dist import cli
from ali_dist.cluster import start_ray
from ali_dist.prometheus import Exporter
from ali_dist.recipe import Job, Recipe, UserError
from ali_dist.repeats import run_repeats
from ali_dist.run import RunFolder
from ali_dist.settings import checked_index, describe_job, parse, run_folder, summary

SECONDS_TO_SAVE = 60  # that a stopped job needs at most: Ray's own default before SIGKILL is 3
QUIET = {  # Ray prints a line a report and every print twice without these
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def train_worker(config: dict[str, Any]) -> None:
    """Runs inside each Ray Train worker, which has joined the process group already."""
    import torch

    from ali_dist.worker import train_rank

    recipe, job = Recipe.from_json(config["recipe"]), Job(**config["job"])
    run = run_folder(recipe, job)
    if run.failed.exists():  # of the workers before these: going on would be useless
        return
    torch.set_num_threads(config["cpus"])  # Ray sets OMP_NUM_THREADS to 1 where no CPUs are asked for
    train_rank(recipe, job, gpu=config["gpu"])


def fit(recipe: Recipe, job: Job, resources: dict[str, int]) -> None:
    """Blocks until the workers are done."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    run = run_folder(recipe, job)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.to_json(),
            "job": dataclasses.asdict(job),
            "gpu": "GPU" in resources,
            "cpus": resources["CPU"],
        },
        scaling_config=ScalingConfig(
            num_workers=job.num_workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if "GPU" in resources else "gloo", timeout_s=300),
        run_config=RunConfig(
            name=f"{time.time_ns()}",  # Ray's own state is never resumed: ours is
            storage_path=str(run.ray),
            failure_config=FailureConfig(max_failures=job.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    trainer.fit()


def worker_resources(job: Job, cluster: dict[str, float]) -> dict[str, int]:
    """Resources of each worker, given the cluster's."""
    gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 0))
    gpu = {"GPU": 1} if (job.gpu or (job.gpu is None and gpus)) else {}
    return {"CPU": job.cpus_per_worker or max(1, cpus // job.num_workers), **gpu}


def wait_for_room(job: Job) -> dict[str, int]:
    """Each worker's resources, once the cluster is large enough for all; UserError after --wait-seconds.

    An autoscaler, where there is one, is asked for what is missing.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    deadline, told = time.monotonic() + job.wait_seconds, False
    while True:
        cluster = ray.cluster_resources()
        resources = worker_resources(job, cluster)
        short = [
            f"{job.num_workers * need} {kind}s (it has {cluster.get(kind, 0):.0f})"
            for kind, need in resources.items()
            if job.num_workers * need > cluster.get(kind, 0)
        ]
        if not short:
            request_resources(bundles=[])  # or it would keep the nodes after the job
            return resources
        request_resources(bundles=[resources] * job.num_workers)
        message = f"the cluster is too small for --num-workers {job.num_workers}: they need {' and '.join(short)}"
        if time.monotonic() >= deadline:
            request_resources(bundles=[])
            raise UserError(f"{message}: add nodes, ask for fewer --num-workers, or wait longer with --wait-seconds")
        if not told:
            print(f"{message}; waiting up to {job.wait_seconds} s for nodes to join", flush=True)
            told = True
        time.sleep(1)


class Follow:
    """Copies what is appended to the run's log to stdout, so that the driver's output is the run's progress."""

    def __init__(self, run: RunFolder) -> None:
        self.path = run.log
        self.offset = self.path.stat().st_size if self.path.exists() else 0

    def __call__(self) -> None:
        if self.path.exists():
            with open(self.path) as file:
                file.seek(self.offset)
                sys.stdout.write(file.read())
                sys.stdout.flush()
                self.offset = file.tell()


def supervise(recipe: Recipe, job: Job, resources: dict[str, int]) -> None:
    """Runs `fit` in a thread and follows the run; SIGTERM and Ctrl-C ask the workers to save and end."""
    run = run_folder(recipe, job)
    follow, export, failure = Follow(run), Exporter(run), []

    def target() -> None:
        try:
            fit(recipe, job, resources)
        except Exception as error:
            failure.append(error)

    def ask_to_stop(*_: object) -> None:
        run.stop.touch()
        print("stopping: the workers save a checkpoint at the next update", flush=True)

    # After ray.init, whose own handlers would end the driver at once; fit leaves signals alone outside the main thread.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        follow()
        export()
    shutil.rmtree(run.ray, ignore_errors=True)
    if run.failed.exists():
        raise UserError(f"{run.failed.read_text()}; the last good checkpoint is in {run.checkpoints}")
    if failure:
        message = f"the workers failed more than --max-failures {job.max_failures} times: {failure[0]}"
        run.failed.write_text(message)
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
        run_repeats(recipe, job, job.resume)
        return
    run.claim(recipe, job.resume)
    run.stop.unlink(missing_ok=True)
    run.failed.unlink(missing_ok=True)
    os.environ.update(QUIET)

    import ray

    start_ray()
    try:
        tell_about_stopping()
        resources = wait_for_room(job)
        print(f"run {run.root}: {job.num_workers} workers with {resources} each", flush=True)
        print(f"watch it with  tensorboard --logdir '{run.tensorboard}'", flush=True)
        supervise(recipe, job, resources)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    cli.run(main)
