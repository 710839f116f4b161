"""One backward sweep for two losses: tensors that come as two, the first for L_D, the second for L_G.

Both are the same memory, and what is computed forward is computed once. Only their gradients differ: the seed that a
sweep begins with is a gradient for each loss. Parameters get the gradient of L_D alone, and what enters at the sweep's
other end, one tensor still, gets that of L_G alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Both = tuple[Tensor, Tensor]
InputGradient = Callable[[Tensor, tuple[int, ...]], Tensor]


def for_both(
    function: Callable[..., Tensor],
    data: Sequence[Tensor | Both],
    parameters: Sequence[Tensor],
    input_gradient: InputGradient | None = None,
) -> Both:
    """function(*data) [N, ...] for both losses; all of `data` [N, ...] is for both too, or all of it enters here.

    `data` and `parameters`, those that `function` uses, need gradients. Either loss's are made by themselves, except
    by `input_gradient` of a function of one input: given any number of rows of the gradient at the output, and the
    shape of as many rows of the input, it makes the gradient there.
    """
    pairs = [x if isinstance(x, tuple) else (None, x) for x in data]
    firsts, seconds = zip(*pairs, strict=True)
    return _ForBoth.apply(function, input_gradient, len(pairs), *firsts, *seconds, *parameters)


class _ForBoth(torch.autograd.Function):
    """Its gradients are made by autograd on the graph of `function` alone, gone through for each loss."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable, input_gradient: InputGradient | None, count: int, *tensors: Tensor | None
    ) -> Both:
        leaves = [x.detach().requires_grad_() for x in tensors[count : 2 * count]]
        with torch.enable_grad():
            y = function(*leaves)
        ctx.kept = y, leaves, tensors[2 * count :], input_gradient
        return y.detach(), y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_d: Tensor, of_g: Tensor) -> tuple[Tensor | None, ...]:
        (y, leaves, parameters, input_gradient), ctx.kept = ctx.kept, None  # to be freed before the sweep goes on
        enters = not ctx.needs_input_grad[3]
        if input_gradient and not enters:
            shape = (2 * len(leaves[0]), *leaves[0].shape[1:])
            firsts, seconds = ([dx] for dx in input_gradient(torch.cat([of_d, of_g]), shape).chunk(2))
            rest = torch.autograd.grad(y, parameters, of_d)
        else:
            seconds = torch.autograd.grad(y, leaves, of_g, retain_graph=True)
            made = torch.autograd.grad(y, parameters if enters else [*leaves, *parameters], of_d)
            firsts, rest = ([None] * len(leaves), made) if enters else (made[: len(leaves)], made[len(leaves) :])
        return None, None, None, *firsts, *seconds, *rest
