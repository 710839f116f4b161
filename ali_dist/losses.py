"""ALI's two losses (arXiv:1606.00704, section 2), as functions of logits a = D(x, z_hat) and b = D(x_tilde, z).

Where D tells K classes of data and "generated" apart (section 4.4) it has K logits l: the one of "generated" may be
fixed at 0 (Salimans et al., 2016), so that with Z = sum of exp(l_k) the K + 1 probabilities are exp(l_k) / (Z + 1) and
1 / (Z + 1), and D(x, z) = Z / (Z + 1) = sigma(log Z).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_image_losses(logits_q: Tensor, logits_p: Tensor) -> tuple[Tensor, Tensor]:
    """L_D and L_G of each pair, float [N] from logits of shape [N]; their means are the paper's losses."""
    a, b = logits_q, logits_p
    loss_d = F.softplus(-a) + F.softplus(b)  # -log sigma(a) - log(1 - sigma(b))
    loss_g = F.softplus(a) + F.softplus(-b)  # -log(1 - sigma(a)) - log sigma(b), the non-saturating form
    return loss_d, loss_g


def derivative_ratios(logits_q: Tensor, logits_p: Tensor) -> tuple[Tensor, Tensor]:
    """dL_G / dL_D along each pair's logit, [N] each: what turns L_D's gradient at a pair into L_G's.

    dL_D/da = -sigma(-a) and dL_G/da = sigma(a), dL_D/db = sigma(b) and dL_G/db = -sigma(-b): -exp(a) and -exp(-b). They
    are bounded where D is sure beyond exp(60), as its gradient would soon be 0 and the ratio infinite.
    """
    return -torch.exp(logits_q.clamp(max=60)), -torch.exp((-logits_p).clamp(max=60))


def accuracies(logits_q: Tensor, logits_p: Tensor) -> tuple[Tensor, Tensor]:
    """sigma(a) and 1 - sigma(b), [N] each: the probability that D gives to the truth."""
    return torch.sigmoid(logits_q), torch.sigmoid(-logits_p)


def evidence(logits: Tensor) -> Tensor:
    """The logit of D(x, z), [N]: log Z of K logits [N, K], or the one logit [N] itself."""
    return logits if logits.dim() == 1 else logits.logsumexp(1)


def class_losses(logits: Tensor, y: Tensor) -> Tensor:
    """-log p(y) among the K + 1, [N], for logits [N, K] and classes y, int64 [N]."""
    return F.softplus(evidence(logits)) - logits.gather(1, y[:, None])[:, 0]  # -log exp(l_y) / (Z + 1)


def semi_supervised_losses(logits_q: Tensor, logits_p: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """L_D and L_G of each pair, float [N] from logits [N, K]; y is int64 [N], -1 where the class is unknown.

    L_D is the mean of -log p(y) over the labelled q's, that of -log p(any of the K) over the others and that of
    -log p(generated) over the p's, added up. The game with encoder and decoder is about the q's without labels alone,
    which are not the same few images again and again. `share` of all q's are labelled, 0 < share < 1: it makes means
    over the N of what belongs to some of them.
    """
    a, b, labelled = evidence(logits_q), evidence(logits_p), y >= 0
    known, unknown = labelled.to(a.dtype) / share, (~labelled).to(a.dtype) / (1 - share)
    loss_d = known * class_losses(logits_q, y.clamp(min=0)) + unknown * F.softplus(-a) + F.softplus(b)
    loss_g = unknown * F.softplus(a) + F.softplus(-b)
    return loss_d, loss_g


def feature_gaps(features_q: Tensor, features_p: Tensor, y: Tensor, share: float) -> Tensor:
    """Each pair's part in the gap between D's mean features of unlabelled q's and of p's, [N, F]: their mean is it."""
    unknown = (y < 0) / (1 - share)
    return unknown[:, None] * features_q.flatten(1).float() - features_p.flatten(1).float()


def feature_matching_losses(gaps: Tensor, gap: Tensor) -> Tensor:
    """L_G of each pair, [N], for feature matching: its mean is |gap|^2, and so is its gradient.

    `gap` [F] is the mean of `gaps` [N, F] over the batches of all ranks, a constant: |gap|^2 to first order around it.
    """
    return 2 * gaps @ gap - gap.square().sum()
