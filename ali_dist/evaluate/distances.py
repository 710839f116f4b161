"""How far a model's samples are from a data set, by the features of a network.

A metric's name says whose features they are: `fid` and `kid` are Inception's alone, which published figures are of;
the same distances by another network carry its name, as `fd-efficientnet-lite0`. So there is no flag for the network,
under which a figure could pass for what it is not.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from ali_dist.data.index import Index
from ali_dist.evaluate.features import FEATURES
from ali_dist.evaluate.seen import Pair, Seen, pair
from ali_dist.evaluate.work import Work
from ali_dist.model import Model

SUBSETS, SUBSET = 100, 1_000  # draws, and images in each, for the kernel distance (Binkowski et al., 2018)
NEIGHBOURS = 5  # whose distance is the radius of an image's ball (Naeem et al., 2020)
MEGABYTES = 256  # of distances at a time


def frechet(real: Seen, fake: Seen) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of means and covariances, in float64 (Heusel et al., 2017).

    The root's trace is that of (C^(1/2) C' C^(1/2))^(1/2), whose matrix is symmetric. Not the library's, which would
    have to see all features again for each comparison.
    """
    values, vectors = torch.linalg.eigh(real.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ fake.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (real.mean - fake.mean).square().sum()
    return (apart + real.covariance.trace() + fake.covariance.trace() - 2 * shared).item()


def kernel_distance(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, float]:
    """Unbiased MMD^2 of features [n, F] under the kernel (u.v / F + 1)^3, in float64: mean and deviation over draws."""
    size = min(SUBSET, len(real), len(fake))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of memory, which is bounded here
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(_Given(), subsets=SUBSETS, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, std = metric.compute()
    return {"distance": mean.item(), "std": std.item(), "subsets": SUBSETS, "subset_images": size}


class _Given(nn.Module):
    """The library's network, where features are there already."""

    def forward(self, features: Tensor) -> Tensor:
        return features


def prdc(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Precision, recall, density and coverage of features [n, F] (arXiv:2002.09797), balls of NEIGHBOURS neighbours.

    Precision is the share of samples in any image's ball, recall that of images in any sample's, density the mean
    number of images' balls around a sample, over NEIGHBOURS, and coverage the share of images with a sample in theirs.
    """
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    radii, fake_radii = _radii(real), _radii(fake)
    balls, recalled, covered, row = 0, np.zeros(len(real), bool), np.zeros(len(real), bool), 0
    found = 0
    for distances in pairwise_distances_chunked(fake, real, working_memory=MEGABYTES):  # [some samples, images]
        inside = distances < radii
        found += int(inside.any(1).sum())
        balls += int(inside.sum())
        covered |= inside.any(0)
        recalled |= (distances < fake_radii[row : row + len(distances), None]).any(0)
        row += len(distances)
    return {
        "precision": found / len(fake),
        "recall": float(recalled.mean()),
        "density": balls / (NEIGHBOURS * len(fake)),
        "coverage": float(covered.mean()),
        "neighbours": NEIGHBOURS,
    }


def _radii(x: np.ndarray) -> np.ndarray:
    """Distance of each row from its last neighbour, itself not among them."""
    return NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(x).kneighbors()[0][:, -1]


def _fd(both: Pair) -> dict[str, float]:
    return {"distance": frechet(both.real, both.fake), "images": int(both.real.count)}


def _kd(both: Pair) -> dict[str, float]:
    return {**kernel_distance(both.real.features, both.fake.features), "images": len(both.real.features)}


def _prdc(both: Pair) -> dict[str, float]:
    return {**prdc(both.real.features.numpy(), both.fake.features.numpy()), "images": len(both.real.features)}


def compared(
    model: Model, index: Index, work: Work, *, features: str, measure: Callable[[Pair], dict[str, float]]
) -> dict[str, Any]:
    """Samples against as many images, the reference split's first, by one of MEASURES; see `pair`."""
    both = pair(model, index, features, work)
    return {
        **measure(both),
        "split": work.reference,
        "images_asked": work.images,
        "network": both.network.name,
        "weights_sha256": both.network.weights,
        "preprocessing": both.network.preprocessing,
        "seed": 0,
    }


MEASURES = {"fd": _fd, "kd": _kd, "prdc": _prdc}
OF_INCEPTION = {"fd": "fid", "kd": "kid", "prdc": "prdc"}
DISTANCES = {
    OF_INCEPTION[name] if features == "inception" else f"{name}-{features}": partial(
        compared, features=features, measure=measure
    )
    for features in FEATURES
    for name, measure in MEASURES.items()
}
