"""Seconds from `ray job submit` to the first update, in parts, beside a job of an empty TorchTrainer."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ali_dist import cli
from ali_dist.bench.about import about, head
from ali_dist.bench.children import last_line
from ali_dist.recipe import UserError
from ali_dist.recipes import RECIPES

SUBMIT = ("ray", "job", "submit", "--log-color", "false", "--")
JOB = "from ali_dist.bench.start_job import main; main()"  # not -m: Ray's workers must find its functions by name
SECONDS = 300.0  # that a job may take


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Seconds from `ray job submit` to the first update, beside an empty TorchTrainer job, in turn on the same cluster.

    To be run inside a Ray: `launch/local.sh python -m ali_dist.bench start`.
    """

    dataset: str = "digits"
    """Prepared data set to begin training on."""
    data: str = ""
    """Folder of prepared shards; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    num_workers: int = 1
    """Workers of both jobs."""
    rounds: int = 3
    """Jobs of each kind; medians count. One of each is run before, untimed."""
    json: bool = False
    """Print JSON alone."""

    def run(self) -> None:
        if self.dataset not in RECIPES:
            raise cli.did_you_mean("data set", self.dataset, RECIPES)
        if self.rounds < 1 or self.num_workers < 1:
            raise UserError("--rounds and --num-workers must be positive")
        if "RAY_API_SERVER_ADDRESS" not in os.environ:
            raise UserError("no cluster to submit to: run it as `launch/local.sh python -m ali_dist.bench start`")
        result = about(torch.device("cpu")) | {"dataset": self.dataset, "workers": self.num_workers}
        say = (lambda text: None) if self.json else (lambda text: print(text, flush=True))
        say(head(result))
        result |= measure(self, say)
        print(json.dumps(result, indent=1) if self.json else "\n".join(lines(result)))


def measure(flags: Flags, say: Callable[[str], None]) -> dict[str, Any]:
    """Parts of each kind of job in order, medians over the rounds, and each round's total."""
    parts: dict[str, list[dict[str, float]]] = {"empty": [], "ours": []}
    for number in range(flags.rounds + 1):
        for kind, found in parts.items():
            with tempfile.TemporaryDirectory(prefix="ali_dist-bench-") as folder:
                found.append(job(kind, flags, Path(folder)))
            say(f"{'not counted' if not number else f'round {number}'}: {kind} {sum(found[-1].values()):.2f} s")
    return {
        kind: {
            "parts": {name: median(one[name] for one in found[1:]) for name in found[-1]},
            "seconds": [sum(one.values()) for one in found[1:]],
        }
        for kind, found in parts.items()
    }


def job(kind: str, flags: Flags, folder: Path) -> dict[str, float]:
    """Submits one and waits for its end: seconds of each part, in order."""
    marks = folder / "marks.jsonl"
    words = [str(flags.num_workers), str(folder)]
    if kind == "ours":
        recipe = RECIPES[flags.dataset]
        words = ["--dataset", flags.dataset, "--data", str(cli.data_folder(flags.data)), "--storage", str(folder)]
        words += ["--num-workers", str(flags.num_workers), "--num-images", str(recipe.optim.batch_size)]
        words += ["--validate-count", "1"]
    started = time.time()
    done = subprocess.run(
        [*SUBMIT, sys.executable, "-c", JOB, kind, str(marks), *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode or not marks.exists():
        raise UserError(f"the {kind} job failed: {last_line(done.stdout) or last_line(done.stderr)}")
    parts, before = {}, started
    for line in map(json.loads, marks.read_text().splitlines()):
        parts[line["name"]] = line["time"] - before
        before = line["time"]
    return parts


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a table; parts that only one kind has stand where it has them."""
    ours, empty = (result[kind]["parts"] for kind in ("ours", "empty"))
    out = [f"{'until':<28} {'ours':>7} {'empty':>7} {'above':>7}"]
    for name, seconds in ours.items():
        other = empty.get(name)
        shown = f"{other:7.2f}" if other is not None else f"{'':7}"
        out.append(f"{name:<28} {seconds:7.2f} {shown} {seconds - (other or 0):7.2f}")
    mine, theirs = (median(result[kind]["seconds"]) for kind in ("ours", "empty"))
    out.append(f"{'all, seconds':<28} {mine:7.2f} {theirs:7.2f} {mine - theirs:7.2f}")
    for kind in ("ours", "empty"):
        out.append(f"{kind}, each: {', '.join(f'{seconds:.2f}' for seconds in sorted(result[kind]['seconds']))} s")
    return out
