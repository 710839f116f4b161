"""The layers that all networks are made of: one for each row of a table.

What surrounds the convolutions is `kernels`: Triton on CUDA, plain torch on a CPU, the same functions either way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ali_dist.seeds import Both, for_both
from ali_dist.tables import BN_EPS, BN_MOMENTUM, INIT_STD, Row, plane_shapes
from kernels import BatchNormLeakyReLU, bias_leaky_relu_dropout, maxout

FEW_PIXELS = 16  # of a plane, up to which a CPU makes a weight's gradient of gathered patches: 10 to 40 % less time


@dataclass(frozen=True, slots=True)
class Wiring:
    """What all layers of a model share."""

    slope: float
    gather: Callable[[Tensor], Tensor] | None = None
    """[*shape] of this rank -> [W, *shape] of all, which makes batch norm see all workers' images; see dist.gather."""
    impl: str = "auto"
    """Which implementation of the kernels: auto, ref or triton."""


class Layer(nn.Module):
    """One row of a table: [N, C, H, W] -> [N, C', H', W'].

    `dropout` is the next row's input dropout, drawn here because it costs nothing beside the activation; `offset` tells
    its mask apart from other layers'. Convolutions whose kernel covers the whole plane are matrix products: the same
    sums, many times faster than convolution routines make them on 1x1 planes.
    """

    def __init__(self, row: Row, in_shape: tuple[int, int, int], dropout: float, offset: int, wiring: Wiring) -> None:
        super().__init__()
        self.row, self.dropout, self.offset, self.wiring = row, dropout, offset, wiring
        (out_shape,) = plane_shapes(in_shape, [row])
        in_maps = in_shape[0] + row.embedding
        channels = (in_maps, row.maps) if row.transposed else (row.maps, in_maps)
        self.weight = nn.Parameter(torch.empty(*channels, row.kernel, row.kernel))
        self.rounded: Tensor | None = None  # in training the weight as autocast would round it, kept by the optimizer
        self.covers_plane = (1 if row.transposed else row.kernel) == in_shape[1] == in_shape[2]
        _, height, width = in_shape if row.transposed else out_shape
        self.few_pixels = height * width <= FEW_PIXELS
        shape = {"none": None, "channel": row.maps, "pixel": out_shape}[row.bias]
        self.register_parameter("bias", None if shape is None else nn.Parameter(torch.empty(shape)))
        self.bn = (
            BatchNormLeakyReLU(
                row.maps,
                eps=BN_EPS,
                momentum=BN_MOMENTUM,
                slope=wiring.slope,
                dropout=dropout,
                offset=offset,
                reduce=wiring.gather,
                impl=wiring.impl,
            )
            if row.bn
            else None
        )

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.bn is not None:
            self.bn.reset_parameters()

    def forward(self, x: Tensor | Both, rng: Tensor | None = None, two_seeds: bool = False) -> Tensor | Both:
        """`rng`: see ali_dist.state; needed in training where there is dropout. `two_seeds`: see `convolve`."""
        return self.activate(self.convolve(x, two_seeds=two_seeds), rng)

    def convolve(self, x: Tensor | Both, pair: bool = False, two_seeds: bool = False) -> Tensor | Both:
        """The convolution without its bias.

        `pair`: x is data and samples [2N, C, H, W], to the second half of which alone a gradient goes back.
        `two_seeds`: what comes out is for both losses (see ali_dist.seeds), as x may be.
        """
        weight = self._factors()
        if not two_seeds:
            return self._convolved(x, weight, pair)
        weight = weight.to((x[0] if isinstance(x, tuple) else x).dtype)  # once for both directions
        # On larger planes more rows gain nothing, and putting them together costs.
        stacks = self.few_pixels and not self.row.transposed
        stacked = partial(self._input_gradient, weight.detach()) if stacks else None
        return for_both(lambda x: self._convolved(x, weight, pair), [x], [weight], stacked)

    def _convolved(self, x: Tensor, weight: Tensor, pair: bool) -> Tensor:
        row = self.row
        if not self.covers_plane:
            pair = pair and x.requires_grad
            if pair or (self.few_pixels and x.device.type == "cpu"):
                return _Convolution.apply(x, weight.to(x.dtype), row.stride, row.transposed, pair)
            return _convolution(row.transposed)(x, weight, stride=row.stride)
        # In channels_last memory these permutations and reshapes copy nothing.
        if row.transposed:
            matrix = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])  # [k*k*O, I]
            planes = F.linear(x.flatten(1), matrix).view(-1, row.kernel, row.kernel, row.maps)
            return planes.permute(0, 3, 1, 2)
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), _matrix(weight))[:, :, None, None]

    def _input_gradient(self, weight: Tensor, dy: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A convolution's gradient at its input, of that shape [N, C, H, W]."""
        if self.covers_plane:
            return (dy.flatten(1) @ _matrix(weight)).unflatten(1, (*shape[2:], shape[1])).permute(0, 3, 1, 2)
        kind = {"dtype": dy.dtype, "device": dy.device, "memory_format": torch.channels_last}
        x = torch.empty(shape, **kind)  # whose numbers do not count
        return _input_gradient(dy, x, weight, self.row.stride, False)

    def others(self) -> list[nn.Parameter]:
        """The parameters of `activate`."""
        return [parameter for parameter in self.parameters() if parameter is not self.weight]

    def _factors(self) -> Tensor:
        return self.rounded if self.training and self.rounded is not None else self.weight

    def activate(self, x: Tensor | Both, rng: Tensor | None) -> Tensor | Both:
        """Batch norm or bias, the activation, and the next row's dropout."""
        if isinstance(x, tuple):
            return for_both(lambda x: self.activate(x, rng), [x], self.others())
        dropout = self.dropout if self.training else 0.0
        if self.bn is not None:
            return self.bn(x, rng)
        if self.row.act == "lrelu":
            return bias_leaky_relu_dropout(x, self.bias, self.wiring.slope, dropout, rng, self.offset, self.wiring.impl)
        if self.row.act == "maxout":
            return maxout(x, self.bias, dropout, rng, self.offset, self.wiring.impl)
        if self.bias is not None:  # in the bias's float32, whatever the convolution computed in
            x = x + (self.bias if self.row.bias == "pixel" else self.bias[:, None, None])
        return torch.sigmoid(x) if self.row.act == "sigmoid" else x


class _Convolution(torch.autograd.Function):
    """A convolution that makes only the gradients that are wanted, the weight's in the faster way.

    In a `pair` the input's gradient is made of its second half; zeros stand for the first's.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, transposed: bool, pair: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.transposed, ctx.pair = stride, transposed, pair
        return _convolution(transposed)(x, weight, stride=stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        settings = (ctx.stride, ctx.transposed)
        half, dx, dweight = len(x) // 2 if ctx.pair else 0, None, None
        if _is_wanted(ctx, 1):
            inner, outer = (x, dy) if ctx.transposed else (dy, x)
            if x.device.type == "cpu" and inner[0, 0].numel() <= FEW_PIXELS:
                dweight = _weight_gradient(inner, outer, weight.shape[-1], ctx.stride)
            else:
                dweight = _convolution_backward(dy, x, weight, *settings, [False, True, False])[1]
        if _is_wanted(ctx, 0):
            dx = _input_gradient(dy[half:], x[half:], weight, *settings)
            if half:
                dx = torch.cat([torch.zeros_like(x[:half]), dx])
        return dx, dweight, None, None, None


def _convolution(transposed: bool) -> Callable[..., Tensor]:
    return F.conv_transpose2d if transposed else F.conv2d


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, stride: int, transposed: bool, wanted: list[bool]):
    settings = (None, [stride] * 2, [0, 0], [1, 1], transposed, [0, 0], 1)
    return torch.ops.aten.convolution_backward(dy, x, weight, *settings, wanted)


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int, transposed: bool) -> Tensor:
    return _convolution_backward(dy, x, weight, stride, transposed, [True, False, False])[0]


def _matrix(weight: Tensor) -> Tensor:
    """[O, k*k*I] of a convolution's weight [O, I, k, k]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _weight_gradient(inner: Tensor, outer: Tensor, kernel: int, stride: int) -> Tensor:
    """[I, O, k, k] from a convolution's smaller side [N, I, h, w] and larger side [N, O, H, W]: one matrix product."""
    patches = outer.permute(0, 2, 3, 1).unfold(1, kernel, stride).unfold(2, kernel, stride)  # [N, h, w, O, k, k]
    patches = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel * kernel * outer.shape[1])
    product = inner.permute(0, 2, 3, 1).flatten(0, 2).T @ patches
    return product.view(-1, kernel, kernel, outer.shape[1]).permute(0, 3, 1, 2)


def _is_wanted(ctx: Any, i: int) -> bool:
    """Whether this backward pass needs the gradient of the i-th input, which `needs_input_grad` does not tell."""
    node = ctx.next_functions[i][0]
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # autograd.grad of a leaf: it is what was asked for
        return True


def beside(x: Tensor, c: Tensor | None) -> Tensor:
    """[N, C, 1, 1] and an embedding, if there is one, along channels."""
    return x if c is None else torch.cat([x, c], dim=1)


class Chain(nn.Sequential):
    """The layers of one network; `dropout_after` is the input dropout of what follows it."""

    def __init__(
        self,
        part: tuple[tuple[int, int, int], tuple[Row, ...]],
        wiring: Wiring,
        offset: int = 0,
        dropout_after: float = 0.0,
    ) -> None:
        shape, rows = part
        inputs = [shape, *plane_shapes(shape, rows)]
        dropouts = [*(row.dropout for row in rows[1:]), dropout_after]
        super().__init__(*(Layer(row, inputs[i], dropouts[i], offset + i, wiring) for i, row in enumerate(rows)))

    def forward(self, x: Tensor, rng: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        """`c`: the label's embedding [N, E, 1, 1], for the layers that take it."""
        for layer in self:
            x = layer(beside(x, c) if layer.row.embedding else x, rng)
        return x


class Embedding(nn.Module):
    """A linear map of y, shared by all networks: [N, labels] -> [N, E, 1, 1].

    Fixed as in the authors' code, where it is in neither optimizer's list, unless `trained`.
    """

    def __init__(self, labels: int, width: int, trained: bool) -> None:
        super().__init__()
        for name, shape in (("weight", (width, labels)), ("bias", (width,))):
            if trained:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            else:
                self.register_buffer(name, torch.empty(shape))

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, y: Tensor) -> Tensor:
        """y: classes int64 [N], or attributes [N, labels]."""
        return F.linear(self.numbers(y), self.weight, self.bias)[:, :, None, None]

    def numbers(self, y: Tensor) -> Tensor:
        """y as floating point [N, labels], a class one-hot."""
        return (F.one_hot(y, self.weight.shape[1]) if y.dim() == 1 else y).to(self.weight.dtype)
