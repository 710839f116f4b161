"""What is looked at during training: grids from fixed codes and images, and the validation sample's measures."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ali_dist import dist
from ali_dist.data.index import Index
from ali_dist.data.stream import validation
from ali_dist.meter import Meter
from ali_dist.nets import ALI, Pass
from ali_dist.state import TrainState, derived_seed
from ali_dist.step import autocast, measures, to_unit_range

COLUMNS = 8
ROWS = 8


def tile(images: Tensor, columns: int) -> Tensor:
    """uint8 [N, C, H, W] -> one uint8 image [C, rows * H, columns * W], row by row, blank where images run out."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = images.new_zeros(rows * columns, c, h, w)
    sheet[:n] = images
    return sheet.view(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def to_uint8(x: Tensor) -> Tensor:
    """[0, 1] float -> uint8, on the CPU."""
    return (x.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def save_png(path: Path, pixels: Tensor) -> None:
    """Writes uint8 [C, H, W] (C 1 or 3) pixel for pixel."""
    array = pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)


class Grids:
    """A sheet of samples and one of reconstructions, from the same prior draws, noise and images for a whole run."""

    def __init__(self, index: Index, state: TrainState) -> None:
        count = ROWS * COLUMNS
        generator = torch.Generator().manual_seed(derived_seed(state.recipe.seed, "grids"))
        latent = state.model.nets.latent
        self.z = torch.randn(count, latent, generator=generator).to(state.device)
        batch = next(validation(index, "valid", count=count // 2, batch_size=count // 2))
        self.x = batch.x
        self.eps = torch.randn(len(self.x), latent, generator=generator).to(state.device)

    @torch.no_grad()
    def draw(self, state: TrainState) -> dict[str, Tensor]:
        """Name -> uint8 [C, H, W], by the averaged weights; reconstructions hold originals in the odd columns."""
        model: ALI = state.averaged
        with autocast(state):
            samples = model.decode(self.z)
            mu, log_sigma = model.encode(to_unit_range(self.x, state.device))
            reconstructions = model.decode(mu.float() + log_sigma.float().exp() * self.eps)
        pairs = torch.stack([self.x, to_uint8(reconstructions)], dim=1).flatten(0, 1)
        return {"samples": tile(to_uint8(samples), COLUMNS), "reconstructions": tile(pairs, COLUMNS)}


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
                meter.report(measures(state.model(to_unit_range(batch.x, state.device), z, eps)))
    state.model.train()
    return {f"valid/{name}": value for name, value in meter.collect().items()}
