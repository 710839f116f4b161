"""python -m ali_dist.figures RUN --figures samples,reconstructions,interpolations,conditional"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ali_dist import cli
from ali_dist.data.index import load_index
from ali_dist.model import Model, Weights, find, load
from ali_dist.pictures import enlarged, labelled, save_png
from ali_dist.recipe import UserError
from ali_dist.remote import changing
from ali_dist.settings import check_fits
from ali_dist.views import FIGURES, Fixed, fixed, shown


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Labelled figures from a checkpoint, of the same codes and validation images as during training."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder or address of a run (its newest checkpoint) or of one checkpoint, or a run's name below --storage."""
    storage: str = "runs"
    """Folder or address of runs."""
    figures: str = "all"
    """Names of figures, separated by commas; default: all that the model and its data set have."""
    weights: Weights = "averaged"
    """Averaged or raw weights."""
    scale: int = 1
    """Every pixel of an image becomes a square of so many pixels; nothing is blurred."""
    out: str = ""
    """Folder of the files; default: the run's figures/."""
    data: str = ""
    """Folder of prepared shards; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    dry_run: bool = False
    """Say what would be drawn, and stop."""


def draw(model: Model, given: Fixed, name: str, out: Path, title: str, scale: int) -> str:
    """One figure's PNG in the folder `out`, and where its user finds it."""
    with torch.no_grad():
        view = FIGURES[name](model.net, given)
    sheet, _ = labelled(enlarged(view.cells, scale), f"{name}, {title}", view.rows, view.columns, view.legend)
    path = out / f"{name}-{model.checkpoint.name}-labelled.png"
    with changing(model.run, path):
        save_png(path, sheet)
    return model.run.shown(path) if path.is_relative_to(model.run.root) else str(path)


def main() -> None:
    flags = tyro.cli(Flags, prog="python -m ali_dist.figures")
    names = [] if flags.figures == "all" else [name.strip() for name in flags.figures.split(",")]
    for name in names:
        if name not in FIGURES:
            raise cli.did_you_mean("figure", name, FIGURES)
    if flags.scale < 1:
        raise UserError(f"--scale must be at least 1, not {flags.scale}")
    folder = cli.local_folder("--out", flags.out) if flags.out else None
    model = load(find(flags.run, flags.storage), flags.weights)
    run = model.run
    index = load_index(cli.data_folder(flags.data), model.recipe.dataset)
    check_fits(model.recipe, index)
    given = fixed(index, model.recipe, model.latent, model.device)
    names = names or shown(model.net, given)
    if "conditional" in names and not model.labels:
        raise UserError(f"{flags.run} is unconditional: the conditional figure is of a run trained with --conditional")
    out = folder or run.figures
    if flags.dry_run:
        print(f"{', '.join(names)} of {model.place} to {run.shown(out) if out == run.figures else out}")
        return
    title = f"{index.name}, {int(model.checkpoint.name):,} images, {flags.weights} weights"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in names:
            print(draw(model, given, name, out, title, flags.scale))
    except OSError as error:
        raise UserError(f"can't write to {out} ({error.strerror}): give --out a writable folder") from error


if __name__ == "__main__":
    cli.run(main)
