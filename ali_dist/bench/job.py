"""A job of the digits on a Ray of this machine, on which the benches inflict faults."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ali_dist.bench.nodes import Nodes, wait_until
from ali_dist.meter import read_ticks
from ali_dist.recipe import UserError
from ali_dist.run import RunFolder, read_lines

BATCH = 64
SAVE_IMAGES = 16 * BATCH
SECONDS_TO_RECOVER = 300.0


class Job:
    """A run of the digits by two workers, on nodes of its own, until it is stopped."""

    program: tuple[str, ...] = ("-m", "ali_dist.launch")

    def __init__(self, folder: Path, data: Path, nodes: Nodes, *flags: Any) -> None:
        self.folder, self.nodes, self.storage, self.data = folder, nodes, folder / "store", data
        self.run = RunFolder(self.storage / "run")
        self.command = [sys.executable, *self.program, "--dataset", "digits", "--data", data]
        self.command += [
            "--storage",
            self.storage,
            "--name",
            "run",
            "--tick-images",
            4 * BATCH,
            "--save-images",
            SAVE_IMAGES,
        ]
        self.command += ["--sample-images", 10**9, "--validate-images", 10**9, "--cpus-per-worker", 1, *flags]
        self.start()

    def start(self) -> None:
        with open(self.folder / "job.log", "a") as log:
            self.driver = subprocess.Popen(
                [*self.nodes.on_head, *map(str, self.command)],
                env=self.nodes.environment,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
            self.nodes.watch(self.driver)

    def wait(self, condition: Callable[[], bool]) -> None:
        try:
            wait_until(condition, SECONDS_TO_RECOVER, lambda: self.driver.poll() is None)
        except TimeoutError as error:
            last = "\n".join((self.folder / "job.log").read_text().splitlines()[-40:])
            raise TimeoutError(f"{error}; the job's last words, exit code {self.driver.poll()}:\n{last}") from None

    def starts(self) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.run.events) if line.get("event") == "start"]

    def ticks(self) -> list[dict[str, Any]]:
        return read_ticks(self.run.ticks)

    def trains(self, workers: int, since: float = 0.0) -> bool:
        """Whether as many workers as this, or more, have begun after a time and made updates."""
        starts, ticks = self.starts(), self.ticks()
        begun = bool(starts) and starts[-1]["workers"] >= workers and starts[-1]["time"] > since
        return begun and bool(ticks) and ticks[-1]["time"] > starts[-1]["time"]

    def victim(self, rank0: bool) -> int:
        """Process id of rank 0's worker, or of another."""
        log = self.run.log.resolve()
        for pid in self.nodes.workers():
            files = {os.path.realpath(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
            if (str(log) in files) == rank0:
                return pid
        raise UserError("the run has no such worker")

    def stop(self) -> None:
        self.driver.send_signal(signal.SIGTERM)
        self.driver.wait(SECONDS_TO_RECOVER)


def suffer(job: Job, inflict: Callable[[Job, bool], int | None], rank0: bool) -> dict[str, float]:
    """Inflicts a fault on a job that trains, on rank 0 or another, and waits until it goes on.

    `inflict` returns how many workers start again, or None when those that run go on.
    """
    saved, at, begin = int(job.run.saved()[-1].name), job.ticks()[-1]["num_images"], time.time()
    workers, mended = inflict(job, rank0), time.time()
    job.wait(lambda: job.ticks()[-1]["time"] > mended if workers is None else job.trains(workers, begin))
    starts = [line for line in job.starts() if line["time"] > begin] if workers else []
    first = starts[-1]["num_images"] if starts else at
    since = starts[-1]["time"] if starts else mended
    return {
        "seconds": next(tick["time"] for tick in job.ticks() if tick["time"] > since) - begin,
        "updates_repeated": max(0, at - first) / BATCH,
        "images_lost": max(0, saved - first),
    }


@contextmanager
def job_on_two_nodes(data: Path | str) -> Iterator[Job]:
    """An elastic job that trains on both, with its own copy of the data, and its storage on a disk of its own where one
    can be mounted. After a failure its folder is kept and named, and Ray's logs are."""
    if not (Path(data) / "digits").is_dir():
        raise UserError(f"{data} has no prepared digits: run python -m ali_dist.prepare --dataset digits --data {data}")
    folder, whole = Path(tempfile.mkdtemp(prefix="ali_dist-faults-")), False
    shutil.copytree(Path(data) / "digits", folder / "data" / "digits")
    store = folder / "store"
    store.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", store]
    mounted = shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode
    try:
        nodes = Nodes(folder, 2)
        try:
            # So many without a new checkpoint, as they may come faster than those
            flags = ["--num-workers", "1:2", "--num-images", 10**9, "--max-failures", 20]
            job = Job(folder, folder / "data", nodes, *flags)
            job.wait(lambda: job.trains(2) and bool(job.run.saved()))
            yield job
            whole = True
        finally:
            nodes.close(keep=not whole)
            if not whole:
                shutil.copytree(store, folder / "kept")
                print(
                    f"\nthe job's log and run, and where Ray's logs are (nodes.log), are in {folder}", file=sys.stderr
                )
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", store], check=True)
    shutil.rmtree(folder)
