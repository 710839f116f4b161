"""What is looked at during training: grids from fixed codes and images, and the validation sample's measures."""

import torch
from torch import Tensor

from ali_dist import dist
from ali_dist.data.index import Index
from ali_dist.data.stream import validation
from ali_dist.meter import Meter
from ali_dist.nets import Pass
from ali_dist.pictures import tile
from ali_dist.state import TrainState, derived_seed
from ali_dist.step import autocast, measures, to_unit_range
from ali_dist.views import FIGURES, fixed, shown


class Grids:
    """A run's figures without their labels, from the same codes, noise and images for the whole of it."""

    def __init__(self, index: Index, state: TrainState) -> None:
        self.fixed = fixed(index, state.recipe.seed, state.model.nets.latent, state.device)
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
    nothing = torch.empty(0, device=state.device)
    meter.report(measures(Pass(*[nothing] * 6)))  # so that a rank without any row reports the same names
    generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "validation"))
    state.model.eval()
    batches = validation(
        index,
        "valid",
        count=recipe.schedule.validate_count,
        batch_size=recipe.micro_batch,
        rank=dist.rank(),
        world=dist.world_size(),
    )
    for batch in batches:
        noise = torch.randn(2, batch.size, state.model.nets.latent, generator=generator)
        z, eps = noise[:, batch.rows].to(state.device)
        with autocast(state):
            if len(batch.rows):
                x, y = to_unit_range(batch.x, state.device), batch.y.to(state.device)
                meter.report(measures(state.model(x, z, eps, y=y)))
    state.model.train()
    return {f"valid/{name}": value for name, value in meter.collect().items()}
