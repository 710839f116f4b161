"""`bench soak`: many random faults in one run; nothing may be lost, and nothing be left behind."""

import json
import random
import subprocess
import time
from dataclasses import dataclass
from typing import Any

import torch

from ali_dist import checkpoint, cli
from ali_dist.bench import faults
from ali_dist.bench.about import about
from ali_dist.bench.inflict import FAULTS, possible
from ali_dist.bench.job import Job, job_on_two_nodes, suffer
from ali_dist.bench.nodes import Nodes, processes, wait_until
from ali_dist.recipe import UserError
from ali_dist.run import read_lines

SETTLED = 120.0  # seconds in which Ray may clean up
GROWTH = 0.25  # share by which the memory of what lives on may grow


class Broken(UserError):
    """Something was lost or left behind."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Random faults, one after the other, in one run of two workers on this machine: hours of it."""

    data: str = ""
    """Folder of prepared shards, with the digits; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    faults: int = 100
    """Number of faults."""
    seed: int = 0
    """Seed of their choice."""

    def run(self) -> None:
        if self.faults < 1:
            raise UserError(f"--faults must be positive, not {self.faults}")
        dice, memory = random.Random(self.seed), []
        found: dict[str, list[dict[str, float]]] = {}
        with job_on_two_nodes(cli.data_folder(self.data)) as job:
            names = possible(job)
            print(f"faults: {', '.join(names)}", flush=True)
            for number in range(self.faults):
                time.sleep(dice.uniform(0.5, 3))
                name, rank0 = dice.choice(names), dice.random() < 0.5
                print(f"{number + 1:>4} {name:16} rank0={rank0!s:5}", end=" ", flush=True)
                cost = suffer(job, FAULTS[name].inflict, rank0)
                print(json.dumps(cost), flush=True)
                found.setdefault(name, []).append(cost)
                if cost["images_lost"] > FAULTS[name].images_lost:
                    raise Broken(f"{name}: {cost['images_lost']:,.0f} images are lost that had been saved")
                faults.restore(job)
                memory.append(job.nodes.memory())
            job.stop()
            check_ends(job, memory)
        print(faults.table(about(torch.device("cpu")) | {"faults": found}))
        print(f"{self.faults} faults: nothing lost, nothing left behind")


def check_ends(job: Job, memory: list[int]) -> None:
    """Broken when processes, actors, placement groups, files or memory are left behind."""
    wait_until(lambda: not job.nodes.workers() and not processes(job.driver.pid), SETTLED)
    for kind in ("actors", "placement-groups"):
        wait_until(lambda: not alive(job.nodes, kind), SETTLED)  # noqa: B023, called here
    for path in job.run.saved():
        checkpoint.verify(path)
    stray = [path for path in [*job.run.root.glob(".*"), *job.run.checkpoints.glob(".*")] if path.exists()]
    if stray or len(job.run.saved()) > 3:
        raise Broken(f"files are left: {stray or job.run.saved()}")
    numbers = [tick["num_images"] for tick in job.ticks()]
    if numbers != sorted(set(numbers)) or read_lines(job.run.events)[-1]["event"] != "end":
        raise Broken("the ticks are not one row to the end")
    early, late = memory[len(memory) // 10], memory[-1]
    print(f"memory of Ray's head: {early / 2**20:,.0f} MiB early, {late / 2**20:,.0f} MiB late", flush=True)
    if late > (1 + GROWTH) * early:
        raise Broken("memory has grown")


def alive(nodes: Nodes, kind: str) -> list[dict[str, Any]]:
    """The job's actors or placement groups that have not ended; Ray's own coordinator stays."""
    command = ["ray", "list", kind, "--format=json", "--limit=10000", f"--address={nodes.environment['RAY_ADDRESS']}"]
    done = subprocess.run(command, env=nodes.environment, capture_output=True, text=True, check=True)
    return [
        row
        for row in json.loads(done.stdout or "[]")
        if row["state"] not in ("DEAD", "REMOVED") and "AutoscalingCoordinator" not in str(row.get("class_name"))
    ]
