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


def report(recipe: Recipe, out: Pass, y: Tensor, loss_d: Tensor, loss_g: Tensor) -> dict[str, Tensor]:
    """The measures of a pass of training, whose losses are these."""
    values = {"loss/d": loss_d, "loss/g": loss_g, **measures(out, y, recipe.labelled_share)}
    return {name: value.detach() for name, value in values.items()}


def validation_report(recipe: Recipe, out: Pass, y: Tensor) -> dict[str, Tensor]:
    """The measures of a pass over validation images, each of which is an image with its class and one without.

    There is no L_G by feature matching: that is of a whole batch, and depends on its size.
    """
    loss_d, loss_g = per_image_losses(evidence(out.logits_q), evidence(out.logits_p))
    values = measures(out, y)
    losses = {"loss/d": loss_d + values.get("loss/labelled", 0), "loss/g": loss_g}
    if recipe.semi.feature_matching:
        del losses["loss/g"]
    return losses | values


def measures(out: Pass, y: Tensor, share: float = 1.0) -> dict[str, Tensor]:
    """What the authors monitor besides the losses: accuracies, and the values of codes and generated images.

    Where D tells classes apart also the loss and the error on the images with a class, which `share` of all have.
    """
    data, sample = accuracies(evidence(out.logits_q), evidence(out.logits_p))
    return {
        "accuracy/data": data,
        "accuracy/sample": sample,
        "mu": out.mu,
        "sigma": out.log_sigma.float().exp(),
        "z_hat": out.z_hat,
        "x_tilde": out.x_tilde,
        **(class_measures(out.logits_q, y, share) if out.logits_q.dim() == 2 else {}),
    }


def class_measures(logits: Tensor, y: Tensor, share: float) -> dict[str, Tensor]:
    """The loss and the error of the classes, [N] each, from logits [N, K] and y, int64 [N], -1 where it is unknown.

    Such rows have 0 and the others 1 / `share` of theirs, so that the mean over all is that of the labelled ones: rows
    taken out would come back to the host to be counted.
    """
    y = y.to(logits.device)
    weight, wrong = (y >= 0).to(logits.dtype) / share, logits.argmax(1) != y
    return {"loss/labelled": weight * class_losses(logits, y.clamp(min=0)), "error/labelled": weight * wrong}
