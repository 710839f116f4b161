"""How much of an image its reconstruction keeps."""

import torch

from ali_dist.data.index import Index
from ali_dist.evaluate.data import first, given
from ali_dist.model import Model

IMAGES = 5_000


def reconstruction(model: Model, index: Index) -> dict[str, float]:
    """Mean squared error of G_x(z_hat) on `valid`, pixels in [0, 1]; and as a share of that to another image's.

    The share needs no scale: 1 says that reconstructions have nothing of their own originals. Every image is paired
    with the reconstruction of the next.
    """
    images = first(index, "valid", IMAGES)
    generator = torch.Generator().manual_seed(0)
    x_tilde = model.reconstruct(images.x, given(model, images.y), generator=generator)
    x = images.x.float() / 255
    own = (x - x_tilde).square().mean().item()
    other = (x - x_tilde.roll(1, 0)).square().mean().item()
    return {"mse": own, "mse_of_another": other, "ratio": own / other, "images": len(x)}
