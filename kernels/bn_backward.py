"""Triton kernels of bn_leaky_relu's backward pass, and the functions that launch them.

With g the gradient at z (dropout and leaky ReLU undone) and xhat = (x - mean) / std, both computed again from x and dy,
`sums` are the rows [sum of g, sum of g * xhat], [2, C] of the computing type: dbias and dweight. A thread sums its
elements in float32; threads and blocks are summed in float64, in an order fixed by the shape.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bn_forward import (
    LOCAL_CHANNELS,
    LOCAL_WARPS,
    is_local,
    load_affine,
    load_saved,
    tile_constexprs,
)
from kernels.dispatch import launch
from kernels.random import drop, round_to
from kernels.tiles import (
    SUM_WARPS,
    block_counters,
    is_last_block,
    map_tiles,
    sum_partials,
    sum_tiles,
    tile_at,
    tiles,
)

# Two tensors at a time: half as many elements a thread as in the forward pass.
LOCAL_BACKWARD_ELEMENTS, DX_WARPS = 2048, 8


@triton.jit
def load_channels(p_saved, p_weight, p_bias, o_c, C, AFFINE: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean as k + d, 1/std, weight and bias of the channels `o_c`."""
    b_k, b_d, b_invstd = load_saved(p_saved, o_c, C)
    b_w, b_b = load_affine(p_weight, p_bias, o_c, C, AFFINE, T, BLOCK_C)
    return b_k, b_d, b_invstd, b_w, b_b


@triton.jit
def _grad_tile(
    p_dy, p_x, p_rng, start, stop, start_c, C, HW, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
    THRESHOLD: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g and xhat of a tile, its offsets and mask; z is rounded as in the forward pass, so its sign is the same."""
    o_c = start_c + tl.arange(0, BLOCK_C)
    o_m, o_x, m_x = tile_at(start, stop, o_c, C, HW, CHANNELS_LAST, BLOCK_M)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(COMPUTE)
    b_g = tl.load(p_dy + o_x, mask=m_x, other=0.0).to(COMPUTE)
    b_xhat = ((b_x - b_k[None, :]) - b_d[None, :]) * b_invstd[None, :]
    b_z = b_xhat * b_w[None, :] + b_b[None, :]
    b_g = drop(b_g, p_rng, offset, o_m, start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
    return tl.where(b_z > 0, b_g, b_g * slope), b_xhat, o_x, m_x


@triton.jit
def store_sums(p_sums, p_dweight, p_dbias, o_c, C, b_g, b_gx, AFFINE: tl.constexpr):
    tl.store(p_sums + o_c, b_g.to(p_sums.dtype.element_ty), mask=o_c < C)
    tl.store(p_sums + C + o_c, b_gx.to(p_sums.dtype.element_ty), mask=o_c < C)
    if AFFINE:
        tl.store(p_dbias + o_c, round_to(b_g, p_dbias.dtype.element_ty), mask=o_c < C)
        tl.store(p_dweight + o_c, round_to(b_gx, p_dweight.dtype.element_ty), mask=o_c < C)


@triton.jit
def store_dx(p_dx, b_g, b_xhat, o_x, m_x, b_scale, b_mean_g, b_mean_gx):
    """dx = weight / std * (g - mean of g - xhat * mean of g * xhat)."""
    b_dx = (b_g - b_mean_g[None, :] - b_xhat * b_mean_gx[None, :]) * b_scale[None, :]
    tl.store(p_dx + o_x, round_to(b_dx, p_dx.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["offset"])
def _local_backward_kernel(
    p_dy, p_x, p_dx, p_weight, p_bias, p_saved, p_sums, p_dweight, p_dbias, p_rng, M, C, HW, slope, offset,
    AFFINE: tl.constexpr, THRESHOLD: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    start_c = tl.program_id(1) * BLOCK_C
    o_c = start_c + tl.arange(0, BLOCK_C)
    b_k, b_d, b_invstd, b_w, b_b = load_channels(p_saved, p_weight, p_bias, o_c, C, AFFINE, COMPUTE, BLOCK_C)
    b_sum_g = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    b_sum_gx = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    for start in range(0, M, BLOCK_M):
        b_g, b_xhat, o_x, m_x = _grad_tile(
            p_dy, p_x, p_rng, start, M, start_c, C, HW, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
            THRESHOLD, GROUPED, COMPUTE, CHANNELS_LAST, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        b_sum_g += b_g
        b_sum_gx += b_g * b_xhat
    b_total_g, b_total_gx = tl.sum(b_sum_g.to(tl.float64), 0), tl.sum(b_sum_gx.to(tl.float64), 0)
    store_sums(p_sums, p_dweight, p_dbias, o_c, C, b_total_g, b_total_gx, AFFINE)
    b_mean_g, b_mean_gx = (b_total_g / M).to(COMPUTE), (b_total_gx / M).to(COMPUTE)
    for start in range(0, M, BLOCK_M):
        b_g, b_xhat, o_x, m_x = _grad_tile(
            p_dy, p_x, p_rng, start, M, start_c, C, HW, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
            THRESHOLD, GROUPED, COMPUTE, CHANNELS_LAST, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        store_dx(p_dx, b_g, b_xhat, o_x, m_x, b_w * b_invstd, b_mean_g, b_mean_gx)


@triton.jit(do_not_specialize=["offset"])
def _reduce_kernel(
    p_dy, p_x, p_dx, p_weight, p_bias, p_saved, p_sums, p_dweight, p_dbias, p_partial, p_counter, p_rng,
    M, C, HW, rows_each, slope, offset,
    STORE_DX: tl.constexpr, AFFINE: tl.constexpr, THRESHOLD: tl.constexpr, GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The sums; in evaluation, where the statistics are constants, STORE_DX also stores dx = weight / std * g."""
    i_m, i_c = tl.program_id(0), tl.program_id(1)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_k, b_d, b_invstd, b_w, b_b = load_channels(p_saved, p_weight, p_bias, o_c, C, AFFINE, COMPUTE, BLOCK_C)
    b_sum_g = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    b_sum_gx = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    for start in range(i_m * rows_each, tl.minimum((i_m + 1) * rows_each, M), BLOCK_M):
        b_g, b_xhat, o_x, m_x = _grad_tile(
            p_dy, p_x, p_rng, start, M, i_c * BLOCK_C, C, HW, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
            THRESHOLD, GROUPED, COMPUTE, CHANNELS_LAST, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        b_sum_g += b_g
        b_sum_gx += b_g * b_xhat
        if STORE_DX:
            b_dx = b_g * (b_w * b_invstd)[None, :]
            tl.store(p_dx + o_x, round_to(b_dx, p_dx.dtype.element_ty), mask=m_x)
    p_mine = p_partial + i_m * 2 * C + o_c
    tl.store(p_mine, tl.sum(b_sum_g.to(tl.float64), 0), mask=o_c < C)
    tl.store(p_mine + C, tl.sum(b_sum_gx.to(tl.float64), 0), mask=o_c < C)
    num = tl.num_programs(0)
    if is_last_block(p_counter + i_c, num):
        b_all_g = sum_partials(p_partial, num, 2 * C, o_c, C, BLOCK_P, BLOCK_C)
        b_all_gx = sum_partials(p_partial + C, num, 2 * C, o_c, C, BLOCK_P, BLOCK_C)
        store_sums(p_sums, p_dweight, p_dbias, o_c, C, b_all_g, b_all_gx, AFFINE)


@triton.jit(do_not_specialize=["offset"])
def _dx_kernel(
    p_dy, p_x, p_dx, p_weight, p_bias, p_saved, p_sums, p_rng, M, C, HW, slope, offset,
    AFFINE: tl.constexpr, THRESHOLD: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    start_c = tl.program_id(1) * BLOCK_C
    o_c = start_c + tl.arange(0, BLOCK_C)
    b_k, b_d, b_invstd, b_w, b_b = load_channels(p_saved, p_weight, p_bias, o_c, C, AFFINE, COMPUTE, BLOCK_C)
    count = tl.load(p_saved + 3 * C)
    b_mean_g = tl.load(p_sums + o_c, mask=o_c < C, other=0.0) / count
    b_mean_gx = tl.load(p_sums + C + o_c, mask=o_c < C, other=0.0) / count
    b_g, b_xhat, o_x, m_x = _grad_tile(
        p_dy, p_x, p_rng, tl.program_id(0) * BLOCK_M, M, start_c, C, HW, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
        THRESHOLD, GROUPED, COMPUTE, CHANNELS_LAST, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    store_dx(p_dx, b_g, b_xhat, o_x, m_x, b_w * b_invstd, b_mean_g, b_mean_gx)


def _outputs(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """sums, dweight and dbias; the latter two empty without a weight."""
    sums = x.new_empty(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return sums, *((torch.empty_like(weight) if weight is not None else x.new_empty(0)) for _ in range(2))


def gradient_sums(
    dy: Tensor, x: Tensor, weight, bias, saved: Tensor, rng, slope, dropout, offset, dx: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """sums, dweight and dbias over the rows of x; fills `dx` for constant statistics when it is given."""
    cut, outputs = sum_tiles(x), _outputs(x, weight)
    partial = x.new_empty(cut.programs, 2, cut.channels, dtype=torch.float64)
    args = (dy, x, dx, weight, bias, saved, *outputs, partial, block_counters(x, cut.chunks), rng, *cut.shape)
    constexprs = {"STORE_DX": dx is not None, **tile_constexprs(x, weight, dropout, cut), "BLOCK_P": 16}
    grid = (cut.programs, cut.chunks)
    launch(_reduce_kernel, grid, *args, cut.rows_each, slope, offset, num_warps=SUM_WARPS, **constexprs)
    return outputs


def input_grad(dy: Tensor, x: Tensor, weight, bias, saved, sums, rng, slope, dropout, offset) -> Tensor:
    """dx from the sums over all rows that `saved` counts."""
    dx, cut = torch.empty_like(x), map_tiles(x)
    args = (dy, x, dx, weight, bias, saved, sums, rng, *cut.shape, slope, offset)
    constexprs = tile_constexprs(x, weight, dropout, cut)
    launch(_dx_kernel, (cut.blocks, cut.chunks), *args, num_warps=DX_WARPS, **constexprs)
    return dx


def backward(
    dy: Tensor, x: Tensor, weight, bias, saved, rng, training: bool, slope, dropout, offset
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias without other ranks, by the strategy that suits the shape."""
    if not training:
        dx = torch.empty_like(x)
        return dx, *gradient_sums(dy, x, weight, bias, saved, rng, slope, dropout, offset, dx)[1:]
    if not is_local(x.numel() // x.shape[1], 2 * x.itemsize, x.device):
        sums, dweight, dbias = gradient_sums(dy, x, weight, bias, saved, rng, slope, dropout, offset)
        return input_grad(dy, x, weight, bias, saved, sums, rng, slope, dropout, offset), dweight, dbias
    cut, outputs, dx = tiles(x, LOCAL_BACKWARD_ELEMENTS, LOCAL_CHANNELS), _outputs(x, weight), torch.empty_like(x)
    args = (dy, x, dx, weight, bias, saved, *outputs, rng, *cut.shape, slope, offset)
    constexprs = tile_constexprs(x, weight, dropout, cut)
    launch(_local_backward_kernel, (1, cut.chunks), *args, num_warps=LOCAL_WARPS, **constexprs)
    return dx, *outputs[1:]
