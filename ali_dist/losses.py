"""ALI's two losses (arXiv:1606.00704, section 2), as functions of logits a = D(x, z_hat) and b = D(x_tilde, z)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_image_losses(logits_q: Tensor, logits_p: Tensor) -> tuple[Tensor, Tensor]:
    """L_D and L_G of each pair, float [N] from logits of shape [N]; their means are the paper's losses."""
    a, b = logits_q, logits_p
    loss_d = F.softplus(-a) + F.softplus(b)  # -log sigma(a) - log(1 - sigma(b))
    loss_g = F.softplus(a) + F.softplus(-b)  # -log(1 - sigma(a)) - log sigma(b), the non-saturating form
    return loss_d, loss_g


def accuracies(logits_q: Tensor, logits_p: Tensor) -> tuple[Tensor, Tensor]:
    """sigma(a) and 1 - sigma(b), [N] each: the probability that D gives to the truth."""
    return torch.sigmoid(logits_q), torch.sigmoid(-logits_p)
