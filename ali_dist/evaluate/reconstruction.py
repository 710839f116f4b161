"""How much of an image its reconstruction keeps."""

import numpy as np
from torchmetrics.functional.image import structural_similarity_index_measure

from ali_dist.data.index import Index
from ali_dist.evaluate.data import given, read
from ali_dist.evaluate.work import ALONE, Chunk, Work
from ali_dist.model import Model
from ali_dist.recipe import UserError

IMAGES = 5_000


def reconstruction(model: Model, index: Index, work: Work = ALONE) -> dict[str, float | str]:
    """Mean squared error of G_x(z_hat) on the validation images, as a share of that to other images; and SSIM.

    Pixels are in [0, 1].

    The share needs no scale: 1 says that reconstructions have nothing of their own originals. Its divisor is the mean
    over all pairs of an image and another's reconstruction. SSIM is Wang et al.'s (2004) with their window of 11, over
    all pixels (edges mirrored) and channels, 1 for the same picture; the variant on five scales needs more than 160
    pixels a side, so these images have none. UserError for a split of one image.
    """
    split = model.recipe.valid_split
    n = min(IMAGES, index.images(split))
    if n < 2:
        raise UserError(f"split {split!r} of data set {index.name} has {n} images, reconstruction needs two")
    sums = zip(*work.each(_sums, n, model, index, split), strict=True)
    own, ssim, x_squared, tilde_squared, x, tilde = map(sum, sums)
    pairs = n * (x_squared + tilde_squared) - 2 * (x * tilde).sum() - own  # the sum over all pairs of two images
    mse, other = own / (n * x.size), pairs / (n * (n - 1) * x.size)
    return {
        "mse": float(mse),
        "mse_of_another": float(other),
        "ratio": float(mse / other),
        "ssim": float(ssim / n),
        "split": split,
        "images": n,
        "seed": 0,
    }


def _sums(model: Model, index: Index, split: str, chunk: Chunk) -> tuple[np.ndarray | float, ...]:
    """Over the chunk's images, in float64: squared errors, SSIM, squares of x and of x_tilde, and both, [C, H, W]."""
    images = read(index, split, chunk)
    x_tilde = model.reconstruct(images.x, given(model, images.y), generator=chunk.generator())
    x = images.x.float() / 255
    ssim = structural_similarity_index_measure(x_tilde, x, data_range=1.0, reduction="none")
    x, x_tilde = x.double(), x_tilde.double()
    squares = [v.square().sum().item() for v in (x - x_tilde, x, x_tilde)]
    return squares[0], ssim.double().sum().item(), *squares[1:], x.sum(0).numpy(), x_tilde.sum(0).numpy()
