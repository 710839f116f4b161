"""One update of ALI (arXiv:1606.00704, algorithm 1): one forward pass, two losses, both updates together."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ali_dist import dist
from ali_dist.data.stream import Batch
from ali_dist.losses import derivative_ratios
from ali_dist.nets import Pass
from ali_dist.objective import losses, report
from ali_dist.state import TrainState, derived_seed
from kernels import FlatAdam


class Noise(NamedTuple):
    z: Tensor  # prior draws, float32 [n, latent]
    eps: Tensor  # the encoder's noise, float32 [n, latent]
    rng: Tensor  # dropout's int64 [seed, step] on this rank


class Inputs(NamedTuple):
    """What one pass reads on the device besides the state."""

    x: Tensor  # uint8 [n, C, H, W]
    y: Tensor  # int64 [n], or attributes [n, labels]
    z: Tensor
    eps: Tensor
    rng: Tensor


def on_device(state: TrainState, tensor: Tensor) -> Tensor:
    """The tensor on the device; to a GPU it is copied while the host goes on."""
    return (tensor.pin_memory() if state.device.type == "cuda" else tensor).to(state.device, non_blocking=True)


def draw_noise(state: TrainState, batch: Batch, micro: int) -> Noise:
    """This rank's rows of the noise for the whole batch, which is the same whatever the number of workers.

    Dropout's masks are counted from each rank's own first row, so they do depend on the number of workers.
    """
    seed = derived_seed(state.recipe.seed, state.num_images, micro)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, batch.size, state.model.nets.latent, generator=generator)
    dropout = derived_seed(state.recipe.seed, "dropout", micro, dist.rank())
    rng = torch.tensor([dropout, state.num_images])
    return Noise(*on_device(state, noise[:, batch.rows]), on_device(state, rng))


def training_images(state: TrainState, batch: Batch, micro: int) -> Tensor:
    """This rank's images, uint8 on the device; mirrored or not whatever the number of workers."""
    x = batch.x.to(state.device, non_blocking=True)
    if not state.recipe.flips:
        return x
    generator = torch.Generator().manual_seed(derived_seed(state.recipe.seed, "flips", state.num_images, micro))
    mirror = on_device(state, (torch.rand(batch.size, generator=generator) < 0.5)[batch.rows])
    return torch.where(mirror[:, None, None, None], x.flip(3), x)


def prepare(state: TrainState, batch: Batch, micro: int) -> Inputs:
    """The inputs of the pass over a batch's micro-batch number `micro`."""
    y = batch.y.to(state.device, non_blocking=True)
    return Inputs(training_images(state, batch, micro), y, *draw_noise(state, batch, micro))


def to_unit_range(x: Tensor, device: torch.device) -> Tensor:
    """uint8 [N, C, H, W] -> float32 in [0, 1] on the device, channels_last."""
    return x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last).float().div_(255)


def autocast(state: TrainState) -> AbstractContextManager:
    return torch.autocast(state.device.type, torch.bfloat16) if state.recipe.precision == "bf16" else nullcontext()


def step(state: TrainState, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """One update from a batch, given as its micro-batches; returns each one's measures, and the gradient norms.

    Ranks may hold unequal shares of a batch: each image weighs the same, whichever rank holds it.
    """
    reports = []
    clear_gradients(state)
    for micro, batch in enumerate(batches):
        last = micro == len(batches) - 1
        inputs = prepare(state, batch, micro)
        with nullcontext() if last or dist.world_size() == 1 else state.forward.no_sync():
            # DDP averages over ranks, so a sum over this rank's images counts world_size times.
            out, measures = both_losses(state, inputs, batch.size, dist.world_size() / (batch.size * len(batches)))
            through_generator(state, out)
        reports.append(measures)
    return [*reports, update(state, reports)]


def both_losses(state: TrainState, inputs: Inputs, size: int, weight: float) -> tuple[Pass, dict[str, Tensor]]:
    """One forward pass; adds L_D's gradient to D's parameters, and leaves L_G's where the pass is cut.

    The losses are this rank's sums times `weight`; `size` is the number of images on all ranks. Returns the pass and
    its measures.
    """
    x, y, z, eps, rng = inputs
    with autocast(state):
        out = state.forward(to_unit_range(x, state.device), z, eps, rng, y, cut=True, two_seeds=state.stacked_seeds)
    loss_d, loss_g = losses(state.recipe, out, y, size)
    through_discriminator(state, out, loss_d.sum() * weight, loss_g.sum() * weight)
    with torch.no_grad():
        return out, report(state.recipe, out, y, loss_d, loss_g)


def through_discriminator(state: TrainState, out: Pass, loss_d: Tensor, loss_g: Tensor) -> None:
    """Adds L_D's gradient to D's parameters, and leaves L_G's where the pass is cut."""
    seen = list(out.cut.seen)
    if state.stacked_seeds:
        (logits, features), leaves = out.verdict
        of_d = torch.autograd.grad(loss_d, leaves[0], retain_graph=True)
        of_g = torch.autograd.grad(loss_g, leaves, allow_unused=True, materialize_grads=True)
        handed = _Handed.apply([*of_d, *of_g], *logits, features[1])
        handed.backward(inputs=[*state.leaves["discriminator"], *seen])
        return
    if not state.one_sweep:
        loss_d.backward(inputs=state.leaves["discriminator"], retain_graph=True)
        loss_g.backward(inputs=seen)
        return
    loss_d.backward(inputs=[*state.leaves["discriminator"], *seen])
    with torch.no_grad():
        for leaf, ratios in zip(seen, derivative_ratios(out.logits_q, out.logits_p), strict=True):
            leaf.grad.mul_(ratios.view(-1, *[1] * (leaf.dim() - 1)))


def through_generator(state: TrainState, out: Pass) -> None:
    """Adds L_G's gradient to the parameters of encoder and decoder."""
    handed = _Handed.apply([leaf.grad for leaf in out.cut.seen], *out.cut.made)
    handed.backward(inputs=state.leaves["generator"])


class _Handed(torch.autograd.Function):
    """A number whose gradients at some tensors are given ones.

    torch.autograd.backward takes gradients too, but imports PyTorch's compiler to look at their shapes.
    """

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def clear_gradients(state: TrainState) -> None:
    for optimizer in state.optimizers.values():
        if isinstance(optimizer, FlatAdam):
            optimizer.zero_grad()
    for parameter in (*state.discriminator, *state.generator):
        parameter.grad = None


def update(state: TrainState, reports: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Moves the optimizers, the clock and the averaged weights; returns the gradient norms.

    Whether those and the losses in the reports are finite is noted in `state.finite`, for the loop to ask; on a CPU
    NonFinite is raised here when they are not, before anything moves.
    """
    norms = gradient_norms(state)
    state.finite.note(norms | report_losses(reports))
    if state.finite.at_once:
        state.finite.check([state.num_images])
    for optimizer in state.optimizers.values():
        optimizer.step()
    state.num_images += state.recipe.optim.batch_size
    state.average_weights(state.averaging_weight(state.num_images))
    return norms


def report_losses(reports: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """This rank's sum of each loss."""
    return {name: sum(report[name].sum() for report in reports) for name in reports[0] if name.startswith("loss/")}


def gradient_norms(state: TrainState) -> dict[str, Tensor]:
    """Euclidean norm of each network's gradient; after DDP's reduction the same on all ranks."""
    norms = {}
    for name, optimizer in state.optimizers.items():
        if isinstance(optimizer, FlatAdam):
            norms |= flat_norms(state, name, *optimizer.gather())
            continue
        for network in networks_of(state, name):
            gradients = [p.grad for p in getattr(state.model, network).parameters()]
            norms[f"grad_norm/{network}"] = torch.stack(torch._foreach_norm(gradients)).norm()
    return norms


def networks_of(state: TrainState, optimizer: str) -> list[str]:
    """Names of the networks that an optimizer trains."""
    names = ["discriminator"] if optimizer == "discriminator" else ["encoder", "decoder", "embedding"]
    networks = {name: getattr(state.model, name) for name in names}
    return [name for name, network in networks.items() if network is not None and list(network.parameters())]


def flat_norms(state: TrainState, optimizer: str, gradient: Tensor) -> dict[str, Tensor]:
    """`gradient_norms` of the networks that a FlatAdam trains, from its flat gradient."""
    norms = {}
    for network in networks_of(state, optimizer):
        place = state.optimizers[optimizer].slice_of(list(getattr(state.model, network).parameters()))
        norms[f"grad_norm/{network}"] = gradient[place].norm()
    return norms
