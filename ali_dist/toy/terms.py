"""What `--recipe best` adds to the loss of encoder and decoder, each [R] from points [R, N, 2] of R runs."""

import torch
from torch import Tensor

REACH = 0.05  # as wide as a mode, in which 40 of the 1,000 points lie
TINY = 1e-6  # under a root that may be of 0, for its gradient's sake
FINE = 1e-4  # the same in `near_energy`: a fifth of a mode's width
BEND = 0.1  # from where on the pull no longer grows
Z_SCALE = 2.0  # brings z near the spread of x, so that both count in a distance of pairs


def cycle(x: Tensor, x_hat: Tensor) -> Tensor:
    """E |x - G_x(G_z(x))|^2 (ALICE, arXiv:1709.01215)."""
    return (x - x_hat).square().sum(-1).mean(1)


def energy_distance(q: Tensor, p: Tensor) -> Tensor:
    """2 E|q - p| - E|q - q'| - E|p - p'| (Szekely and Rizzo, 2013), unbiased, of samples [R, N, d] each."""
    count = q.shape[1]

    def total(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2))

    return 2 * total(q, p) / count**2 - (total(q, q) + total(p, p)) / (count * (count - 1))


def joint_energy_distance(x: Tensor, z_hat: Tensor, x_tilde: Tensor, z: Tensor) -> Tensor:
    """Between the two joints that the discriminator compares, x by z_hat and x_tilde by z."""
    return energy_distance(torch.cat([x, Z_SCALE * z_hat], -1), torch.cat([x_tilde, Z_SCALE * z], -1))


def near_energy(x_tilde: Tensor, points: Tensor) -> Tensor:
    """2 E|x_tilde - point|^(1/2) - E|x_tilde - x_tilde'|^(1/2), points [R, M, 2].

    But for a constant the energy distance with exponent 1/2. By the root two points of one mode repel each other
    some eight times as strongly, against two of different modes, as with exponent 1: it shapes the modes.
    """
    count = x_tilde.shape[1]

    def total(a: Tensor, b: Tensor) -> Tensor:
        return ((a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1) + FINE).pow(0.25).sum((1, 2))

    among = (total(x_tilde, x_tilde) - count * FINE**0.25) / (count * (count - 1))
    return 2 * total(x_tilde, points) / (count * points.shape[1]) - among


def nearest(x_tilde: Tensor, points: Tensor) -> Tensor:
    """E h(max(0, |x_tilde - the nearest of points [R, M, 2]| - REACH)), h(d) = sqrt(d^2 + BEND^2) - BEND.

    What lies between two modes is drawn to the nearer one; inside a mode points are within reach: nothing shrinks it.
    """
    which = torch.cdist(x_tilde.detach(), points).argmin(-1, keepdim=True)
    way = x_tilde - points.gather(1, which.expand(-1, -1, points.shape[-1]))
    beyond = ((way.square().sum(-1) + TINY).sqrt() - REACH).relu()
    return ((beyond.square() + BEND**2).sqrt() - BEND).mean(1)
