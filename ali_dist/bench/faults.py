"""`bench faults`: what a failure costs a run, each injected for real on a Ray of this machine."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ali_dist import cli
from ali_dist.bench.about import about, head
from ali_dist.bench.nodes import Nodes, kill, wait_until
from ali_dist.meter import read_ticks
from ali_dist.recipe import UserError
from ali_dist.run import RunFolder, read_lines

BATCH = 64
SECONDS_TO_RECOVER = 300.0
BARS = {"worker killed": 12.0, "worker hangs": 30.0, "node lost": 35.0}  # seconds to the next update, on 2 cores


class Job:
    """A run of the digits by two workers, on nodes of its own, until it is stopped."""

    def __init__(self, folder: Path, data: str, nodes: Nodes, *flags: Any) -> None:
        self.folder, self.nodes, self.run = folder, nodes, RunFolder(folder / "run")
        self.command = [sys.executable, "-m", "ali_dist.launch", "--dataset", "digits", "--data", data]
        self.command += ["--storage", folder, "--name", "run", "--tick-images", 4 * BATCH, "--save-images", 16 * BATCH]
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


def kill_worker(job: Job, rank0: bool) -> int:
    kill(job.victim(rank0), signal.SIGKILL)
    return 2


def stop_worker(job: Job, rank0: bool) -> int:
    kill(job.victim(rank0), signal.SIGSTOP)
    return 2


def lose_node(job: Job, rank0: bool) -> int:
    job.nodes.remove(job.nodes.workers()[job.victim(rank0)])
    return 1


FAULTS = {"worker killed": kill_worker, "worker hangs": stop_worker, "node lost": lose_node}


def suffer(job: Job, fault: Callable[[Job, bool], int], rank0: bool) -> dict[str, float]:
    """Injects a fault into a job that trains, and waits until it goes on."""
    saved, at, begin = int(job.run.saved()[-1].name), job.ticks()[-1]["num_images"], time.time()
    workers = fault(job, rank0)
    job.wait(lambda: job.trains(workers, begin))
    (start,) = [line for line in job.starts() if line["time"] > begin][-1:]
    tick = next(tick for tick in job.ticks() if tick["time"] > start["time"])
    return {
        "seconds": tick["time"] - begin,
        "updates_repeated": max(0, at - start["num_images"]) / BATCH,
        "images_lost": max(0, saved - start["num_images"]),
    }


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Seconds that a killed worker, a hanging one and a lost node cost a run of two workers on this machine."""

    data: str = ""
    """Folder of prepared shards, with the digits; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    repeats: int = 10
    """Times that each fault is injected; medians are shown."""
    only: tuple[str, ...] = ()
    """Some of the faults; default: all."""
    json: bool = False
    """Print JSON alone."""

    def run(self) -> None:
        if self.repeats < 1:
            raise UserError(f"--repeats must be positive, not {self.repeats}")
        for name in self.only:
            if name not in FAULTS:
                raise cli.did_you_mean("fault", name, FAULTS)
        result = about(torch.device("cpu")) | {"faults": self.measure()}
        print(json.dumps(result, indent=1) if self.json else table(result))

    def measure(self) -> dict[str, list[dict[str, float]]]:
        found: dict[str, list[dict[str, float]]] = {}
        with tempfile.TemporaryDirectory(prefix="ali_dist-faults-") as folder:
            nodes = Nodes(Path(folder), 2)
            try:
                flags = ["--num-workers", "1:2", "--num-images", 10**9, "--max-failures", 1000]
                job = Job(Path(folder), str(cli.data_folder(self.data)), nodes, *flags)
                job.wait(lambda: job.trains(2) and bool(job.run.saved()))
                for name, fault in FAULTS.items():
                    for _ in range(self.repeats if not self.only or name in self.only else 0):
                        time.sleep(random.uniform(0.5, 2.5))  # anywhere between two saves, or inside one
                        found.setdefault(name, []).append(suffer(job, fault, rank0=random.random() < 0.5))
                        print(f"{name}: {found[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
                        if len(nodes.nodes) < 2:
                            nodes.add()
                        job.wait(lambda: job.trains(2))
                job.stop()
            finally:
                nodes.close()
        return found


def table(result: dict[str, Any]) -> str:
    lines = [
        head(result),
        f"{'':16} {'seconds to the next update':>27} {'bar':>5} {'updates repeated':>17} {'lost':>5}",
    ]
    for name, rows in result["faults"].items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        spread = f"{min(row['seconds'] for row in rows):.1f}-{max(row['seconds'] for row in rows):.1f}"
        bar = f"{BARS[name]:.0f}" if name in BARS else "-"
        lines.append(
            f"{name:16} {middle['seconds']:>13.1f} {'(' + spread + ')':>13} {bar:>5} "
            f"{middle['updates_repeated']:>17.0f} {sum(row['images_lost'] for row in rows):>5.0f}"
        )
    return "\n".join(lines)
