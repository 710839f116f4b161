"""python -m ali_dist.export RUN --out DIR: a model to hand on, in the Hugging Face convention."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from ali_dist import cli, exported
from ali_dist.describe import describe
from ali_dist.model import Model, Weights, find, load
from ali_dist.pictures import save_png, tile, to_uint8
from ali_dist.recipe import UserError
from ali_dist.run import parse_json

SAMPLES, SIDE = "samples.png", 8
ABOUT_THE_RUN = ("checkpoint", "weights", "dataset", "versions", "metric")  # of a metric's line, not its numbers


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A folder with config.json, model.safetensors, a model card and a sheet of samples, for `ali_dist.load`."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder or address of a run (its newest checkpoint) or of one checkpoint, or a run's name below --storage."""
    storage: str = "runs"
    """Folder or address of runs."""
    out: str
    """Folder to make."""
    weights: Weights = "averaged"
    """Averaged or raw weights."""
    license: str = "unknown"
    """The weights' licence on the card, as the Hugging Face Hub writes it: mit, cc-by-nc-4.0, other, …"""
    dry_run: bool = False
    """Say what would be written, and stop."""


def samples(model: Model) -> torch.Tensor:
    """uint8 [C, H, W]: 64 samples of seed 0; a conditional model's have one label each, in turn."""
    count = SIDE * SIDE
    y = torch.eye(model.labels)[torch.arange(count) % model.labels] if model.labels else None
    return tile(to_uint8(model.sample(count, y, seed=0)), SIDE)


def newest_metrics(path: Path, checkpoint: str, weights: Weights) -> dict[str, dict[str, Any]]:
    """Of a metrics.jsonl, the last line of each metric of this checkpoint and these weights."""
    found = {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = parse_json(text)
            name, of = line["metric"], (Path(line["checkpoint"]).name, line["weights"])
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(name, str) and of == (checkpoint, weights):
            found[name] = {key: value for key, value in line.items() if key not in ABOUT_THE_RUN}
    return found


def code(value: Any) -> str:
    """As a code span in a table, whatever is in it."""
    return "`" + re.sub(r"[`|\s]+", " ", value if isinstance(value, str) else json.dumps(value)) + "`"


def card(model: Model, weights: Weights, license: str, metrics: dict[str, dict[str, Any]], sheet: bool) -> str:
    """README.md."""
    recipe, optim, nets = model.recipe, model.recipe.optim, model.net.nets
    given = ", y=labels" if model.labels else ""
    raw = "" if weights == "averaged" else ', weights="raw"'
    head = {
        "library_name": "ali_dist",
        "license": license,
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ali", "adversarially-learned-inference", "gan", "pytorch"],
    }
    facts = {
        "data set": recipe.dataset,
        "images seen in training": f"{int(model.checkpoint.name):,}",
        "weights": weights,
        "networks": f"{recipe.networks}, {describe(nets)['parameters']:,} parameters",
        "images x": f"{list(nets.image)}, in [0, 1]",
        "codes z": f"{nets.latent} numbers, p(z) = N(0, I)",
        "labels y": f"{nets.labels} classes or attributes" if nets.labels else "none",
        "Adam": f"lr {optim.lr:g}, beta1 {optim.beta1:g}, beta2 {optim.beta2:g}, batch size {optim.batch_size}",
        "precision in training": recipe.precision,
        "seed": recipe.seed,
        "labelled images": recipe.semi.labels or "none",
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# ALI on {code(recipe.dataset)}", ""]
    lines += [
        "Adversarially Learned Inference (Dumoulin et al., 2016, arXiv:1606.00704): an encoder q(z|x) and a decoder"
    ]
    lines += ["p(x|z), trained together against one discriminator of pairs (x, z).", ""]
    if sheet:
        each = " Sample i has label i mod the number of labels, alone." if model.labels else ""
        lines += [f"![64 samples]({SAMPLES})", "", f"64 samples, seed 0, not selected.{each}", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {code(value)} |" for name, value in facts.items())]
    lines += ["", "`config.json` holds the whole recipe.", "", "## Measured", ""]
    if metrics:
        lines += ["By `python -m ali_dist.evaluate`, of these weights:", "", "| metric | |", "| --- | --- |"]
        lines += [f"| {code(name)} | {code(numbers)} |" for name, numbers in sorted(metrics.items())]
    else:
        lines += ["Nothing was measured of these weights."]
    lines += ["", "## Use", "", "```python", "import ali_dist", ""]
    lines += [f'model = ali_dist.load("this folder"{raw})  # no network access, nothing unpickled']
    if sheet:
        lines += [f"x = model.sample(16{given}, seed=0)  # float32 [16, C, H, W] in [0, 1]"]
        lines += [f"mu = model.encode(images{given})  # uint8, or float in [0, 1], [N, C, H, W] -> [N, {nets.latent}]"]
        lines += [f"x_tilde = model.reconstruct(images{given})"]
    if nets.classes:
        lines += ["classes = model.classify(images).argmax(1)"]
    lines += ["```", "", "## Licence", ""]
    lines += [f"Of the weights: {license}. The terms of the data set they were trained on apply too. The code of"]
    lines += ["ali_dist is under the MIT licence.", ""]
    return "\n".join(lines)


def main() -> None:
    flags = tyro.cli(Flags, prog="python -m ali_dist.export")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", flags.license):
        raise UserError(f"--license {flags.license!r}: give an identifier such as mit, apache-2.0, cc-by-4.0 or other")
    out = cli.local_folder("--out", flags.out)
    model = load(find(flags.run, flags.storage), flags.weights)
    metrics = newest_metrics(model.run.metrics, model.checkpoint.name, flags.weights)
    if out.exists():
        raise UserError(f"{out} exists: choose another --out, or delete it")
    if flags.dry_run:
        print(f"would export {model.place} ({flags.weights} weights, {len(metrics)} metrics) to {out}")
        return
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        exported.write(partial, model.recipe, model.net.state_dict(), flags.weights, int(model.checkpoint.name))
        sheet = not model.recipe.semi.supervised_only  # then encoder and decoder are untrained
        if sheet:
            save_png(partial / SAMPLES, samples(model))
        (partial / "README.md").write_text(card(model, flags.weights, flags.license, metrics, sheet))
        os.rename(partial, out)
    except OSError as error:
        raise UserError(f"can't write {out} ({error.strerror}): give --out a place with room") from error
    raw = "" if flags.weights == "averaged" else ", weights='raw'"
    print(f"exported {model.place} to {out}: ali_dist.load({str(out)!r}{raw})")


if __name__ == "__main__":
    cli.run(main)
