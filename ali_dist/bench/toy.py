"""Stacked runs of the toy study beside a plain eager loop over the same runs, in one process."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ali_dist.bench.about import about, head
from ali_dist.bench.toy_plain import PlainALI
from ali_dist.recipe import UserError
from ali_dist.toy.models import Batch
from ali_dist.toy.recipe import ToyRun
from ali_dist.toy.stack import Stack, initial_weights
from ali_dist.worker import keep_freed_memory

CHECKED_STEPS = 3
TOLERANCE = 1e-4  # of losses, after CHECKED_STEPS updates in float32


@dataclass(frozen=True, kw_only=True)
class Flags:
    """models x steps per second of ALI (batch 100), stacked against plain eager PyTorch, float32 and bfloat16."""

    runs: int = 5
    """Runs in the stack, and models of the plain loop."""
    steps: int = 20
    """Updates a round."""
    rounds: int = 5
    """Rounds, in which the ways take turns; the median counts."""
    threads: int = 1
    """Threads of PyTorch on a CPU."""
    json: bool = False
    """Print JSON alone."""

    def __post_init__(self) -> None:
        for name in ("runs", "steps", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")

    def run(self) -> None:
        keep_freed_memory()
        torch.set_num_threads(self.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = about(device) | measure(self, device)
        print(json.dumps(result, indent=1) if self.json else "\n".join([head(result), *lines(result)]))


def plain_loop(runs: list[ToyRun], device: torch.device) -> list[PlainALI]:
    models = [PlainALI(run, initial_weights(run)) for run in runs]
    for model in models:
        for net in model.nets.values():
            net.to(device)
    return models


def step_plain(models: list[PlainALI], batch: Batch) -> torch.Tensor:
    """One update of each model; [2, R], L_D and L_G."""
    losses = [model.step(Batch(batch.x[r], batch.z[r], batch.eps[r])) for r, model in enumerate(models)]
    return torch.stack([torch.stack(pair) for pair in losses], 1)


def difference(runs: list[ToyRun], device: torch.device) -> float:
    """The greatest difference of a loss between a float32 stack and the plain loop, over the first updates."""
    stack, models = Stack(runs, device), plain_loop(runs, device)
    batch, worst = stack.batches(), 0.0
    for number in range(CHECKED_STEPS):
        losses = stack.step(batch(number))
        mine = torch.stack([losses["loss_d"], losses["loss_g"]]).cpu()
        worst = max(worst, (mine - step_plain(models, batch(number)).cpu()).abs().max().item())
    return worst


def seconds(step: Callable[[Batch], Any], batch: Callable[[int], Batch], steps: int) -> float:
    """Wall time of so many updates."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for number in range(steps):
        step(batch(number))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(flags: Flags, device: torch.device) -> dict[str, Any]:
    """Models x steps per second of each way and their ratio to the plain loop; UserError where results differ."""

    def runs(**changes: Any) -> list[ToyRun]:
        return [ToyRun(model="ali", seed=seed, lr=1e-4 * (1 + seed), **changes) for seed in range(flags.runs)]

    worst = difference(runs(), device)
    if worst > TOLERANCE:
        raise UserError(f"the stack's losses differ from the plain loop's by {worst:.2g}: no speed is reported")
    models = plain_loop(runs(), device)
    stacks = {precision: Stack(runs(precision=precision), device) for precision in ("fp32", "bf16")}
    ways = {"plain eager": lambda batch: step_plain(models, batch)}
    ways |= {f"stacked {precision}": stack.step for precision, stack in stacks.items()}
    batch = stacks["fp32"].batches()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for step in ways.values():
        seconds(step, batch, 2)
    for _ in range(flags.rounds):
        for name, step in ways.items():
            times[name].append(seconds(step, batch, flags.steps))
    rates = {name: flags.runs * flags.steps / statistics.median(taken) for name, taken in times.items()}
    return {
        "runs": flags.runs,
        "rounds": flags.rounds,
        "steps": flags.steps,
        "difference": worst,
        "models_steps_per_s": rates,
        "ratio": {name: rate / rates["plain eager"] for name, rate in rates.items()},
        "ratio_by_round": {
            name: [plain / mine for plain, mine in zip(times["plain eager"], times[name], strict=True)] for name in ways
        },
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    out = [
        f"{result['runs']} ALI runs, batch 100; losses equal the plain loop's within {result['difference']:.1g} after "
        f"{CHECKED_STEPS} float32 updates. Median of {result['rounds']} rounds:"
    ]
    for name, rate in result["models_steps_per_s"].items():
        low, high = min(result["ratio_by_round"][name]), max(result["ratio_by_round"][name])
        out.append(f"{name:14} {rate:8.1f} models*steps/s  {result['ratio'][name]:5.2f}x  ({low:.2f}-{high:.2f})")
    return out
