"""y = dropout([x; x_tilde], p): data and samples as one batch for the discriminator, in the type it computes in.

x: uint8 [N, C, H, W] or [N, C] (scaled to [0, 1]) or floating; x_tilde: floating, of the same shape; y: [2N, ...] of
`dtype`, channels last where x_tilde is. Backward: dx_tilde = dropout(dy, p)[N:]; x gets no gradient.
Reads x and x_tilde, writes y; backward reads and writes half of y: one launch each, nothing kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import FLOATS, below_autograd, launch, register, use_triton
from kernels.random import check_rng, drop, dropout_ref, dropout_threshold, round_to
from kernels.tiles import INTERPRETER_SCALE, MAP_ELEMENTS, check_channels, compute_dtype, dense, is_channels_last


def image_pair_ref(
    x: Tensor,
    x_tilde: Tensor,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    dtype = dtype or x_tilde.dtype
    x = x.to(torch.promote_types(dtype, torch.float32)) / 255 if x.dtype == torch.uint8 else x.detach()
    return dropout_ref(torch.cat([x.to(dtype), x_tilde.to(dtype)]), dropout, rng, offset)


@triton.jit
def _other_layout(o, C, HW, CHANNELS_LAST: tl.constexpr):
    """Offset in an NCHW tensor of what a channels-last one has at `o`; without CHANNELS_LAST the other way round."""
    if CHANNELS_LAST:
        return (o // (C * HW) * C + o % C) * HW + o // C % HW
    return (o // (C * HW) * HW + o % HW) * C + o // HW % C


@triton.jit
def _drop_flat(b, p_rng, offset, o_r, C, HW, THRESHOLD: tl.constexpr, CL: tl.constexpr, BM: tl.constexpr):
    """Dropout of a tile [BM, 8] of consecutive channels-last elements, or of [BM, 1] of an NCHW tensor."""
    if CL:
        return drop(b, p_rng, offset, o_r, 0, 8, THRESHOLD, True, BM, 8)
    return drop(b, p_rng, offset, _other_layout(o_r, C, HW, False), 0, 1, THRESHOLD, False, BM, 1)


@triton.jit(do_not_specialize=["offset"])
def _forward_kernel(
    p_x,
    p_tilde,
    p_y,
    p_rng,
    half,
    C,
    HW,
    offset,
    SAME_LAYOUT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_y = o_r[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    o_x = o_y if SAME_LAYOUT else _other_layout(o_y, C, HW, CHANNELS_LAST)
    b_x = tl.load(p_x + o_x, mask=o_y < half, other=0).to(COMPUTE)
    if p_x.dtype.element_ty == tl.uint8:
        b_x /= 255
    b_tilde = tl.load(p_tilde + (o_y - half), mask=(o_y >= half) & (o_y < 2 * half), other=0.0).to(COMPUTE)
    b_y = tl.where(o_y < half, b_x, b_tilde)
    b_y = _drop_flat(b_y, p_rng, offset, o_r, C, HW, THRESHOLD, CHANNELS_LAST, BLOCK_M)
    tl.store(p_y + o_y, round_to(b_y, p_y.dtype.element_ty), mask=o_y < 2 * half)


@triton.jit(do_not_specialize=["offset"])
def _backward_kernel(
    p_dy,
    p_dtilde,
    p_rng,
    half,
    C,
    HW,
    offset,
    THRESHOLD: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_M + half // WIDTH + tl.arange(0, BLOCK_M)
    o_y = o_r[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    m_y = (o_y >= half) & (o_y < 2 * half)
    b_dy = tl.load(p_dy + o_y, mask=m_y, other=0.0).to(COMPUTE)
    b_dy = _drop_flat(b_dy, p_rng, offset, o_r, C, HW, THRESHOLD, CHANNELS_LAST, BLOCK_M)
    tl.store(p_dtilde + (o_y - half), round_to(b_dy, p_dtilde.dtype.element_ty), mask=m_y)


def _in_order(x: Tensor) -> bool:
    """Whether memory holds `x` in the order in which dropout counts elements: channels innermost."""
    return x.dim() == 2 or is_channels_last(x)


def _empty(like: Tensor, images: int, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty((images, *like.shape[1:]), dtype=dtype, device=like.device, memory_format=layout)


def _arguments(half: Tensor, ordered: bool, dropout: float) -> tuple[tuple[int, ...], dict[str, object]]:
    """Kernel arguments half, C, HW and the constants that forward and backward share."""
    n, channels = half.shape[:2]
    width = 8 if ordered else 1
    block_m = MAP_ELEMENTS // 2 * INTERPRETER_SCALE // width
    constexprs = {"THRESHOLD": dropout_threshold(dropout), "CHANNELS_LAST": ordered, "WIDTH": width, "BLOCK_M": block_m}
    return (half.numel(), channels, half.numel() // max(1, n * channels)), constexprs


def _forward(x, x_tilde, rng, dtype, dropout, offset, triton_):
    x, x_tilde = dense(x), dense(x_tilde)
    y = _empty(x_tilde, 2 * len(x), dtype)
    if not triton_:
        return y.copy_(image_pair_ref(x, x_tilde, dtype, dropout, rng, offset))
    ordered = _in_order(x_tilde)
    shape, constexprs = _arguments(x, ordered, dropout)
    constexprs |= {"SAME_LAYOUT": _in_order(x) == ordered, "COMPUTE": compute_dtype(y)}
    grid = (triton.cdiv(y.numel(), constexprs["BLOCK_M"] * constexprs["WIDTH"]),)
    launch(_forward_kernel, grid, x, x_tilde, y, rng, *shape, offset, **constexprs)
    return y


def _backward(dy, rng, dtype, dropout, offset, triton_):
    dy = dense(dy)
    num = len(dy) // 2
    dx_tilde = _empty(dy, num, dtype)
    if not triton_:
        return dx_tilde.copy_(dropout_ref(dy, dropout, rng, offset)[num:])
    (half, *plane), constexprs = _arguments(dx_tilde, _in_order(dy), dropout)
    block_m, width = constexprs["BLOCK_M"], constexprs["WIDTH"]
    grid = (triton.cdiv(triton.cdiv(2 * half, width) - half // width, block_m),)
    args = (dy, dx_tilde, rng, half, *plane, offset)
    launch(_backward_kernel, grid, *args, COMPUTE=compute_dtype(dy), **constexprs)
    return dx_tilde


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_tilde, rng, dtype, *options):
        with below_autograd():
            y = _forward_op(x, x_tilde, rng, dtype, *options)
        ctx.save_for_backward(rng)
        ctx.dtype, ctx.options = x_tilde.dtype, options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx_tilde = _backward_op(dy, *ctx.saved_tensors, ctx.dtype, *ctx.options)
        return None, dx_tilde, None, None, None, None, None


_options = "Tensor? rng, ScalarType dtype, float dropout, int offset, bool triton"
_forward_op = register(
    f"image_pair(Tensor x, Tensor x_tilde, {_options}) -> Tensor",
    _forward,
    lambda x, x_tilde, rng, dtype, *options: _empty(dense(x_tilde), 2 * len(x), dtype),
    _Function,
)
_backward_op = register(
    f"image_pair_backward(Tensor dy, {_options}) -> Tensor",
    _backward,
    lambda dy, rng, dtype, *options: _empty(dense(dy), len(dy) // 2, dtype),
)


def image_pair(
    x: Tensor,
    x_tilde: Tensor,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """dropout([x; x_tilde], dropout) in `dtype`, by default x_tilde's, and with the layout of x_tilde.

    `rng` (int64 [seed, step]) and `offset` are read only when dropout > 0. Raises ValueError for a wrong shape, device,
    dropout or rng, TypeError for a dtype without kernels, RuntimeError when `impl` cannot run here.
    """
    check_channels(x)
    dtype = dtype or x_tilde.dtype
    if x_tilde.shape != x.shape or x_tilde.device != x.device:
        raise ValueError(f"x is {list(x.shape)} on {x.device}, x_tilde {list(x_tilde.shape)} on {x_tilde.device}")
    check_rng(dropout, rng, offset, x)
    use = use_triton(impl, x_tilde)
    if x.dtype not in (torch.uint8, torch.float64, *FLOATS) or not dtype.is_floating_point:
        raise TypeError(f"no kernel for {x.dtype} to {dtype}: uint8 or floating to floating")
    if not use:
        return image_pair_ref(x, x_tilde, dtype, dropout, rng, offset)
    return _forward_op(x, x_tilde, rng, dtype, dropout, offset, True)
