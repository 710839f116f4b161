"""Weak scaling on this machine, what each part of it costs, and what follows from the parts for more workers."""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ali_dist import cli
from ali_dist.bench.about import about, head
from ali_dist.bench.step import random_batch
from ali_dist.data.stream import Batch
from ali_dist.describe import describe
from ali_dist.levers import FAST
from ali_dist.recipe import Recipe, UserError
from ali_dist.recipes import RECIPES
from ali_dist.simulate import FLOAT, Assumptions, update_seconds
from ali_dist.state import TrainState
from ali_dist.step import step
from ali_dist.tables import NETWORKS
from ali_dist.worker import keep_freed_memory

OURS, ALONE, OWN_NORM, BF16 = "ours", "no communication", "batch norm of each worker's own", "gradients sent in bf16"
BUCKETS = (1, 5, 100)  # MB, beside DistributedDataParallel's 25
SMALL = 256  # numbers; what sending them takes is latency
FORMULA = """update = n / r + (1 - h) * A(S) + sum over batch norms of G(2C + 1) + G(2C)
n images of the busiest worker; r images/s of a lone one; h hidden share; S bytes of gradients; N workers
A(S) = min(2 (N - 1) (S / N / B + l), 2 (S / B + ceil(log2 N) l)); G(k) = (N - 1) (4 k / B + l)
B bytes/s; l seconds a message, waiting for the slowest worker included"""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Weak scaling over worker processes: gloo and an equal share of the cores for each, or NCCL and a GPU each."""

    dataset: str = "digits"
    """Data set whose networks to train, on random images."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers to measure, 1 among them."""
    batch_per_worker: int = 16
    """Images of an update a worker."""
    rounds: int = 5
    """Rounds, in which the ways take turns; medians count."""
    updates: int = 3
    """Updates of a way in each round."""
    to: tuple[int, ...] = (8, 64, 512)
    """Numbers of workers to compute from the measured parts."""
    json: bool = False
    """Print JSON alone."""

    def run(self) -> None:
        if self.dataset not in RECIPES:
            raise cli.did_you_mean("data set", self.dataset, RECIPES)
        if 1 not in self.workers or min(self.workers + self.to) < 1:
            raise UserError("--workers must be positive numbers, 1 among them, and --to positive ones")
        if self.batch_per_worker < 2 or self.rounds < 1 or self.updates < 1:
            raise UserError("--batch-per-worker must be at least 2, --rounds and --updates positive")
        gpus = torch.cuda.device_count()
        if gpus and max(self.workers) > gpus:
            raise UserError(f"--workers {max(self.workers)}: this machine has {gpus} GPUs")
        device = torch.device("cuda" if gpus else "cpu")
        result = about(device) | {name: getattr(self, name) for name in ("dataset", "batch_per_worker")}
        say = (lambda text: None) if self.json else (lambda text: print(text, flush=True))
        say(head(result))
        result |= measure(self, say)
        result["projected"] = projected(self, result)
        print(json.dumps(result, indent=1) if self.json else "\n".join(lines(self, result)))


def measure(flags: Flags, say: Callable[[str], None]) -> dict[str, Any]:
    """Workers -> seconds an update of each way, and what the collectives take alone."""
    threads = max(1, torch.get_num_threads() // max(flags.workers))
    found = {}
    for world in sorted(set(flags.workers)):
        say(f"measuring {world} worker(s), {threads} thread(s) each")
        with tempfile.TemporaryDirectory(prefix="ali_dist-bench-") as folder:
            args = (world, threads, folder, asdict(flags))
            torch.multiprocessing.spawn(rank_main, args, nprocs=world)
            found[world] = json.loads(Path(folder, "result.json").read_text())
    return {"threads_per_worker": threads, "measured": found}


def rank_main(rank: int, world: int, threads: int, folder: str, given: dict[str, Any]) -> None:
    """What each process runs; the first writes the result."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    flags, gpu = Flags(**given), torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("nccl" if gpu else "gloo", init_method=meeting, rank=rank, world_size=world)
    try:
        result = measure_rank(flags, rank, world, device)
        if rank == 0:
            Path(folder, "result.json").write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()


def measure_rank(flags: Flags, rank: int, world: int, device: torch.device) -> dict[str, Any]:
    """Medians over the rounds; every rank runs this."""
    recipe, size = RECIPES[flags.dataset], flags.batch_per_worker * world
    recipe = replace(recipe, optim=replace(recipe.optim, batch_size=size))
    whole = random_batch(NETWORKS[recipe.networks].image, size)
    rows = torch.arange(rank, size, world)
    batch = Batch(whole.x[rows], whole.y[rows], rows, size)
    states = {name: make() for name, make in ways(recipe, device, world).items()}
    gradients = {}
    for name, state in states.items():
        step(state, [batch])
        gradients[name] = torch.cat([p.grad.flatten().float().cpu() for p in state.model.parameters()])
    times: dict[str, list[float]] = {name: [] for name in states}
    for _ in range(flags.rounds):
        for name, state in states.items():
            times[name].append(timed(lambda state=state: step(state, [batch]), flags.updates, device))
    result: dict[str, Any] = {"seconds": {name: median(taken) for name, taken in times.items()}, "rounds": times}
    if world > 1:
        exact = gradients[OURS]
        result["bf16_gradient_difference"] = float((gradients[BF16] - exact).norm() / exact.norm())
        result["all_reduce"] = collective(exact.numel(), flags, device)
        result["small_all_reduce"] = collective(SMALL, flags, device)
    return result


def ways(recipe: Recipe, device: torch.device, world: int) -> dict[str, Callable[[], TrainState]]:
    """Ways to train: ours, and with one part of what is between workers left out or changed."""

    def made(wrap: Callable[..., nn.Module], synchronised: bool = True, bf16: bool = False) -> TrainState:
        with wrapped_by(wrap):
            # What data parallelism can be put around
            levers = replace(FAST, graph=False, weight_copies=False, bf16_gradients=bf16)
            state = TrainState(recipe, torch.full(NETWORKS[recipe.networks].image, 0.5), device, levers=levers)
        if not synchronised:
            for module in state.model.modules():
                if hasattr(module, "reduce"):
                    module.reduce = None
        return state

    if world == 1:
        return {OURS: partial(made, DistributedDataParallel)}
    sizes = {f"buckets of {size} MB": partial(DistributedDataParallel, bucket_cap_mb=size) for size in BUCKETS}
    return {
        OURS: partial(made, DistributedDataParallel),
        OWN_NORM: partial(made, DistributedDataParallel, synchronised=False),
        ALONE: partial(made, lambda module, **_: module, synchronised=False),
        **{name: partial(made, wrap) for name, wrap in sizes.items()},
        BF16: partial(made, DistributedDataParallel, bf16=True),
    }


@contextlib.contextmanager
def wrapped_by(wrap: Callable[..., nn.Module]) -> Iterator[None]:
    """Inside it, a TrainState is made parallel by `wrap`."""
    with mock.patch.object(nn.parallel, "DistributedDataParallel", wrap):
        yield


def collective(count: int, flags: Flags, device: torch.device) -> float:
    """Seconds to add up so many float32 numbers over all ranks, with nothing else to do."""
    numbers = torch.zeros(count, device=device)
    return median(timed(lambda: dist.all_reduce(numbers), flags.updates, device) for _ in range(flags.rounds + 1))


def timed(function: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds a call, until the last rank is done."""

    def together() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter()

    start = together()
    for _ in range(times):
        function()
    return (together() - start) / times


def parts(flags: Flags, measured: dict[int, Any], world: int) -> dict[str, float]:
    """What so many workers measured means: rates, shares, bytes a second and seconds."""
    alone, found = measured[1]["seconds"][OURS], measured[world]
    nets, seconds = NETWORKS[RECIPES[flags.dataset].networks], found["seconds"]
    size, gathers = (
        FLOAT * describe(nets)["parameters"],
        2 * sum(row.bn for _, rows in nets.parts().values() for row in rows),
    )
    exposed = max(0.0, seconds[OWN_NORM] - seconds[ALONE])
    # Of a collective in the step, where each waits for the slowest worker; batch norm's are so small that it is all
    latency = max(
        found["small_all_reduce"] / (2 * (world - 1)),
        (seconds[OURS] - seconds[OWN_NORM]) / (gathers * (world - 1)),
    )
    sending = max(found["all_reduce"] - found["small_all_reduce"], 1e-9)
    return {
        "images_per_s": world * flags.batch_per_worker / seconds[OURS],
        "efficiency": alone / seconds[OURS],
        "computing": seconds[ALONE],
        "sharing_the_machine": seconds[ALONE] - alone,
        "gradients_exposed": exposed,
        "gradients_hidden_share": min(1.0, max(0.0, 1 - exposed / found["all_reduce"])),
        "synchronised_norm": seconds[OURS] - seconds[OWN_NORM],
        "bytes_per_s": 2 * (world - 1) / world * size / sending,
        "latency": latency,
    }


def as_assumed(flags: Flags, measured: dict[int, Any]) -> Assumptions:
    """What `simulate` is to assume, by what the most workers measured."""
    found = parts(flags, measured, max(measured))
    return Assumptions(
        dataset=flags.dataset,
        images_per_s=flags.batch_per_worker / found["computing"],
        batch_per_worker=flags.batch_per_worker,
        lanes_per_worker=flags.batch_per_worker,
        local_gbit=8 * found["bytes_per_s"] / 1e9,
        network_gbit=8 * found["bytes_per_s"] / 1e9,
        latency_us=1e6 * found["latency"],
        overlap=found["gradients_hidden_share"],
    )


def projected(flags: Flags, result: dict[str, Any]) -> list[dict[str, float]]:
    """`simulate`'s formulas with what the most workers measured; empty where there was but one."""
    measured, world = result["measured"], max(result["measured"])
    if world == 1:
        return []
    computing, assumed, rows = parts(flags, measured, world)["computing"], as_assumed(flags, measured), []
    for workers in (world, *flags.to):
        seconds = update_seconds(assumed, NETWORKS[RECIPES[flags.dataset].networks], workers)
        total = sum(seconds.values())
        rows.append({"workers": workers, **seconds, "update": total, "efficiency": computing / total})
    return rows


def lines(flags: Flags, result: dict[str, Any]) -> list[str]:
    """The result as text."""
    measured, out = result["measured"], []
    for world, found in measured.items():
        out.append(f"\n{world} worker(s), {flags.batch_per_worker} images each")
        for name, seconds in found["seconds"].items():
            low, high = min(found["rounds"][name]), max(found["rounds"][name])
            out.append(f"  {name:32} {1e3 * seconds:8.1f} ms [{1e3 * low:.1f}, {1e3 * high:.1f}]")
        if world == 1:
            continue
        part = parts(flags, measured, world)
        out += [
            f"  {part['images_per_s']:.1f} images/s, weak-scaling efficiency {part['efficiency']:.0%}",
            f"  an update is {1e3 * part['sharing_the_machine']:+.1f} ms for sharing the machine, "
            f"{1e3 * part['gradients_exposed']:+.1f} ms for gradients, "
            f"{1e3 * part['synchronised_norm']:+.1f} ms for batch norm over all workers",
            f"  all gradients alone {1e3 * found['all_reduce']:.1f} ms, "
            f"{part['gradients_hidden_share']:.0%} of it hidden; {part['bytes_per_s'] / 1e9:.2f} GB/s, "
            f"{1e6 * part['latency']:.0f} us",
            f"  bf16 changes the gradients by {found['bf16_gradient_difference']:.1e} of their norm",
        ]
    if not result["projected"]:
        return out
    assumed = as_assumed(flags, measured)
    names = (
        "images_per_s",
        "batch_per_worker",
        "lanes_per_worker",
        "local_gbit",
        "network_gbit",
        "latency_us",
        "overlap",
    )
    words = " ".join(f"--{name.replace('_', '-')} {getattr(assumed, name):.4g}" for name in names)
    out += ["", f"python -m ali_dist.simulate --dataset {flags.dataset} {words} --workers 1 2 8"]
    out += ["", FORMULA, "computed with r, h, B and l as measured; efficiency beside a worker that computes alone:"]
    for row in result["projected"]:
        ms = ", ".join(f"{name} {1e3 * row[name]:.1f}" for name in ("compute", "gradients", "batch_norm"))
        real = measured.get(row["workers"])
        beside = f", measured {1e3 * real['seconds'][OURS]:.1f} ms" if real else ""
        out.append(
            f"  {row['workers']:>6,} workers {1e3 * row['update']:9.1f} ms ({ms}): {row['efficiency']:.0%}{beside}"
        )
    return out
