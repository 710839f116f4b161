"""y = dropout(max(z[2c], z[2c + 1]), p) with z = x + bias[c]: maxout with 2 pieces, and the next layer's input dropout.

x: [N, 2C] or [N, 2C, H, W], float32, bfloat16 or float16; bias: [2C] or None, float32 or the dtype of x; y: C channels,
dtype and layout of x. The pieces of an output are adjacent channels (Goodfellow et al., arXiv:1302.4389).
Backward gives dropout(dy, p) to the larger piece and half to each where they are equal, as torch.maximum does;
dbias = sum of dx over rows, in an order fixed by the shape. Nothing but x is kept.
Reads x, writes y of half the size; backward reads dy and x, writes dx: 1.5 + 2.5 passes over x, one launch each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import below_autograd, launch, register, use_triton
from kernels.random import check_rng, drop, dropout_ref, dropout_scale, dropout_threshold, keep_mask, round_to
from kernels.tiles import (
    MAP_CHANNELS,
    MAP_ELEMENTS,
    SUM_CHANNELS,
    SUM_ELEMENTS,
    SUM_WARPS,
    Tiles,
    block_counters,
    check_channels,
    compute_dtype,
    dense,
    dense_like,
    is_channels_last,
    is_last_block,
    sum_partials,
    tile_at,
    tiles,
)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def maxout_ref(
    x: Tensor,
    bias: Tensor | None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    z = _biased(x, bias)
    return dropout_ref(torch.maximum(z[:, ::2], z[:, 1::2]), dropout, rng, offset)


@triton.jit
def _load_pieces(
    p_x,
    p_bias,
    start,
    start_c,
    M,
    C,
    HW,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Both pieces of the outputs of rows start .. and channels start_c .., offsets and mask of the x they come from."""
    o_p = 2 * start_c + tl.arange(0, 2 * BLOCK_C)
    _, o_x, m_x = tile_at(start, M, o_p, 2 * C, HW, CHANNELS_LAST, BLOCK_M)
    b_z = tl.load(p_x + o_x, mask=m_x, other=0.0).to(COMPUTE)
    if HAS_BIAS:
        b_z += tl.load(p_bias + o_p, mask=o_p < 2 * C, other=0.0).to(COMPUTE)[None, :]
    b_a, b_b = tl.split(tl.reshape(b_z, [BLOCK_M, BLOCK_C, 2]))
    return b_a, b_b, o_x, m_x


@triton.jit(do_not_specialize=["offset"])
def _forward_kernel(
    p_x,
    p_bias,
    p_y,
    p_rng,
    M,
    C,
    HW,
    offset,
    HAS_BIAS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start, start_c = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_C
    b_a, b_b, _, _ = _load_pieces(
        p_x, p_bias, start, start_c, M, C, HW, HAS_BIAS, COMPUTE, CHANNELS_LAST, BLOCK_M, BLOCK_C
    )
    b_y = tl.where((b_a >= b_b) | (b_a != b_a), b_a, b_b)  # NaN wins from either side
    o_m, o_y, m_y = tile_at(start, M, start_c + tl.arange(0, BLOCK_C), C, HW, CHANNELS_LAST, BLOCK_M)
    b_y = drop(b_y, p_rng, offset, o_m, start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
    tl.store(p_y + o_y, round_to(b_y, p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["offset"])
def _backward_kernel(
    p_dy,
    p_x,
    p_bias,
    p_dx,
    p_dbias,
    p_partial,
    p_counter,
    p_rng,
    M,
    C,
    HW,
    rows_each,
    offset,
    HAS_BIAS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_m, i_c = tl.program_id(0), tl.program_id(1)
    start_c = i_c * BLOCK_C
    b_sum = tl.zeros([BLOCK_M, 2 * BLOCK_C], COMPUTE)
    for step in range(0, rows_each, BLOCK_M):
        start = i_m * rows_each + step
        b_a, b_b, o_x, m_x = _load_pieces(
            p_x, p_bias, start, start_c, M, C, HW, HAS_BIAS, COMPUTE, CHANNELS_LAST, BLOCK_M, BLOCK_C
        )
        o_m, o_y, m_y = tile_at(start, M, start_c + tl.arange(0, BLOCK_C), C, HW, CHANNELS_LAST, BLOCK_M)
        b_dy = tl.load(p_dy + o_y, mask=m_y, other=0.0).to(COMPUTE)
        b_dy = drop(b_dy, p_rng, offset, o_m, start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
        b_even = tl.where(b_a == b_b, b_dy * 0.5, b_dy)
        b_dx = tl.join(tl.where(b_a < b_b, 0.0, b_even), tl.where(b_a > b_b, 0.0, b_even))
        b_dx = tl.reshape(b_dx, [BLOCK_M, 2 * BLOCK_C])
        tl.store(p_dx + o_x, round_to(b_dx, p_dx.dtype.element_ty), mask=m_x)
        b_sum += b_dx
    if HAS_BIAS:
        num = tl.num_programs(0)
        o_p = 2 * start_c + tl.arange(0, 2 * BLOCK_C)
        m_p = o_p < 2 * C
        tl.store(p_partial + i_m * 2 * C + o_p, tl.sum(b_sum, 0), mask=m_p)
        if is_last_block(p_counter + i_c, num):
            b_dbias = sum_partials(p_partial, num, 2 * C, o_p, 2 * C, BLOCK_P, 2 * BLOCK_C)
            tl.store(p_dbias + o_p, round_to(b_dbias, p_dbias.dtype.element_ty), mask=m_p)


def _constexprs(x: Tensor, bias: Tensor | None, dropout: float, cut: Tiles) -> dict[str, object]:
    return {
        "HAS_BIAS": bias is not None,
        "THRESHOLD": dropout_threshold(dropout),
        "GROUPED": cut.grouped,
        "COMPUTE": compute_dtype(x),
        **cut.constexprs,
    }


def _empty_output(x: Tensor) -> Tensor:
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], x.shape[1] // 2, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _forward(x, bias, rng, dropout, offset, triton):
    x = dense(x)
    if not triton:
        return dense_like(maxout_ref(x, bias, dropout, rng, offset), x)
    y = _empty_output(x)
    cut = tiles(y, MAP_ELEMENTS // 2, MAP_CHANNELS // 2)
    args = (x, bias, y, rng, *cut.shape, offset)
    launch(_forward_kernel, (cut.blocks, cut.chunks), *args, **_constexprs(x, bias, dropout, cut))
    return y


def _backward(dy, x, bias, rng, dropout, offset, triton):
    x = dense(x)
    dy = dense_like(dy, x)
    if not triton:
        return _backward_plain(dy, x, bias, rng, dropout, offset)
    cut = tiles(dy, SUM_ELEMENTS // 2, SUM_CHANNELS // 2)
    dx = torch.empty_like(x)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    partial = x.new_empty(cut.programs, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    args = (dy, x, bias, dx, dbias, partial, block_counters(x, cut.chunks), rng, *cut.shape, cut.rows_each, offset)
    constexprs = _constexprs(x, bias, dropout, cut) | {"BLOCK_P": 16}
    launch(_backward_kernel, (cut.programs, cut.chunks), *args, num_warps=SUM_WARPS, **constexprs)
    return dx, dbias


def _backward_plain(dy, x, bias, rng, dropout, offset):
    z = _biased(x, bias)
    a, b = z[:, ::2], z[:, 1::2]
    dy = dropout_ref(dy, dropout, rng, offset)
    even = torch.where(a == b, dy / 2, dy)
    pieces = even.masked_fill(a < b, 0), even.masked_fill(a > b, 0)
    dx = dense_like(torch.stack(pieces, dim=2).flatten(1, 2), x)
    rows = [d for d in range(x.dim()) if d != 1]
    return dx, x.new_empty(0) if bias is None else dx.sum(rows, dtype=bias.dtype)


class _Plain(torch.autograd.Function):
    """maxout_ref without the bias, for a CPU: backward is a product a piece, where autograd masks and adds planes.

    Kept are the factors of both pieces, dropout in them: the step runs this backward twice.
    """

    @staticmethod
    def forward(ctx, z, dropout, rng, offset):
        a, b = z[:, ::2], z[:, 1::2]
        y, half = torch.maximum(a, b), z.new_tensor(0.5)
        if dropout_threshold(dropout):
            keep = keep_mask(y, dropout, rng, offset).to(y.dtype).mul_(dropout_scale(dropout))
            y, half = y.mul_(keep), keep.mul_(0.5)
        sign = torch.sub(a, b).sign_()
        ctx.save_for_backward(torch.addcmul(half, half, sign), torch.addcmul(half, half, sign, value=-1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        factors = ctx.saved_tensors
        shape = (dy.shape[0], 2 * dy.shape[1], *dy.shape[2:])
        layout = torch.channels_last if is_channels_last(factors[0]) else torch.contiguous_format
        dz = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=layout)
        for piece, factor in enumerate(factors):
            torch.mul(dy, factor, out=dz[:, piece::2])
        return dz, None, None, None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, rng, *options):
        with below_autograd():
            y = _forward_op(x, bias, rng, *options)
        ctx.save_for_backward(x, bias, rng)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, dbias = _backward_op(dy, *ctx.saved_tensors, *ctx.options)
        return dx, None if ctx.saved_tensors[1] is None else dbias, None, None, None, None


_options = "Tensor? rng, float dropout, int offset, bool triton"
_forward_op = register(
    f"maxout(Tensor x, Tensor? bias, {_options}) -> Tensor",
    _forward,
    lambda x, bias, *options: _empty_output(dense(x)),
    _Function,
)
_backward_op = register(
    f"maxout_backward(Tensor dy, Tensor x, Tensor? bias, {_options}) -> (Tensor, Tensor)",
    _backward,
    lambda dy, x, bias, *options: (
        torch.empty_like(dense(x)),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
    ),
)


def maxout(
    x: Tensor,
    bias: Tensor | None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """dropout(maximum of channels 2c and 2c + 1 of x + bias), half as many channels, with the layout and dtype of x.

    `rng` (int64 [seed, step]) and `offset` are read only when dropout > 0. Raises ValueError for a wrong shape (an odd
    number of channels among them), device, dropout or rng, TypeError for a dtype without kernels, RuntimeError when
    `impl` cannot run here.
    """
    check_channels(x, bias=bias)
    if x.shape[1] % 2:
        raise ValueError(f"maxout takes channels in pairs, got {x.shape[1]}")
    check_rng(dropout, rng, offset, x)
    if not use_triton(impl, x):
        if torch.compiler.is_compiling():  # which fuses the reference itself
            return maxout_ref(x, bias, dropout, rng, offset)
        return _Plain.apply(_biased(x, bias), dropout, rng, offset)
    return _forward_op(x, bias, rng, dropout, offset, True)
