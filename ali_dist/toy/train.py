"""One job of the study: trains a stack to its end, from wherever it was left, and writes each run's results."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ali_dist.cluster import Report
from ali_dist.run import write_json
from ali_dist.toy.judge import PACGAN_SAMPLES, measures, networks, samples
from ali_dist.toy.metrics import sample_metrics
from ali_dist.toy.models import Networks
from ali_dist.toy.nets import Weights, one_run
from ali_dist.toy.plan import Job
from ali_dist.toy.recipe import ToyRun
from ali_dist.toy.stack import Stack
from ali_dist.toy.tables import MODELS


def train(job: Job, out: Path, device: torch.device, report: Report, save_epochs: int = 1) -> None:
    """Trains what is not finished yet. `report` gets epoch, modes and share of high quality, means over the runs."""
    if all(finished(out, name) for name in job.runs):
        return
    folder = out / "stacks" / job.name
    decoder = decoder_for(job, out) if job.decoder_of else None
    stack = Stack(list(job.runs.values()), device, decoder)
    stack.load(folder)
    while stack.epoch < stack.recipe.epochs:
        losses = stack.train_epoch()
        if stack.epoch % save_epochs == 0 or stack.epoch == stack.recipe.epochs:
            stack.save(folder)
            report(progress(stack) | {name: loss.mean().item() for name, loss in losses.items()})
    for index, (name, run) in enumerate(job.runs.items()):
        write_run(out, name, run, stack, index)
    shutil.rmtree(folder, ignore_errors=True)


def progress(stack: Stack) -> dict[str, float]:
    """What a status line shows: cheap, on 2,500 samples a run, and nothing of them for models that need no samples."""
    line = {"epoch": stack.epoch, "hours": stack.seconds / 3600}
    if stack.recipe.model in ("ali", "gan"):
        points = [
            samples(networks(stack.recipe.model, on_cpu(one_run(stack.result(), r))), PACGAN_SAMPLES)[1]
            for r in range(len(stack.runs))
        ]
        each = [sample_metrics(x) for x in points]
        line |= {key: sum(m[key] for m in each) / len(each) for key in ("modes", "hq")}
    return line


def on_cpu(weights: Weights) -> Weights:
    return {name: tensor.cpu() for name, tensor in weights.items()}


def decoder_for(job: Job, out: Path) -> Weights:
    """The decoder that stays, with its population statistics, once for each run of the stack."""
    weights = read_run(out, job.decoder_of)[1].weights
    count = len(job.runs)
    return {
        name: tensor.expand(count, *tensor.shape[1:]).contiguous()
        for name, tensor in weights.items()
        if name.startswith("decoder.")
    }


def finished(out: Path, name: str) -> bool:
    return (out / "runs" / name / "metrics.json").exists()


def write_run(out: Path, name: str, run: ToyRun, stack: Stack, index: int) -> None:
    """`runs/NAME/`: recipe.json, weights.safetensors (with batch norm's population statistics), metrics.json."""
    nets = networks(run.model, on_cpu(one_run(stack.result(), index)))
    final = out / "runs" / name
    partial = final.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / "recipe.json", dataclasses.asdict(run))
    save_file({name: t[0].contiguous() for name, t in nets.weights.items()}, partial / "weights.safetensors")
    cost = {"hours": stack.seconds / 3600 / len(stack.runs), "stack": len(stack.runs), "device": stack.device.type}
    write_json(partial / "metrics.json", without_nan(measures(nets) | {"cost": cost}))
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)


def read_run(out: Path, name: str) -> tuple[ToyRun, Networks]:
    """A finished run, ready for use."""
    folder = out / "runs" / name
    run = ToyRun(**read_json(folder / "recipe.json"))
    weights = {name: tensor[None] for name, tensor in load_file(folder / "weights.safetensors").items()}
    expected = set(MODELS[run.model]) | {"decoder"}
    if {name.split(".")[0] for name in weights} != expected:
        raise ValueError(f"{folder} does not hold the networks of {run.model}")
    return run, Networks(run.model, weights)


def measure_again(out: Path, name: str) -> None:
    """Rewrites a finished run's metrics.json from its weights, by today's metrics; what it cost stays."""
    path = out / "runs" / name / "metrics.json"
    write_json(path, without_nan(measures(read_run(out, name)[1]) | {"cost": read_json(path)["cost"]}))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def without_nan(tree: Any) -> Any:
    """JSON has no NaN: null stands for a number that does not exist."""
    if isinstance(tree, dict):
        return {key: without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
