"""What follows the products of stacked networks, in few passes over memory; x is [R, N, C], R independent runs."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        # torch.var_mean is several times slower on a CPU.
        x_hat = x - x.mean(1, keepdim=True)
        rstd = x_hat.square().mean(1, keepdim=True).add_(eps).rsqrt_()
        x_hat.mul_(rstd)
        y = torch.addcmul(shift, x_hat, scale).relu_()
        ctx.save_for_backward(x_hat, y, scale, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, y, scale, rstd = ctx.saved_tensors
        dy = torch.ops.aten.threshold_backward(dy, y, 0)
        dshift = dy.sum(1, keepdim=True)
        dscale = (dy * x_hat).sum(1, keepdim=True)
        # dx = scale * rstd * (dy - mean(dy) - x_hat * mean(dy * x_hat)), the means over N
        dx = dy.addcmul_(x_hat, dscale, value=-1 / dy.shape[1]).sub_(dshift / dy.shape[1]).mul_(scale * rstd)
        return dx, dscale, dshift, None


def batch_norm_relu(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """max(0, scale * x_hat + shift), x_hat normalised by each run's own mean and variance over N (biased).

    x: [R, N, C]; scale, shift: [R, 1, C].
    """
    return _BatchNormReLU.apply(x, scale, shift, eps)


class _Maxout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, pieces: int) -> Tensor:
        x = x.unflatten(-1, (pieces, -1))
        y = x.amax(-2)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        # Comparing into a float buffer and multiplying is many times faster on a CPU than torch.where.
        winners = torch.ge(x, y.unsqueeze(-2), out=torch.empty_like(x))
        share = dy / winners.sum(-2)  # bfloat16 products do tie
        return winners.mul_(share.unsqueeze(-2)).flatten(-2), None


def maxout(x: Tensor, pieces: int) -> Tensor:
    """[R, N, pieces * C] -> [R, N, C], the largest of x[..., p * C + c] over p (Goodfellow et al., arXiv:1302.4389).

    Pieces that tie share the gradient, as in torch.amax.
    """
    return _Maxout.apply(x, pieces)
