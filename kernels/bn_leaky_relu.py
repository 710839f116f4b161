"""y = dropout(leaky_relu(batch_norm(x), slope), p): batch norm, its activation and the next layer's input dropout.

x: [N, C] or [N, C, H, W], float32, bfloat16 or float16; weight, bias, running statistics: [C]; y: as x. Per channel,
over the rows (images and pixels), with slope 1 for batch norm alone:
    xhat = (x - mean) / sqrt(var + eps),  z = weight * xhat + bias,  y = dropout(z if z > 0 else slope * z)
    running = (1 - momentum) * running + momentum * (mean, M2 / (count - 1))
Backward, with g = dropout(dy) * (1 if z > 0 else slope):
    dbias = sum g,  dweight = sum g * xhat,  dx = weight / std * (g - dbias / count - xhat * dweight / count)
Only x, the mean and 1/std are kept; the mask is drawn again and the sign of z recomputed.

Channels whose rows fit one block: one launch each way, 2 + 3 passes over the tensor. Otherwise two phases: 3 + 5 passes
in two launches each way. Across ranks `reduce` joins the two phases: every rank's float64 statistics [3, C] (count,
mean, M2) go in and those of all ranks [W, 3, C] come out, as from an all-gather; backward calls it once more with the
rank's [2, C] sums. Ranks may have any number of rows, also none. Gathered rows are merged in rank order, so that every
rank gets the same bits. dweight and dbias are the rank's own sums: averaging gradients is the caller's matter.
"""

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import bn_backward, bn_forward, bn_reference
from kernels.dispatch import below_autograd, register, uncompiled, use_triton
from kernels.random import check_rng, dropout_ref
from kernels.tiles import check_channels, dense, dense_like

Reduce = Callable[[Tensor], Tensor]


def check_norm(x: Tensor, weight, bias, running_mean, running_var, training: bool, reduce: Reduce | None) -> None:
    """Raises ValueError for arguments of a batch norm over `x` that do not fit together or are on several devices."""
    check_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if (weight is None) != (bias is None) or (running_mean is None) != (running_var is None):
        raise ValueError("weight and bias, and the running statistics, come in pairs")
    if not training and running_mean is None:
        raise ValueError("evaluation needs running statistics")
    if training and reduce is None and x.numel() <= x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")


def bn_leaky_relu_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.01,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return dropout_ref(_activated(z, slope), dropout, rng, offset)


def _activated(z: Tensor, slope: float) -> Tensor:
    """In place: backward keeps the result, which the next layer keeps too, and neither needs z."""
    return z if slope == 1 else F.leaky_relu(z, slope, inplace=True)


def _modules(triton: bool) -> tuple[ModuleType, ModuleType]:
    return (bn_forward, bn_backward) if triton else (bn_reference, bn_reference)


def _forward(x, weight, bias, mean, var, batches, rng, training, momentum, eps, slope, dropout, offset, triton):
    module = _modules(triton)[0]
    running = (mean, var, batches)
    out = module.forward(dense(x), weight, bias, running, rng, training, momentum, eps, slope, dropout, offset)
    if triton and training:
        bn_forward.mark_updated(running)
    return out


def _backward(dy, x, weight, bias, saved, rng, training, slope, dropout, offset, triton):
    x = dense(x)
    args = (dense_like(dy, x), x, weight, bias, saved, rng, training, slope, dropout, offset)
    return _modules(triton)[1].backward(*args)


def _fake_backward(dy, x, weight, *_):
    return torch.empty_like(dense(x)), *(x.new_empty(0) if weight is None else torch.empty_like(weight) for _ in "wb")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, batches, rng, training, momentum, eps, *options):
        with below_autograd():
            y, saved = _forward_op(x, weight, bias, mean, var, batches, rng, training, momentum, eps, *options)
        ctx.save_for_backward(x, weight, bias, saved, rng)
        ctx.options = (training, *options)
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return y, saved

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 14
        dx, dweight, dbias = _backward_op(dy, *ctx.saved_tensors, *ctx.options)
        affine = (None, None) if ctx.saved_tensors[1] is None else (dweight, dbias)
        return dx, *affine, *(None,) * 11


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rng, running, momentum, eps, options, reduce, triton):
        module, x = _modules(triton)[0], dense(x)
        saved = module.finish(reduce(module.stats(x)), x, running, momentum, eps)
        if not x.is_cuda and saved[3, 0] <= 1:
            raise ValueError("Expected more than 1 value per channel over all ranks when training")
        ctx.save_for_backward(x, weight, bias, saved, rng)
        ctx.options, ctx.reduce, ctx.triton = options, reduce, triton
        return module.apply(x, weight, bias, saved, running, rng, True, eps, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, saved, rng = ctx.saved_tensors
        module, dy = _modules(ctx.triton)[1], dense_like(dy, x)
        sums, dweight, dbias = module.gradient_sums(dy, x, weight, bias, saved, rng, *ctx.options)
        sums = ctx.reduce(sums).sum(0)
        dx = module.input_grad(dy, x, weight, bias, saved, sums, rng, *ctx.options)
        return dx, *((None, None) if weight is None else (dweight, dbias)), *(None,) * 7


_forward_op = register(
    "bn_leaky_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked, Tensor? rng, bool training, float momentum, float eps, float slope,"
    " float dropout, int offset, bool triton) -> (Tensor, Tensor)",
    _forward,
    lambda x, *_: (torch.empty_like(dense(x)), bn_forward.new_saved(x)),
    _Function,
)
_backward_op = register(
    "bn_leaky_relu_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor saved, Tensor? rng,"
    " bool training, float slope, float dropout, int offset, bool triton) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


@uncompiled
def _synchronised(*args):
    return _Synchronised.apply(*args)


@uncompiled
def _synchronised_norm(*args):
    return bn_reference.SynchronisedNorm.apply(*args)


def bn_leaky_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.01,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
    reduce: Reduce | None = None,
    impl: str = "auto",
) -> Tensor:
    """dropout(leaky_relu(batch_norm(x), slope), dropout), with the layout and dtype of x.

    In training it normalises with the batch's statistics (of all ranks, given `reduce`), updates the running ones that
    are given and adds 1 to num_batches_tracked; in evaluation it uses the running ones. `rng` (int64 [seed, step]) and
    `offset` are read only when dropout > 0. Raises ValueError for a wrong shape, device, dropout or rng and for one row
    in training, TypeError for a dtype without kernels, RuntimeError when `impl` cannot run here.
    """
    check_norm(x, weight, bias, running_mean, running_var, training, reduce)
    check_rng(dropout, rng, offset, x)
    triton, running = use_triton(impl, x), (running_mean, running_var, num_batches_tracked)
    options = (slope, dropout, offset)
    if training and reduce is not None and not triton:
        z = _synchronised_norm(x, weight, bias, running, momentum, eps, reduce)
        return dropout_ref(_activated(z, slope), dropout, rng, offset)
    if training and reduce is not None:
        return _synchronised(x, weight, bias, rng, running, momentum, eps, options, reduce, triton)
    if triton:
        return _forward_op(x, weight, bias, *running, rng, training, momentum, eps, *options, True)[0]
    settings = {"training": training, "momentum": momentum, "eps": eps, "slope": slope}
    return bn_leaky_relu_ref(x, weight, bias, *running, **settings, dropout=dropout, rng=rng, offset=offset)
