"""The baseline of semi-supervised training: the same discriminator as a classifier, from the labelled images alone."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor

from ali_dist import dist
from ali_dist.data.stream import Batch
from ali_dist.state import TrainState
from ali_dist.step import autocast, clear_gradients, draw_noise, to_unit_range, training_images, update
from kernels import bias_leaky_relu_dropout


def supervised_step(state: TrainState, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """One update of D(x, 0) by -log softmax(logits)_y, the mean over the batch, with all of D's dropout.

    Like `step.step`: a batch in micro-batches, of which ranks may hold unequal shares; measures, and gradient norms.
    """
    nets, reports = state.model.nets, []
    dropout = nets.discriminator_x[0].dropout
    clear_gradients(state)
    for micro, batch in enumerate(batches):
        last = micro == len(batches) - 1
        rng = draw_noise(state, batch, micro).rng
        x = to_unit_range(training_images(state, batch, micro), state.device)
        y = batch.y.to(state.device, non_blocking=True)
        x = bias_leaky_relu_dropout(x, None, 1.0, dropout, rng, 0, state.model.impl)
        z = x.new_zeros(len(x), nets.latent, 1, 1)
        with nullcontext() if last or dist.world_size() == 1 else state.forward.no_sync():
            with autocast(state):
                logits, _ = state.forward(x, z, rng)
            losses = F.cross_entropy(logits, y, reduction="none")
            (losses.sum() * dist.world_size() / (batch.size * len(batches))).backward()
        reports.append({"loss/labelled": losses.detach(), "error/labelled": (logits.argmax(1) != y).to(losses.dtype)})
    return [*reports, update(state, reports)]
