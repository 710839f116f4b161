"""The faults that `bench faults` and `bench soak` inflict on a job, one row each."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

from ali_dist.bench.job import SAVE_IMAGES, Job
from ali_dist.bench.nodes import kill, wait_until
from ali_dist.recipe import UserError
from ali_dist.run import read_lines


def kill_worker(job: Job, rank0: bool) -> int:
    kill(job.victim(rank0), signal.SIGKILL)
    return 2


def kill_in_save(job: Job, rank0: bool) -> int:
    victim = job.victim(True)
    wait_until(lambda: any(job.run.checkpoints.glob(".*.partial")), 60)
    kill(victim, signal.SIGKILL)
    return 2


def stop_worker(job: Job, rank0: bool) -> int:
    kill(job.victim(rank0), signal.SIGSTOP)
    return 2


def lose_node(job: Job, rank0: bool) -> int:
    job.nodes.remove(job.nodes.workers()[job.victim(rank0)])
    return 1


def drain_node(job: Job, rank0: bool) -> int:
    node = job.nodes.workers()[job.victim(rank0)]
    job.nodes.drain(node, 15)
    job.wait(lambda: read_lines(job.run.events)[-1]["event"] == "end")
    job.nodes.remove(node)
    return 1


def kill_driver(job: Job, rank0: bool) -> int:
    kill(job.driver.pid, signal.SIGKILL)
    job.driver.wait()
    job.start()
    return 2


def take_storage(job: Job, rank0: bool) -> int:
    """For two seconds. A worker dies: rank 0 before, so that the next ones find none, or another afterwards."""
    first = job.victim(True)
    with away(job.run.root):
        if rank0:
            kill(first, signal.SIGKILL)
        time.sleep(2)
        if job.run.root.exists():
            raise UserError("a run was begun anew where its storage was away")
    if not rank0:
        kill_worker(job, False)
    return 2


def take_data(job: Job, rank0: bool) -> int:
    """For as long as it takes the next workers to look for it."""
    with away(job.data):
        kill_worker(job, rank0)
        time.sleep(10)
    return 2


def fill_disk(job: Job, rank0: bool) -> int | None:
    """Until a save and a status line have failed; rank 0 dies meanwhile, or no one."""
    ballast = job.storage / "ballast"
    try:
        with open(ballast, "wb", buffering=0) as file:
            for block in (2**20, 1):
                while write(file, block):
                    pass
        time.sleep(4)
        if rank0:
            kill_worker(job, True)
            time.sleep(8)
    finally:
        ballast.unlink()
    return 2 if rank0 else None


def write(file: RawIOBase, size: int) -> bool:
    try:
        return file.write(bytes(size)) == size
    except OSError:
        return False


def damage_checkpoint(job: Job, rank0: bool) -> int:
    """A byte of the newest one changes, then a worker dies."""
    with open(job.run.saved()[-1] / "model.safetensors", "r+b") as file:
        middle = file.seek(0, os.SEEK_END) // 2
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 255]))
    return kill_worker(job, rank0)


@contextmanager
def away(folder: Path) -> Iterator[None]:
    elsewhere = folder.with_name(f"{folder.name}-away")
    os.rename(folder, elsewhere)
    try:
        yield
    finally:
        os.rename(elsewhere, folder)


@dataclass(frozen=True)
class Fault:
    """How it is inflicted (`bench.job.suffer`), the seconds to the next update that are the aim on 2 cores."""

    inflict: Callable[[Job, bool], int | None]
    bar: float | None = None
    images_lost: int = 0


FAULTS = {
    "worker killed": Fault(kill_worker, bar=12),
    "killed in a save": Fault(kill_in_save),
    "worker hangs": Fault(stop_worker, bar=30),
    "node lost": Fault(lose_node, bar=35),
    "node drained": Fault(drain_node),
    "driver killed": Fault(kill_driver),
    "storage away": Fault(take_storage),
    "data away": Fault(take_data),
    "disk full": Fault(fill_disk),
    "checkpoint bad": Fault(damage_checkpoint, images_lost=SAVE_IMAGES),
}


def possible(job: Job) -> list[str]:
    """Names of the faults that can be inflicted here: a full disk needs one of its own."""
    return [name for name in FAULTS if name != "disk full" or job.storage.is_mount()]
