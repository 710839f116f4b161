"""What one rank runs. As a command: one rank without Ray, or one of several under torchrun."""

import ctypes
import dataclasses
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from ali_dist import checkpoint, cli, dist
from ali_dist.data.index import Index
from ali_dist.data.labelled import SemiSupervised, draw
from ali_dist.data.stream import Stream
from ali_dist.finite import NonFinite
from ali_dist.levers import FAST, PLAIN
from ali_dist.loop import OnTick, log_to, train
from ali_dist.mirror import Mirror
from ali_dist.patience import patiently
from ali_dist.recipe import Job, Recipe, UserError
from ali_dist.remote import fail, start
from ali_dist.run import RunFolder, Superseded, read_lines, skipped_batches, write_json
from ali_dist.settings import checked_index, describe_job, parse, run_folder, summary
from ali_dist.state import TrainState

log = logging.getLogger(__name__)

MOST_ROLLBACKS = 10  # in a run: more than these are no accidents


def train_rank(
    recipe: Recipe,
    job: Job,
    *,
    gpu: bool,
    should_stop: Callable[[], bool] | None = None,
    on_tick: OnTick = lambda num_images, scalars: None,
) -> Path | None:
    """Trains this rank's part of the run to its end or a stop; returns the last checkpoint on rank 0.

    The process group, if there is one, is already joined. A run folder that holds checkpoints is continued from the
    newest whole one. `should_stop` is asked on every rank, and rank 0's answer counts: by default, whether the run's
    folder asks to stop. UserError and NonFinite, which no restart mends, are told in the run's FAILED file too.
    """
    keep_freed_memory()
    run, device = run_folder(recipe, job), device_for_this_rank(gpu)
    mirrored = run.bucket and dist.rank() == 0
    with Mirror(run, recipe.schedule.keep) if mirrored else nullcontext():
        try:
            index = checked_index(recipe, job, patient=True)  # the command that began the job has seen it
            if dist.rank() == 0:
                patiently(lambda: run.make(recipe), f"write to {run.root}")
            patiently(lambda: log_to(run.log if dist.rank() == 0 else None), f"write to {run.log}")
            while True:
                try:
                    return _train_rank(recipe, job, run, index, device, should_stop or run.asked_to_stop, on_tick)
                except NonFinite as error:
                    roll_back(job, run, error, device)
        except (UserError, NonFinite) as error:
            fail(run, str(error))
            raise


def _train_rank(
    recipe: Recipe,
    job: Job,
    run: RunFolder,
    index: Index,
    device: torch.device,
    should_stop: Callable[[], bool],
    on_tick: OnTick,
) -> Path | None:
    levers = dataclasses.replace(FAST if job.fast else PLAIN, bf16_gradients=job.bf16_gradients)
    state = TrainState(recipe, index.mean_image, device, job.impl, levers)
    resume(run, state)
    if dist.rank() == 0 and device.type == "cuda" and state.levers.graph and not state.static:
        log.warning(f"updates are not one CUDA graph and so slower ({state.why_not_static})")
    if dist.rank() == 0:
        run.record("start", state.num_images, workers=dist.world_size())
    skip = batches_to_skip(run, device)
    with open_stream(index, recipe, run, state.num_images, pin=device.type == "cuda") as stream:
        return train(state, stream, index, run, should_stop=should_stop, on_tick=on_tick, skip=skip)


def roll_back(job: Job, run: RunFolder, error: NonFinite, device: torch.device) -> None:
    """Notes, on rank 0, which batch to leave out from now on; raises the error again when that is not wanted."""
    if job.on_nonfinite == "stop":
        raise error
    done = len(batches_to_skip(run, device))
    if done >= MOST_ROLLBACKS:
        raise UserError(f"{error}, after {done} rollbacks: try a smaller --lr, or --precision fp32") from error
    if dist.rank() == 0:
        saved = int(run.saved()[-1].name) if run.saved() else 0
        log.warning(f"{error}: back to {saved:,} images, its batch is left out (rollback {done + 1})")
        run.record("rollback", saved, skipped=error.num_images, why=str(error))


def batches_to_skip(run: RunFolder, device: torch.device) -> frozenset[int]:
    """Images before each batch that rollbacks leave out, as rank 0 knows them."""
    known = skipped_batches(read_lines(run.events)) if dist.rank() == 0 else []
    padded = [*known, *[-1] * MOST_ROLLBACKS][:MOST_ROLLBACKS]
    return frozenset(int(dist.from_rank0(begin, device)) for begin in padded) - {-1}


def open_stream(index: Index, recipe: Recipe, run: RunFolder, num_images: int, pin: bool) -> Stream | SemiSupervised:
    """This rank's batches from here on; of a semi-supervised recipe the labelled images' draw is kept in labels.json.

    UserError when a run that goes on has been given labels of other images.
    """
    place, seed = {"rank": dist.rank(), "world": dist.world_size(), "pin": pin}, recipe.seed
    unlabelled, stream = recipe.streamed, None
    labelled = recipe.micro_batch - unlabelled
    drawn = draw(index, recipe.train_split, recipe.semi.labels, seed) if labelled else None
    if drawn and dist.rank() == 0:
        record = {"dataset": index.name, "split": recipe.train_split, "seed": seed, **drawn.to_json()}
        keep_labels(run.labels, record)
    if unlabelled:
        order = {"lanes": recipe.lanes, "micro_batch": unlabelled}
        start = num_images // recipe.micro_batch * unlabelled
        stream = Stream(index, recipe.train_split, seed=seed, num_images=start, **order, **place)
    if not drawn:
        return stream
    order = {"micro_batch": recipe.micro_batch, "labelled": labelled}
    return SemiSupervised(stream, drawn, seed=seed, num_images=num_images, **order, **place)


def keep_labels(path: Path, record: dict[str, Any]) -> None:
    """Writes which images are labelled, or checks that they are the same as before."""
    try:
        before = json.loads(path.read_text()) if path.exists() else record
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, if the data set is the same as before") from error
    if before != record:
        raise UserError(f"{path} names other images than the data set would give now: choose another --name")
    write_json(path, record)


def keep_freed_memory() -> None:
    """Tells glibc's allocator, where there is one, to keep what a step frees for the next.

    It would hand tensors of megabytes back to the kernel each time, and a fifth of a CPU step would be page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**26)):  # mmap threshold, trim threshold, top pad
            mallopt(option, value)


def device_for_this_rank(gpu: bool) -> torch.device:
    """CUDA device LOCAL_RANK (of torchrun or Ray Train), made current, or the CPU."""
    if not gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1))
    torch.cuda.set_device(device)
    return device


def under_torchrun(job: Job) -> Job:
    """The job with torchrun's number of workers; UserError when the flag says another."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if job.min_workers:
        raise UserError("--min-workers is for jobs on Ray: use ali_dist.launch")
    if job.num_workers not in (1, world):
        raise UserError(
            f"--num-workers {job.num_workers}, but {world} process(es): start it with "
            f"`torchrun --nproc-per-node {job.num_workers} -m ali_dist.worker …`, or use ali_dist.launch"
        )
    return dataclasses.replace(job, num_workers=world)


def resume(run: RunFolder, state: TrainState) -> None:
    """Loads the newest whole checkpoint, the same on every rank."""
    newest = -1
    if dist.rank() == 0:
        path, complaints = patiently(lambda: find(run), f"read {run.checkpoints}")
        for line in complaints:
            log.warning(line)
            run.record("damaged", int(path.name) if path else 0, why=line)
        newest = int(path.name) if path else -1
    newest = int(dist.from_rank0(newest, state.device))
    if newest < 0:
        return
    if dist.rank() == 0 or not run.bucket:
        checkpoint.load(run.checkpoints / f"{newest:012d}", state)
    if run.bucket:  # other hosts have no copy
        tensors = dist.tensors_from_rank0(state.tensors(), state.device)
        if dist.rank() > 0:
            state.load_tensors(tensors)
            state.num_images = newest
    if dist.rank() == 0:
        log.info(f"continuing at {newest:,} images")


def find(run: RunFolder) -> tuple[Path | None, list[str]]:
    """Like `checkpoint.newest_whole`, but of a storage that is out of reach it is no answer that there is none."""
    found = checkpoint.newest_whole(run)
    run.checkpoints.stat()
    return found


def stop_asked(run: RunFolder, asked: threading.Event, mine: str) -> bool:
    """Whether this process or the run's folder is asked to stop; the folder is told of the one, as rank 0 decides.

    Superseded, on the rank that has the job's id, when another has begun.
    """
    if mine and run.taken_from(mine):
        raise Superseded
    if asked.is_set():
        with suppress(OSError):  # told at the next look, or by rank 0 having been asked itself
            run.stop.touch()
    return asked.is_set() or run.asked_to_stop()


def main() -> None:
    settings = parse("worker", "Trains with one process, or as one rank under torchrun; no Ray.")
    recipe = settings.recipe
    if settings.job.repeats > 1:
        raise UserError("--repeats are parallel jobs on Ray: use ali_dist.launch")
    checked_index(recipe, settings.job)
    job = under_torchrun(settings.job)
    gpu = torch.cuda.is_available() if job.gpu is None else job.gpu
    if gpu and not torch.cuda.is_available():
        raise UserError("--gpu was given, but PyTorch sees no CUDA device here")
    checked_index(recipe, job)
    run = run_folder(recipe, job)
    if settings.dry_run:
        print(describe_job(recipe, job, run))
        return
    if job.num_workers > 1:
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    rank0, mine = dist.rank() == 0, ""
    if rank0:
        mine = start(run, recipe, job.resume)
    dist.barrier()
    if run.bucket:
        run.root.mkdir(parents=True, exist_ok=True)  # where STOP is left
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())  # no more: the storage may be away
    try:
        train_rank(recipe, job, gpu=gpu, should_stop=lambda: stop_asked(run, asked, mine))
    except Superseded as error:
        raise UserError(f"another process goes on with {run}: this one ends, and has saved nothing since") from error
    except NonFinite as error:
        raise UserError(f"stopped: {error}; the last good checkpoint is in {run.shown(run.checkpoints)}") from error
    finally:
        dist.leave()
    if rank0:
        print(summary(run))


if __name__ == "__main__":
    cli.run(main)
