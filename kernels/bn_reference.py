"""The passes of bn_leaky_relu in plain torch: the same functions as in bn_forward and bn_backward."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.random import dropout_ref

Running = tuple[Tensor | None, Tensor | None, Tensor | None]  # mean, variance and the number of batches


def _rows(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(-1, *[1] * (like.dim() - 2))


def _two_terms(mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The float64 mean as k + d of `dtype`; an infinite one is all in k."""
    k = mean.to(dtype)
    return k, torch.where(k.double() == mean, 0.0, mean - k.double()).to(dtype)


def _minus(x: Tensor, k: Tensor, d: Tensor) -> Tensor:
    return (x - _per_channel(k, x)) - _per_channel(d, x)


def stats(x: Tensor) -> Tensor:
    """[count, mean, M2] of each channel, float64 [3, C]."""
    count = x.numel() // x.shape[1]
    if count == 0:
        return x.new_zeros(3, x.shape[1], dtype=torch.float64)
    x = _wide(x)
    guess = x.mean(_rows(x))
    mean = guess.double() + (x - _per_channel(guess, x)).mean(_rows(x)).double()
    m2 = _minus(x, *_two_terms(mean, x.dtype)).square().sum(_rows(x)).double()
    return torch.stack([torch.full_like(mean, count), mean, m2])


def _saved(mean: Tensor, var: Tensor, count: Tensor, eps: float, x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.stack([*_two_terms(mean, dtype), (var + eps).rsqrt().to(dtype), count.to(dtype)])


def finish(gathered: Tensor, x: Tensor, running: Running, momentum: float, eps: float) -> Tensor:
    """[k, d, 1/std, count], mean = k + d, from statistics [W, 3, C] (Chan et al., 1979); updates the running ones."""
    counts, means, m2s = gathered.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    var = (m2s + counts * (means - mean).square()).sum(0) / count
    running_mean, running_var, num_batches = running
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * count / (count - 1).clamp_min(1)).to(running_var.dtype), momentum)
    if num_batches is not None:
        num_batches.add_(1)
    return _saved(mean, var, count, eps, x)


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, saved: Tensor) -> tuple[Tensor, Tensor]:
    """xhat and z."""
    x = _wide(x)
    xhat = _minus(x, saved[0], saved[1]) * _per_channel(saved[2], x)
    return xhat, xhat if weight is None else xhat * _per_channel(weight, x) + _per_channel(bias, x)


def apply(
    x: Tensor, weight, bias, saved: Tensor, running: Running, rng, training: bool, eps, slope, dropout, offset
) -> Tensor:
    """y from `saved`; in evaluation from the running statistics, which then are written to `saved`."""
    if not training:
        mean, var = running[0].double(), running[1].double()
        saved.copy_(_saved(mean, var, torch.full_like(mean, x.numel() // x.shape[1]), eps, x))
    z = _normalised(x, weight, bias, saved)[1]
    return dropout_ref(F.leaky_relu(z, slope), dropout, rng, offset).to(x.dtype)


def forward(
    x: Tensor, weight, bias, running: Running, rng, training: bool, momentum, eps, slope, dropout, offset
) -> tuple[Tensor, Tensor]:
    if training:
        saved = finish(stats(x)[None], x, running, momentum, eps)
    else:
        saved = x.new_empty(4, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return apply(x, weight, bias, saved, running, rng, training, eps, slope, dropout, offset), saved


def _gradient(dy: Tensor, x: Tensor, weight, bias, saved, rng, slope, dropout, offset) -> tuple[Tensor, Tensor]:
    """g, the gradient at z, and xhat."""
    xhat, z = _normalised(x, weight, bias, saved)
    dy = dropout_ref(_wide(dy), dropout, rng, offset)
    return torch.where(z > 0, dy, dy * slope), xhat


def gradient_sums(dy: Tensor, x: Tensor, weight, bias, saved, rng, slope, dropout, offset) -> tuple[Tensor, ...]:
    """Sums of g and of g * xhat, [2, C]; dweight and dbias, empty without a weight."""
    g, xhat = _gradient(dy, x, weight, bias, saved, rng, slope, dropout, offset)
    dbias, dweight = g.sum(_rows(x)), (g * xhat).sum(_rows(x))
    sums = torch.stack([dbias, dweight])
    if weight is None:
        return sums, x.new_empty(0), x.new_empty(0)
    return sums, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _input_grad(g: Tensor, xhat: Tensor, weight: Tensor | None, saved: Tensor, means: Tensor) -> Tensor:
    scale = saved[2] if weight is None else saved[2] * weight
    return (g - _per_channel(means[0], g) - xhat * _per_channel(means[1], g)) * _per_channel(scale, g)


def input_grad(dy: Tensor, x: Tensor, weight, bias, saved, sums, rng, slope, dropout, offset) -> Tensor:
    """dx from the sums over all rows that `saved` counts."""
    g, xhat = _gradient(dy, x, weight, bias, saved, rng, slope, dropout, offset)
    return _input_grad(g, xhat, weight, saved, sums / saved[3]).to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, weight, bias, saved, rng, training: bool, slope, dropout, offset
) -> tuple[Tensor, Tensor, Tensor]:
    sums, dweight, dbias = gradient_sums(dy, x, weight, bias, saved, rng, slope, dropout, offset)
    if training:
        return input_grad(dy, x, weight, bias, saved, sums, rng, slope, dropout, offset), dweight, dbias
    g = _gradient(dy, x, weight, bias, saved, rng, slope, dropout, offset)[0]
    scale = saved[2] if weight is None else saved[2] * weight
    return (g * _per_channel(scale, g)).to(x.dtype), dweight, dbias


class SynchronisedNorm(torch.autograd.Function):
    """Batch norm of all ranks' rows from PyTorch's own routines: what a CPU trains with.

    With the statistics known, PyTorch's evaluation mode gives z, and its backward both sums and the gradient but for
    what flows through the statistics; that is affine in x, so evaluation mode computes it too.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running, momentum, eps, reduce):
        rows = x.numel() // x.shape[1]
        local, shift = x.new_zeros(3, x.shape[1], dtype=torch.float64), 0.0
        if rows:  # PyTorch's routine does not stand none
            if x.dtype in (torch.float32, torch.float64):  # it loses digits to a mean far from zero
                shift = x[0].reshape(x.shape[1], -1)[:, 0]
                x = x - _per_channel(shift, x)
            _, mean, invstd = torch.native_batch_norm(x, None, None, None, None, True, 0.0, 0.0)
            var = torch.where(invstd == 0, 0.0, invstd.double().pow(-2))  # it says 0 for a constant channel
            local[0], local[1], local[2] = rows, mean.double() + shift, rows * var
        k, d, invstd, count = finish(reduce(local), x, running, momentum, eps)
        if count[0] <= 1:
            raise ValueError("Expected more than 1 value per channel over all ranks when training")
        mean, var = (k - shift) + d, invstd.pow(-2)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.reduce = reduce
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, 0.0) if rows else x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, weight, mean, var, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        dx, dweight, dbias = dz, torch.zeros_like(scale), torch.zeros_like(scale)
        if x.numel():
            statistics = (mean, var, None, None, False, 0.0)
            dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(dz, x, scale, *statistics, [True] * 3)
        means = ctx.reduce(torch.stack([dweight, dbias])).sum(0) / count
        if x.numel():
            dx -= F.batch_norm(x, mean, var, *(means * scale * var.rsqrt()), False, 0.0, 0.0)
        return dx, *((None, None) if weight is None else (dweight, dbias)), *(None,) * 4
