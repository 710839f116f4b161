"""One backward sweep for two losses: tensors that stand for two equal ones, [2, N, C, H, W], first L_D's, then L_G's.

Both halves are the same memory, and all that is computed forward is computed once. Only their gradients differ: what
begins a sweep is a gradient, its seed, for each loss. Parameters get the gradient of L_D alone, and what enters the
sweep's other end, [N, C, H, W], that of L_G alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

InputGradient = Callable[[Tensor, torch.Size], Tensor]


def is_doubled(x: Tensor) -> bool:
    """Whether a tensor of planes, [N, C, H, W] otherwise, stands for two."""
    return x.dim() == 5


def doubled(
    function: Callable[..., Tensor],
    data: Sequence[Tensor],
    parameters: Sequence[Tensor],
    input_gradient: InputGradient | None = None,
) -> Tensor:
    """function(*data) [N, ...] for both losses, [2, N, ...]; `data`, each [2, N, ...] or what enters, need gradients.

    `parameters` are those that `function` uses. Its two vector-Jacobian products are made one after the other, except
    by what is linear in its one input: `input_gradient` makes that of all 2N rows at once from the output's gradient
    and the input's shape.
    """
    return _Doubled.apply(function, input_gradient, len(data), *data, *parameters)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable, input_gradient: InputGradient | None, count: int, *tensors: Tensor):
        ctx.doubled = [is_doubled(x) for x in tensors[:count]]
        ctx.input_gradient = input_gradient if all(ctx.doubled) else None
        leaves = [
            (x[0] if two else x).detach().requires_grad_() for x, two in zip(tensors[:count], ctx.doubled, strict=True)
        ]
        with torch.enable_grad():
            y = function(*leaves)
        ctx.kept = y, leaves, tensors[count:]
        return y.detach().expand(2, *y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y, leaves, parameters), ctx.kept = ctx.kept, None  # which are freed as the sweep goes on
        if ctx.input_gradient:
            (x,) = leaves
            dx = ctx.input_gradient(dy.flatten(0, 1), (2 * len(x), *x.shape[1:]))
            return None, None, None, dx.unflatten(0, (2, -1)), *_product(y, dy[0], parameters)
        of_g = _product(y, dy[1], leaves, retain_graph=True)
        wanted = [leaf for leaf, two in zip(leaves, ctx.doubled, strict=True) if two]
        of_d = _product(y, dy[0], [*wanted, *parameters])
        firsts, rest = iter(of_d), of_d[len(wanted) :]
        data = [_stacked(next(firsts), dx) if two else dx for dx, two in zip(of_g, ctx.doubled, strict=True)]
        return None, None, None, *data, *rest


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """[2, N, ...] of two [N, ...], as the rows of one tensor, which keeps their layout."""
    return torch.cat([first, second]).unflatten(0, (2, -1))


def _product(y: Tensor, dy: Tensor, wanted: Sequence[Tensor], retain_graph: bool = False) -> tuple[Tensor, ...]:
    """The gradients at `wanted` where that at y is dy."""
    with torch.enable_grad():
        return torch.autograd.grad(handed([y], [dy]), wanted, retain_graph=retain_graph)


def handed(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A number whose gradients at the tensors are the given ones.

    torch.autograd.backward takes gradients too, but imports PyTorch's compiler to look at their shapes.
    """
    return _Handed.apply(gradients, *tensors)


class _Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients
