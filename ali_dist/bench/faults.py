"""`bench faults`: what a failure costs a run, each injected for real on a Ray of this machine."""

import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from ali_dist import cli
from ali_dist.bench.about import about, head
from ali_dist.bench.inflict import FAULTS, possible
from ali_dist.bench.job import Job, job_on_two_nodes, suffer
from ali_dist.recipe import UserError


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What each kind of fault costs a run of two workers on this machine: about 25 s each."""

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
        with job_on_two_nodes(cli.data_folder(self.data)) as job:
            for name in possible(job):
                for _ in range(self.repeats if not self.only or name in self.only else 0):
                    time.sleep(random.uniform(0.5, 2.5))  # anywhere between two saves, or inside one
                    found.setdefault(name, []).append(suffer(job, FAULTS[name].inflict, rank0=random.random() < 0.5))
                    print(f"{name}: {found[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
                    restore(job)
            job.stop()
        return found


def restore(job: Job) -> None:
    """Two workers again, and more than the one checkpoint that the next fault may damage."""
    if len(job.nodes.nodes) < 2:
        job.nodes.add()
    job.wait(lambda: job.trains(2) and len(job.run.saved()) > 1)


def table(result: dict[str, Any]) -> str:
    lines = [
        head(result),
        f"{'':16} {'seconds to the next update':>27} {'bar':>5} {'updates repeated':>17} {'lost':>5}",
    ]
    for name, rows in result["faults"].items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        spread = f"{min(row['seconds'] for row in rows):.1f}-{max(row['seconds'] for row in rows):.1f}"
        bar = f"{FAULTS[name].bar:.0f}" if FAULTS[name].bar else "-"
        lines.append(
            f"{name:16} {middle['seconds']:>13.1f} {'(' + spread + ')':>13} {bar:>5} "
            f"{middle['updates_repeated']:>17.0f} {sum(row['images_lost'] for row in rows):>5.0f}"
        )
    return "\n".join(lines)
