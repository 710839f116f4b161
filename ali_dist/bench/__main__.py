"""`python -m ali_dist.bench step|toy`: how fast an update is beside what a user would otherwise run."""

import json
import platform
import shlex
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any

import torch
import tyro

from ali_dist import cli
from ali_dist.bench.step import bench_step
from ali_dist.bench.toy import ToyFlags, lines, measure
from ali_dist.recipe import UserError
from ali_dist.recipes import RECIPES
from ali_dist.worker import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """Whole updates, on random images, beside plain PyTorch; ratios are theirs / ours."""

    dataset: str = "cifar10"
    """Data set whose networks to train."""
    batch_size: int = 0
    """Images an update; default: the recipe's."""
    seconds: float = 10.0
    """How long to time each way."""
    compile: bool = True
    """Also time what torch.compile makes of the step, which takes minutes, and a C++ compiler on a CPU."""
    json: bool = False
    """Print JSON alone."""


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['name']:<28} failed: {row['failed']}"
    return (
        f"{row['name']:<28} {1e3 * row['median']:>9.1f} ms [{1e3 * row['low']:.1f}, {1e3 * row['high']:.1f}]"
        f" {row['images_per_s']:>8.1f} images/s {row['ratio']:>6.2f}x ours {row['flops_per_s'] / 1e12:>7.3f} TFLOP/s"
        f" {row['share_of_floor']:>5.0%} of the floor" + (f" {row['peak_mb']:,.0f} MB" if "peak_mb" in row else "")
    )


def about(device: torch.device) -> dict[str, Any]:
    """When, with what and where: the head of every result."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "ali_dist.bench", *sys.argv[1:]]),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def step(flags: StepFlags, device: torch.device) -> None:
    if flags.dataset not in RECIPES:
        raise cli.did_you_mean("data set", flags.dataset, RECIPES)
    if flags.batch_size < 0 or flags.batch_size == 1 or flags.seconds <= 0:
        raise UserError("--batch-size must be at least 2 and --seconds positive")
    recipe = RECIPES[flags.dataset]
    optim = replace(recipe.optim, batch_size=flags.batch_size or recipe.optim.batch_size)
    result = about(device) | {"dataset": flags.dataset, "batch_size": optim.batch_size}
    say = (lambda text: None) if flags.json else (lambda text: print(text, flush=True))
    say(head(result))
    result |= bench_step(replace(recipe, optim=optim), device, flags.seconds, flags.compile, say)
    for row in result["ways"]:
        say(line(row))
    floor = result["floor"]
    say(
        f"{floor['flops'] / 1e9:,.0f} GFLOP an update; each product alone in its best form: "
        f"{1e3 * floor['seconds']:.1f} ms, {floor['flops_per_s'] / 1e12:.3f} TFLOP/s"
    )
    if flags.json:
        print(json.dumps(result, indent=1))


def toy(flags: ToyFlags, device: torch.device) -> None:
    torch.set_num_threads(flags.threads)
    result = about(device) | measure(flags, device)
    print(json.dumps(result, indent=1) if flags.json else "\n".join([head(result), *lines(result)]))


def head(result: dict[str, Any]) -> str:
    return f"{result['date']}  {result['device']}, {result['threads']} threads  torch {result['versions']['torch']}"


def main() -> None:
    """The sub-command's work; all ways in one process, in turn."""
    flags = tyro.cli(
        Annotated[StepFlags, tyro.conf.subcommand("step")] | Annotated[ToyFlags, tyro.conf.subcommand("toy")],
        prog="python -m ali_dist.bench",
        description="Speed beside what a user would otherwise run: all ways in one process, in turn.",
    )
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (toy if isinstance(flags, ToyFlags) else step)(flags, device)


if __name__ == "__main__":
    cli.run(main)
