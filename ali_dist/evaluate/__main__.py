"""python -m ali_dist.evaluate RUN --metrics linear,classes"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ali_dist import cli
from ali_dist.data.index import load_index
from ali_dist.evaluate.table import METRICS
from ali_dist.model import Weights, load
from ali_dist.recipe import UserError


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Numbers from a checkpoint; each is printed and appended to the run's metrics.jsonl."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run (its newest checkpoint) or of one checkpoint."""
    metrics: str
    """Names of metrics, separated by commas."""
    weights: Weights = "averaged"
    """Averaged or raw weights."""
    data: str = ""
    """Folder of prepared shards; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    dry_run: bool = False
    """Say what would be computed, and stop."""


def main() -> None:
    flags = tyro.cli(Flags, prog="python -m ali_dist.evaluate")
    names = [name.strip() for name in flags.metrics.split(",")]
    for name in names:
        if name not in METRICS:
            raise cli.did_you_mean("metric", name, METRICS)
    model = load(Path(flags.run), flags.weights)
    kept = model.run.metrics
    index = load_index(cli.data_folder(flags.data), model.recipe.dataset)
    if flags.dry_run:
        print(f"{', '.join(names)} of {model.checkpoint} on {index.store}")
        return
    for name in names:
        line = {
            "metric": name,
            **METRICS[name](model, index),
            "checkpoint": str(model.checkpoint),
            "weights": flags.weights,
            "dataset": index.name,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        print(json.dumps(line))
        try:
            with open(kept, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"can't append to {error.filename} ({error.strerror})") from error


if __name__ == "__main__":
    cli.run(main)
