"""What a set of samples is worth: mode coverage as the paper counts it, and the stricter numbers published since.

Means over modes, shares and distances are plain floats; a set of samples is [N, 2], in the data's units.
"""

import math

import torch
from torch import Tensor

from ali_dist.toy.data import MEANS, STD, responsibilities, squared_distances

NEAR = 3.0  # standard deviations: a sample within them of a centre is of high quality
# Standard deviation along an axis of a 2-d Gaussian cut off at NEAR, in units of its own before the cut.
_LOST = math.exp(-(NEAR**2) / 2)
CUT_STD = math.sqrt(1 - NEAR**2 / 2 * _LOST / (1 - _LOST))
PAIRS = 5_000  # codes of which all mutual distances are taken
CELLS = 20  # along each axis of z, all of equal prior mass
MIN_FOR_STD = 20  # samples in a mode, below which its standard deviation says nothing


def covered_modes(x: Tensor) -> int:
    """Modes that are the most responsible one of at least one sample (arXiv:1606.00704, section 4.6)."""
    return responsibilities(x).argmax(-1).unique().numel()


def high_quality_counts(x: Tensor) -> Tensor:
    """int64 [25]: samples within 3 standard deviations of each centre."""
    distance, nearest = squared_distances(x).min(-1)
    return nearest[distance < (NEAR * STD) ** 2].bincount(minlength=len(MEANS))


def reverse_kl(counts: Tensor) -> float:
    """KL(modes of the samples || uniform) in nats, from counts [25]; NaN where there are none.

    Over high-quality samples, as in PacGAN's code (arXiv:1712.04086). True samples have about 24 / (2 N).
    """
    share = counts.double() / counts.sum()
    return math.log(len(counts)) + torch.xlogy(share, share).sum().item()


def mode_stds(x: Tensor) -> Tensor:
    """float64 [25]: each mode's standard deviation over the true one, NaN for modes of under 20 samples.

    Over high-quality samples and both axes, about the mode's own mean, divided by what true samples give under the
    same cut, so that true samples have 1.
    """
    distance, nearest = squared_distances(x).min(-1)
    stds = torch.full((len(MEANS),), torch.nan, dtype=torch.float64)
    for mode in range(len(MEANS)):
        members = x[(nearest == mode) & (distance < (NEAR * STD) ** 2)].double()
        if len(members) >= MIN_FOR_STD:
            stds[mode] = members.var(0).mean().sqrt() / (STD * CUT_STD)
    return stds


def sample_metrics(x: Tensor) -> dict[str, float]:
    """All of the above for samples [N, 2]; samples that are not finite count as none."""
    finite = x[x.isfinite().all(-1)]
    counts, stds = high_quality_counts(finite), mode_stds(finite)
    known = stds[~stds.isnan()]
    return {
        "modes": covered_modes(finite),
        "modes_hq": int((counts > 0).sum()),
        "hq": counts.sum().item() / len(x),
        "reverse_kl": reverse_kl(counts),
        "std_min": known.min().item() if len(known) else math.nan,
        "std_max": known.max().item() if len(known) else math.nan,
        "modes_std_ok": int(((known > 0.8) & (known < 1.2)).sum()),
    }


def energy_distance_to_prior(z: Tensor, block: int = 500) -> float:
    """2 E|z - y| - E|z - z'| - E|y - y'| of codes z [N, 2] and y ~ N(0, 1) (Szekely and Rizzo, 2013), unbiased.

    0 in expectation for codes drawn from the prior, so small values may be negative. What involves y is exact: |z - y|
    follows a Rice distribution. Of the first PAIRS codes: both means over the same ones, whose errors cancel.
    """
    z = z[:PAIRS].double()
    s = z.square().sum(-1) / 4
    to_prior = math.sqrt(math.pi / 2) * ((1 + 2 * s) * torch.special.i0e(s) + 2 * s * torch.special.i1e(s))
    among = sum(torch.cdist(rows, z).sum().item() for rows in z.split(block))
    return 2 * to_prior.mean().item() - among / (len(z) * (len(z) - 1)) - math.sqrt(math.pi)


def holes(z: Tensor) -> float:
    """Share of the prior's mass, in CELLS^2 cells of equal mass, where under a tenth of the codes due [N, 2] lie.

    0 for 10,000 prior draws: 25 are due in each cell.
    """
    column, row = (torch.special.ndtr(z.double()) * CELLS).long().clamp(max=CELLS - 1).unbind(-1)
    counts = (column * CELLS + row).bincount(minlength=CELLS**2)
    return (counts < 0.1 * len(z) / CELLS**2).double().mean().item()


def reconstruction_metrics(x: Tensor, component: Tensor, reconstruction: Tensor) -> dict[str, float]:
    """Of held-out x [N, 2] of known components: errors in the data's units, and whether the component was kept."""
    error = (x - reconstruction).double().norm(dim=-1)
    return {
        "rmse": error.square().mean().sqrt().item(),
        "median_error": error.median().item(),
        "same_mode": (responsibilities(reconstruction).argmax(-1) == component).double().mean().item(),
        "modes": covered_modes(reconstruction),
        "hq": high_quality_counts(reconstruction).sum().item() / len(x),
    }
