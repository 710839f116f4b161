"""25 Gaussians on a grid: the data of the toy study, seeded, with exact responsibilities."""

import torch
from torch import Tensor

STD = 0.05  # of each component, along both axes
MEANS = torch.cartesian_prod(*[torch.arange(-4.0, 5.0, 2.0, dtype=torch.float64)] * 2)  # [25, 2], equal weights
NUM_TRAIN = 100_000
NUM_HELD_OUT = 10_000
HELD_OUT_SEED = 1  # the training points' is 0: one data set for all runs


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """x float32 [count, 2] and its components int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    component = torch.randint(len(MEANS), (count,), generator=generator)
    noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    return (MEANS[component] + STD * noise).float(), component


def train_points() -> Tensor:
    return draw(NUM_TRAIN, 0)[0]


def held_out_points() -> tuple[Tensor, Tensor]:
    return draw(NUM_HELD_OUT, HELD_OUT_SEED)


def squared_distances(x: Tensor) -> Tensor:
    """float64 [N, 25]: from each x [N, 2] to each centre, in units of x."""
    return (x.double()[:, None] - MEANS).square().sum(-1)


def responsibilities(x: Tensor) -> Tensor:
    """p(component | x), float64 [N, 25]: with equal weights and covariances a softmax of -distance^2 / (2 STD^2)."""
    return torch.softmax(-squared_distances(x) / (2 * STD**2), dim=-1)
