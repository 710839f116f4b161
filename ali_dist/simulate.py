"""python -m ali_dist.simulate: what a run would do on more workers than there are, from stated assumptions.

The share of each worker comes from the stream's own rule, the bytes from the networks' tables; collectives are
costed as rings and trees, failures are drawn. It is a model: nothing here was measured but what its flags are given.
"""

import json
import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import tyro

from ali_dist import cli
from ali_dist.checkpoint import HOURS_BETWEEN_FAILURES, LONGEST_INTERVAL, best_interval
from ali_dist.describe import describe
from ali_dist.recipe import UserError, flag
from ali_dist.recipes import RECIPES
from ali_dist.tables import NETWORKS, Networks

FLOAT = 4  # bytes
STATES = 4  # numbers kept a parameter: the weight, its average, Adam's two moments


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Simulates a run: order of data, collectives, checkpoints, failures. Every flag but the first two is assumed."""

    dataset: str
    """Data set, for its networks and images."""
    images_per_s: float
    """Measured images a second of one worker alone, at its share of the batch."""
    workers: tuple[int, ...] = (8, 64, 512, 4096)
    """Numbers of workers to simulate."""
    batch_per_worker: int = 16
    """Images of an update a worker; the global batch grows with the workers."""
    lanes_per_worker: int = 3
    """Data streams a worker."""
    workers_per_host: int = 8
    """Workers that share a host's network interface."""
    local_gbit: float = 1600.0
    """Gbit a second between workers of one host, each way."""
    network_gbit: float = 400.0
    """Gbit a second between hosts, each way, of a host."""
    latency_us: float = 10.0
    """Microseconds a message between two workers takes at least."""
    overlap: float = 0.5
    """Share of the gradients' exchange that is hidden behind the backward pass."""
    read_gbyte: float = 10.0
    """Gbyte a second that the storage gives to all together."""
    write_gbyte: float = 1.0
    """Gbyte a second that one worker writes a checkpoint with."""
    hours_between_failures: float = HOURS_BETWEEN_FAILURES
    """Of one worker; default: of 16,384 GPUs in arXiv:2407.21783, table 5."""
    restart_seconds: float = 60.0
    """From a failure until the checkpoint is read."""
    hours: float = 168.0
    """Hours to simulate."""
    trials: int = 200
    """Times that failures are drawn; the means are printed."""
    seed: int = 0
    """Seed of the failures."""
    json: bool = False
    """Print JSON instead of a table."""


def check(assumed: Assumptions) -> Networks:
    """The networks; UserError when a flag makes no sense."""
    if assumed.dataset not in RECIPES:
        raise cli.did_you_mean("data set", assumed.dataset, RECIPES)
    for name, value in asdict(assumed).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name in ("dataset", "json", "overlap", "seed"):
            continue
        if not numbers or not all(math.isfinite(number) and number > 0 for number in numbers):
            raise UserError(f"{flag(name)} must be positive, not {' '.join(map(str, numbers)) or 'empty'}")
    if not 0 <= assumed.overlap <= 1:
        raise UserError(f"--overlap must lie between 0 and 1, not {assumed.overlap}")
    return NETWORKS[RECIPES[assumed.dataset].networks]


def busiest_share(batch: int, lanes: int, workers: int) -> int:
    """Most images that a worker has of any batch: the others wait for it.

    The stream deals image i of the endless sequence to lane i mod `lanes`, and lane k to worker k mod `workers`.
    """
    period = math.lcm(lanes, batch) // batch
    most = 0
    for start in range(min(period, lanes)):
        first = start * batch % lanes
        whole, rest = divmod(batch, lanes)
        counts = [whole * len(range(rank, lanes, workers)) for rank in range(workers)]
        for i in range(first, first + rest):
            counts[i % lanes % workers] += 1
        most = max(most, *counts)
    return most


def bandwidth(assumed: Assumptions, workers: int) -> float:
    """Bytes a second through a ring's slowest link."""
    hosts = math.ceil(workers / assumed.workers_per_host)
    return 1e9 / 8 * (assumed.local_gbit if hosts == 1 else min(assumed.local_gbit, assumed.network_gbit))


def all_reduce(assumed: Assumptions, workers: int, size: float) -> float:
    """Seconds, by a ring or a tree, whichever is faster."""
    if workers == 1:
        return 0.0
    latency, speed = assumed.latency_us / 1e6, bandwidth(assumed, workers)
    ring = 2 * (workers - 1) * (size / workers / speed + latency)
    tree = 2 * (size / speed + math.ceil(math.log2(workers)) * latency)
    return min(ring, tree)


def all_gather(assumed: Assumptions, workers: int, size: float) -> float:
    """Seconds until all have every worker's `size` bytes, by a ring."""
    return (workers - 1) * (size / bandwidth(assumed, workers) + assumed.latency_us / 1e6)


def update_seconds(assumed: Assumptions, nets: Networks, workers: int) -> dict[str, float]:
    """What one update takes: computing, gradients that nothing hides, batch norm, and waiting for data."""
    batch = assumed.batch_per_worker * workers
    share = busiest_share(batch, assumed.lanes_per_worker * workers, workers)
    compute = share / assumed.images_per_s
    gradients = all_reduce(assumed, workers, FLOAT * describe(nets)["parameters"])
    # Forward, each batch norm gathers every worker's mean, variance and count; backward, two sums a channel
    maps = [row.maps for _, rows in nets.parts().values() for row in rows if row.bn]
    norms = sum(2 * all_gather(assumed, workers, FLOAT * (2 * count + 1)) for count in maps)
    read = batch * math.prod(nets.image) / (1e9 * assumed.read_gbyte)
    busy = compute + (1 - assumed.overlap) * gradients + norms
    return {
        "compute": compute,
        "gradients": (1 - assumed.overlap) * gradients,
        "batch_norm": norms,
        "data_wait": max(0.0, read - busy),
    }


def live(interval: float, save: float, failures: float, restart: float, seconds: float, rng: random.Random) -> dict:
    """A run of `seconds` that saves each `interval` of work: seconds of kept and of lost work, and restarts."""
    kept = lost = now = 0.0
    restarts, failure = 0, rng.expovariate(1 / failures)
    while now < seconds:
        end = now + interval + save
        if failure >= end:
            kept, now = kept + interval, end
            continue
        lost += min(failure - now, interval)
        restarts += 1
        now = failure
        while True:  # a restart may fail too
            failure = now + rng.expovariate(1 / failures)
            if failure >= now + restart:
                now += restart
                break
            restarts, now = restarts + 1, failure
    return {"kept": kept / now, "lost_seconds": lost / now * seconds, "restarts": restarts / now * seconds}


def simulate(assumed: Assumptions, workers: int) -> dict[str, Any]:
    """All that is known of a run on so many workers; efficiency is its speed over that of lone workers."""
    nets = check(assumed)
    parts = update_seconds(assumed, nets, workers)
    batch, seconds = assumed.batch_per_worker * workers, sum(parts.values())
    checkpoint = STATES * FLOAT * describe(nets)["parameters"]
    save = checkpoint / (1e9 * assumed.write_gbyte)
    restart = assumed.restart_seconds + workers * checkpoint / (1e9 * assumed.read_gbyte)
    failures = 3600 * assumed.hours_between_failures / workers
    best = best_interval(save, failures)
    interval = max(min(best, LONGEST_INTERVAL), seconds)
    rng = random.Random(f"{assumed.seed}/{workers}")
    lives = [live(interval, save, failures, restart, 3600 * assumed.hours, rng) for _ in range(assumed.trials)]
    mean = {name: sum(life[name] for life in lives) / len(lives) for name in lives[0]}
    while_working = batch / seconds
    return {
        "workers": workers,
        "batch": batch,
        "update_ms": {name: 1000 * value for name, value in parts.items()},
        "images_per_s_while_working": while_working,
        "images_per_s": while_working * mean["kept"],
        "efficiency": while_working * mean["kept"] / (workers * assumed.images_per_s),
        "checkpoint_bytes": checkpoint,
        "save_seconds": save,
        "daly_interval_s": best,
        "interval_s": interval,
        "interval_images": round(interval * while_working),
        "restarts": mean["restarts"],
        "lost_images": mean["lost_seconds"] * while_working,
    }


def as_text(assumed: Assumptions, rows: list[dict[str, Any]]) -> str:
    fields = {name: value for name, value in asdict(assumed).items() if name not in ("json", "workers")}
    lines = ["assumed: " + ", ".join(f"{name} {value}" for name, value in fields.items()), ""]
    columns = "{:>7} {:>8} {:>10} {:>8} {:>8} {:>8} {:>8} {:>10} {:>10} {:>9} {:>12}"
    names = ["workers", "batch", "images/s", "effic.", "compute", "grads", "BN", "data wait", "save each", "restarts"]
    lines.append(columns.format(*names, "images lost"))
    for row in rows:
        ms = row["update_ms"]
        lines.append(
            columns.format(
                f"{row['workers']:,}",
                f"{row['batch']:,}",
                f"{row['images_per_s']:,.0f}",
                f"{100 * row['efficiency']:.1f} %",
                *(f"{ms[name]:.2f}" for name in ("compute", "gradients", "batch_norm")),
                f"{ms['data_wait']:.2f}",
                f"{row['interval_s']:,.0f} s",
                f"{row['restarts']:.2f}",
                f"{row['lost_images']:,.0f}",
            )
        )
    lines.append(f"compute to data wait: ms an update; restarts and images lost: in {assumed.hours:g} hours")
    return "\n".join(lines)


def main() -> None:
    assumed = tyro.cli(Assumptions, prog="python -m ali_dist.simulate")
    check(assumed)
    rows = [simulate(assumed, workers) for workers in assumed.workers]
    tree = {"assumptions": asdict(assumed), "simulated": rows}
    print(json.dumps(tree, indent=2) if assumed.json else as_text(assumed, rows))


if __name__ == "__main__":
    cli.run(main)
