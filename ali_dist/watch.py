"""What is looked at during training: grids from fixed codes and images, and the validation sample's measures."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ali_dist import dist
from ali_dist.data.index import Index, held_out_split
from ali_dist.data.stream import Batch, validation
from ali_dist.meter import Meter
from ali_dist.nets import Pass
from ali_dist.objective import validation_report
from ali_dist.pictures import tile
from ali_dist.state import TrainState, derived_seed
from ali_dist.step import autocast, to_unit_range
from ali_dist.views import FIGURES, fixed, shown


class Grids:
    """A run's figures without their labels, from the same codes, noise and images for the whole of it."""

    def __init__(self, index: Index, state: TrainState) -> None:
        self.fixed = fixed(index, state.recipe, state.model.nets.latent, state.device)
        self.names = shown(state.model, self.fixed)

    @torch.no_grad()
    def draw(self, state: TrainState) -> dict[str, Tensor]:
        """Name -> uint8 [C, H, W], by the averaged weights; reconstructions hold originals in the odd columns."""
        with autocast(state):
            views = {name: FIGURES[name](state.averaged, self.fixed) for name in self.names}
        return {name: tile(view.cells.flatten(0, 1), view.cells.shape[1]) for name, view in views.items()}


@torch.no_grad()
def validate(state: TrainState, index: Index) -> dict[str, float]:
    """The step's measures on the validation sample: population batch-norm statistics, no dropout, current weights.

    Every rank calls it and gets the same numbers, under `valid/`.
    """
    recipe = state.recipe
    meter = Meter(state.device)
    nothing, classes = torch.empty(0, device=state.device), state.model.nets.classes
    logits = nothing.view(0, classes) if classes else nothing
    # So that a rank without any row reports the same names
    meter.report(validation_report(recipe, Pass(logits, logits, *[nothing] * 6), torch.empty(0, dtype=torch.int64)))
    generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "validation"))
    state.model.eval()
    for batch in dealt(index, recipe.valid_split, recipe.schedule.validate_count, recipe.micro_batch):
        noise = torch.randn(2, batch.size, state.model.nets.latent, generator=generator)
        z, eps = noise[:, batch.rows].to(state.device)
        with autocast(state):
            if len(batch.rows):
                x, y = to_unit_range(batch.x, state.device), batch.y.to(state.device)
                meter.report(validation_report(recipe, state.model(x, z, eps, y=y), batch.y))
    state.model.train()
    return {f"valid/{name}": value for name, value in meter.collect().items()}


@torch.no_grad()
def class_errors(state: TrainState, index: Index) -> dict[str, float]:
    """D's share of wrong classes on all test images, `test/error` by the averaged weights, `test/error_raw`.

    Population batch-norm statistics, no dropout, one z_hat an image, as in training. Every rank calls it.
    """
    meter, recipe = Meter(state.device), state.recipe
    networks = {"error/test": state.averaged, "error/test_raw": state.model.eval()}
    meter.report(dict.fromkeys(networks, torch.empty(0, device=state.device)))
    generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "test"))
    split = held_out_split(index)
    for batch in dealt(index, split, index.images(split), recipe.micro_batch):
        eps = torch.randn(batch.size, state.model.nets.latent, generator=generator)[batch.rows].to(state.device)
        if not len(batch.rows):
            continue
        x, y = to_unit_range(batch.x, state.device), batch.y.to(state.device)
        with autocast(state):
            for name, net in networks.items():
                logits = net.classify(x, None if recipe.semi.supervised_only else eps)
                meter.report({name: (logits.argmax(1) != y).float()})
    state.model.train()
    numbers = meter.collect()
    return {"test/error": numbers["error/test"], "test/error_raw": numbers["error/test_raw"]}


def dealt(index: Index, split: str, count: int, batch_size: int) -> Iterator[Batch]:
    """This rank's part of the first images of a split, in stored order."""
    return validation(index, split, count=count, batch_size=batch_size, rank=dist.rank(), world=dist.world_size())
