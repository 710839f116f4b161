"""y = dropout(leaky_relu(x + bias[c], slope), p): a layer without batch norm, and the next layer's input dropout.

x: [N, C] or [N, C, H, W], float32, bfloat16 or float16; bias: [C] or None, float32 or the dtype of x; y: as x.
Backward, with z = x + bias:  dx = dropout(dy, p) * (1 if z > 0 else slope),  dbias = sum of dx over rows.
Nothing but x is kept: the mask is drawn again and the sign recomputed. dbias is summed in an order fixed by the shape.
Reads x, writes y; backward reads dy and x, writes dx: 2 + 3 passes over the tensor, one launch each.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import below_autograd, launch, register, use_triton
from kernels.random import check_rng, drop, dropout_ref, dropout_threshold, round_to
from kernels.tiles import (
    SUM_WARPS,
    Tiles,
    block_counters,
    check_channels,
    compute_dtype,
    dense,
    dense_like,
    is_last_block,
    map_tiles,
    sum_partials,
    sum_tiles,
    tile_at,
)


def bias_leaky_relu_dropout_ref(
    x: Tensor,
    bias: Tensor | None,
    slope: float = 0.01,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    z = x if bias is None else x + bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
    # In place where z is ours: backward keeps the result, which the next layer keeps too
    return dropout_ref(F.leaky_relu(z, slope, inplace=bias is not None), dropout, rng, offset)


@triton.jit
def _load_z(p_x, p_bias, o_x, o_c, m_x, C, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr):
    b_z = tl.load(p_x + o_x, mask=m_x, other=0.0).to(COMPUTE)
    if HAS_BIAS:
        b_z += tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(COMPUTE)[None, :]
    return b_z


@triton.jit(do_not_specialize=["offset"])
def _forward_kernel(
    p_x,
    p_bias,
    p_y,
    p_rng,
    M,
    C,
    HW,
    slope,
    offset,
    HAS_BIAS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start_c = tl.program_id(1) * BLOCK_C
    o_c = start_c + tl.arange(0, BLOCK_C)
    o_m, o_x, m_x = tile_at(tl.program_id(0) * BLOCK_M, M, o_c, C, HW, CHANNELS_LAST, BLOCK_M)
    b_z = _load_z(p_x, p_bias, o_x, o_c, m_x, C, HAS_BIAS, COMPUTE)
    b_y = tl.where(b_z > 0, b_z, b_z * slope)
    b_y = drop(b_y, p_rng, offset, o_m, start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
    tl.store(p_y + o_x, round_to(b_y, p_y.dtype.element_ty), mask=m_x)


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
    slope,
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
    o_c = start_c + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    for start in range(0, rows_each, BLOCK_M):
        o_m, o_x, m_x = tile_at(i_m * rows_each + start, M, o_c, C, HW, CHANNELS_LAST, BLOCK_M)
        b_z = _load_z(p_x, p_bias, o_x, o_c, m_x, C, HAS_BIAS, COMPUTE)
        b_dy = tl.load(p_dy + o_x, mask=m_x, other=0.0).to(COMPUTE)
        b_dy = drop(b_dy, p_rng, offset, o_m, start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
        b_dx = tl.where(b_z > 0, b_dy, b_dy * slope)
        tl.store(p_dx + o_x, round_to(b_dx, p_dx.dtype.element_ty), mask=m_x)
        b_sum += b_dx
    if HAS_BIAS:
        num = tl.num_programs(0)
        tl.store(p_partial + i_m * C + o_c, tl.sum(b_sum.to(tl.float64), 0), mask=o_c < C)
        if is_last_block(p_counter + i_c, num):
            b_dbias = round_to(sum_partials(p_partial, num, C, o_c, C, BLOCK_P, BLOCK_C), p_dbias.dtype.element_ty)
            tl.store(p_dbias + o_c, b_dbias, mask=o_c < C)


def _constexprs(x: Tensor, bias: Tensor | None, dropout: float, cut: Tiles) -> dict[str, object]:
    return {
        "HAS_BIAS": bias is not None,
        "THRESHOLD": dropout_threshold(dropout),
        "GROUPED": cut.grouped,
        "COMPUTE": compute_dtype(x),
        **cut.constexprs,
    }


def _forward(x, bias, rng, slope, dropout, offset, triton):
    x = dense(x)
    if not triton:
        return bias_leaky_relu_dropout_ref(x, bias, slope, dropout, rng, offset)
    y, cut = torch.empty_like(x), map_tiles(x)
    args = (x, bias, y, rng, *cut.shape, slope, offset)
    launch(_forward_kernel, (cut.blocks, cut.chunks), *args, **_constexprs(x, bias, dropout, cut))
    return y


def _backward(dy, x, bias, rng, slope, dropout, offset, triton):
    x = dense(x)
    dy = dense_like(dy, x)
    if not triton:
        z = x if bias is None else x + bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
        dy = dropout_ref(dy, dropout, rng, offset)
        dx = torch.where(z > 0, dy, dy * slope)
        rows = [d for d in range(x.dim()) if d != 1]
        return dx, x.new_empty(0) if bias is None else dx.sum(rows, dtype=bias.dtype)
    cut = sum_tiles(x)
    dx = torch.empty_like(x)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    partial = x.new_empty(cut.programs, cut.channels, dtype=torch.float64)
    args = (dy, x, bias, dx, dbias, partial, block_counters(x, cut.chunks), rng, *cut.shape, cut.rows_each, slope)
    constexprs = _constexprs(x, bias, dropout, cut) | {"BLOCK_P": 16}
    launch(_backward_kernel, (cut.programs, cut.chunks), *args, offset, num_warps=SUM_WARPS, **constexprs)
    return dx, dbias


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
        return dx, None if ctx.saved_tensors[1] is None else dbias, None, None, None, None, None


_options = "Tensor? rng, float slope, float dropout, int offset, bool triton"
_forward_op = register(
    f"bias_leaky_relu_dropout(Tensor x, Tensor? bias, {_options}) -> Tensor",
    _forward,
    lambda x, bias, *options: torch.empty_like(dense(x)),
    _Function,
)
_backward_op = register(
    f"bias_leaky_relu_dropout_backward(Tensor dy, Tensor x, Tensor? bias, {_options}) -> (Tensor, Tensor)",
    _backward,
    lambda dy, x, bias, *options: (
        torch.empty_like(dense(x)),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
    ),
)


def bias_leaky_relu_dropout(
    x: Tensor,
    bias: Tensor | None,
    slope: float = 0.01,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """dropout(leaky_relu(x + bias, slope), dropout), with the layout and dtype of x.

    `rng` (int64 [seed, step]) and `offset` are read only when dropout > 0. Raises ValueError for a wrong shape, device,
    dropout or rng, TypeError for a dtype without kernels, RuntimeError when `impl` cannot run here.
    """
    check_channels(x, bias=bias)
    check_rng(dropout, rng, offset, x)
    if not use_triton(impl, x):
        return bias_leaky_relu_dropout_ref(x, bias, slope, dropout, rng, offset)
    return _forward_op(x, bias, rng, slope, dropout, offset, True)
