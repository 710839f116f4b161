"""How well the codes of images match the prior, and whether anything depends on them: collapse shows here."""

import torch
from torch import Tensor

from ali_dist.data.index import Index
from ali_dist.evaluate.data import given, read
from ali_dist.evaluate.work import ALONE, Chunk, Work
from ali_dist.model import Model
from ali_dist.recipe import UserError

IMAGES = 2_000


def mmd2(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al., 2012) of samples [n, d] and [m, d].

    The kernel is exp(-|u - v|^2 / (2 d)): two draws of N(0, I) are about 2 d apart, squared.
    """
    a, b = a.double(), b.double()

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (-torch.cdist(u, v).square() / (2 * a.shape[1])).exp()

    def within(u: Tensor) -> Tensor:
        k = kernel(u, u)
        return (k.sum() - k.trace()) / (len(u) * (len(u) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def posterior(model: Model, index: Index, work: Work = ALONE) -> dict[str, float | str]:
    """On the validation images: how z_hat matches the prior, and whether D heeds it.

    MMD^2 of z_hat to prior draws beside that of prior draws to each other, moments, sigma's range, and the share of
    images that D finds more likely with their own z_hat than with another image's (equal scores count one half, so
    that 0.5 says: z is ignored). UserError for a split of one image.
    """
    split = model.recipe.valid_split
    n = min(IMAGES, index.images(split))
    if n < 2:
        raise UserError(f"split {split!r} of data set {index.name} has {n} images, posterior needs two")
    mu, log_sigma = map(torch.cat, zip(*work.each(_encoded, n, model, index, split), strict=True))
    generator = torch.Generator().manual_seed(0)
    z_hat = mu + log_sigma.exp() * torch.randn(mu.shape, generator=generator)
    z, other = torch.randn(2, *mu.shape, generator=generator).unbind()
    sigma = log_sigma.exp()
    preferred = sum(work.each(_preferred, n, model, index, split, z_hat, z_hat.roll(1, 0)))
    return {
        "mmd2": mmd2(z_hat, z),
        "mmd2_of_prior_draws": mmd2(other, z),
        "mean_largest": z_hat.mean(0).abs().max().item(),
        "std_smallest": z_hat.std(0).min().item(),
        "std_largest": z_hat.std(0).max().item(),
        "sigma_mean": sigma.mean().item(),
        "sigma_smallest": sigma.min().item(),
        "sigma_largest": sigma.max().item(),
        "own_code_preferred": preferred / n,
        "split": split,
        "images": n,
        "seed": 0,
    }


def _encoded(model: Model, index: Index, split: str, chunk: Chunk) -> tuple[Tensor, Tensor]:
    images = read(index, split, chunk)
    return model.posterior(images.x, given(model, images.y))


@torch.no_grad()
def _preferred(model: Model, index: Index, split: str, own: Tensor, others: Tensor, chunk: Chunk) -> float:
    """How many of the chunk's images D finds more likely with their own code; equal scores count one half."""
    images = read(index, split, chunk)
    labels = model.label_batches(given(model, images.y), len(images.x))

    def scores(codes: Tensor) -> Tensor:
        batches = zip(
            model.batches(images.x), codes[chunk.start : chunk.stop].split(model.batch_size), labels, strict=True
        )
        return torch.cat([model.net.score(x, z.to(x.device), label).cpu() for x, z, label in batches])

    more = scores(own) - scores(others)
    return (more > 0).sum().item() + (more == 0).sum().item() / 2
