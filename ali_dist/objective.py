"""What an update goes down and what it reports, from one forward pass: losses.py's formulas by the recipe."""

from torch import Tensor

from ali_dist import dist
from ali_dist.losses import (
    accuracies,
    class_losses,
    evidence,
    feature_gaps,
    feature_matching_losses,
    per_image_losses,
    semi_supervised_losses,
)
from ali_dist.nets import Pass
from ali_dist.recipe import Recipe


def losses(recipe: Recipe, out: Pass, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """L_D and L_G of each image, [n], in the way of the recipe.

    Their means over the whole batch, `size` images on all ranks, are what the update goes down.
    """
    share = recipe.labelled_share
    if not share:
        return per_image_losses(out.logits_q, out.logits_p)
    loss_d, loss_g = semi_supervised_losses(out.logits_q, out.logits_p, y, share)
    if recipe.semi.feature_matching:
        gaps = feature_gaps(out.features_q, out.features_p, y, share)
        gap = dist.gather(gaps.detach().sum(0)).sum(0) / size
        loss_g = feature_matching_losses(gaps, gap)
    return loss_d, loss_g


def measures(out: Pass, y: Tensor) -> dict[str, Tensor]:
    """What the authors monitor: losses, accuracies, and the values of codes and generated images.

    Where D tells classes apart also the loss and the error on the images with a class, y >= 0.
    """
    a, b = evidence(out.logits_q), evidence(out.logits_p)
    loss_d, loss_g = per_image_losses(a, b)
    data, sample = accuracies(a, b)
    return {
        "loss/d": loss_d,
        "loss/g": loss_g,
        "accuracy/data": data,
        "accuracy/sample": sample,
        "mu": out.mu,
        "sigma": out.log_sigma.float().exp(),
        "z_hat": out.z_hat,
        "x_tilde": out.x_tilde,
        **(class_measures(out.logits_q, y) if out.logits_q.dim() == 2 else {}),
    }


def class_measures(logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The loss and the error of the classes from logits [N, K], on the rows whose y, on the CPU, is a class."""
    rows = (y >= 0).nonzero()[:, 0].to(logits.device)
    logits, y = logits[rows], y.to(logits.device)[rows]
    return {"loss/labelled": class_losses(logits, y), "error/labelled": (logits.argmax(1) != y).float()}
