"""Triton kernels of bn_leaky_relu's forward pass, and the functions that launch them.

Statistics of each channel are float64 rows [count, mean, M2] (M2: sum of squared deviations), as gathered across ranks;
the later passes read `saved`, rows [k, d, 1/std, count] of the computing type with mean = k + d, since one float32
cannot hold a large mean to better than its last digit. For the same reason a block subtracts a first guess of its mean
from x before it sums in float32. Blocks are merged in float64, in an order fixed by the shape.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import launch
from kernels.random import drop, dropout_threshold, round_to
from kernels.tiles import (
    MAP_WARPS,
    SUM_CHANNELS,
    SUM_WARPS,
    Tiles,
    block_counters,
    compute_dtype,
    is_last_block,
    map_tiles,
    sum_tiles,
    tile_at,
    tiles,
)

LOCAL_ELEMENTS, LOCAL_CHANNELS, LOCAL_WARPS = 4096, 16, 8
# Bytes of a channel slice that one block may walk twice: they should stay in the first-level cache. By the major
# version of the architecture; not yet measured on a GPU.
LOCAL_BYTES = {8: 96 * 1024, 9: 128 * 1024, 10: 128 * 1024}
OTHER_LOCAL_BYTES = 64 * 1024


def is_local(rows: int, itemsize: int, device: torch.device) -> bool:
    """Whether one block takes whole channels (one launch), rather than two phases of many blocks."""
    limit = OTHER_LOCAL_BYTES
    if device.type == "cuda" and torch.version.hip is None:
        limit = LOCAL_BYTES.get(torch.cuda.get_device_capability(device)[0], limit)
    return rows * LOCAL_CHANNELS * itemsize <= limit


@triton.jit
def load_saved(p_saved, o_c, C):
    """k, d and 1/std of the channels `o_c`."""
    b_k = tl.load(p_saved + o_c, mask=o_c < C, other=0.0)
    b_d = tl.load(p_saved + C + o_c, mask=o_c < C, other=0.0)
    return b_k, b_d, tl.load(p_saved + 2 * C + o_c, mask=o_c < C, other=0.0)


@triton.jit
def save(p_saved, o_c, C, b_mean, b_var, b_count, eps):
    """Stores and returns k, d and 1/std; an infinite mean is all in k."""
    b_k = b_mean.to(p_saved.dtype.element_ty)
    b_rest = tl.where(b_k.to(tl.float64) == b_mean, 0.0, b_mean - b_k.to(tl.float64))
    b_d = b_rest.to(p_saved.dtype.element_ty)
    b_invstd = (1.0 / tl.sqrt(b_var + eps)).to(p_saved.dtype.element_ty)
    tl.store(p_saved + o_c, b_k, mask=o_c < C)
    tl.store(p_saved + C + o_c, b_d, mask=o_c < C)
    tl.store(p_saved + 2 * C + o_c, b_invstd, mask=o_c < C)
    tl.store(p_saved + 3 * C + o_c, b_count.to(p_saved.dtype.element_ty), mask=o_c < C)
    return b_k, b_d, b_invstd


@triton.jit
def load_affine(p_weight, p_bias, o_c, C, AFFINE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_C: tl.constexpr):
    if AFFINE:
        b_w = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(COMPUTE)
        return b_w, tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(COMPUTE)
    return tl.full([BLOCK_C], 1.0, COMPUTE), tl.zeros([BLOCK_C], COMPUTE)


@triton.jit
def block_stats(p_x, first, stop, o_c, C, HW, CL: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Count (a scalar), mean and M2 of rows first .. stop of the channels `o_c`, in tiles [BM, BC] of type T."""
    o_m, o_x, m_x = tile_at(first, stop, o_c, C, HW, CL, BM)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(T)
    b_one = tl.sum(tl.where(tl.arange(0, BM)[:, None] == 0, b_x, 0.0), 0)
    b_guess = tl.sum(tl.where(m_x, b_x - b_one[None, :], 0.0), 0) / tl.maximum(tl.minimum(stop - first, BM), 1) + b_one
    b_sum = tl.zeros([BM, BC], T)
    b_square = tl.zeros([BM, BC], T)
    for start in range(first, stop, BM):
        o_m, o_x, m_x = tile_at(start, stop, o_c, C, HW, CL, BM)
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(T)
        b_x = tl.where(m_x, b_x - b_guess[None, :], 0.0)
        b_sum += b_x
        b_square += b_x * b_x
    count = tl.maximum(stop - first, 0).to(tl.float64)
    b_shift = tl.sum(b_sum.to(tl.float64), 0) / tl.maximum(count, 1.0)
    b_m2 = tl.sum(b_square.to(tl.float64), 0) - count * b_shift * b_shift
    return count, b_guess.to(tl.float64) + b_shift, b_m2


@triton.jit
def merge(p_stats, num, o_c, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Count, mean and M2 (Chan et al., 1979) of `num` disjoint sets whose statistics [3, C] lie one after another."""
    b_origin = tl.load(p_stats + C + o_c, mask=o_c < C, other=0.0, cache_modifier=".cg")
    b_count = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
    b_square = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
    for first in range(0, num, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        m_p = (o_p < num)[:, None] & (o_c < C)[None, :]
        p_n = p_stats + o_p[:, None] * 3 * C + o_c[None, :]
        b_n = tl.load(p_n, mask=m_p, other=0.0, cache_modifier=".cg")
        b_mean = tl.load(p_n + C, mask=m_p, other=0.0, cache_modifier=".cg")
        b_m2 = tl.load(p_n + 2 * C, mask=m_p, other=0.0, cache_modifier=".cg")
        b_from_origin = tl.where(b_n > 0, b_mean - b_origin[None, :], 0.0)
        b_count += b_n
        b_sum += b_n * b_from_origin
        b_square += b_m2 + b_n * b_from_origin * b_from_origin
    b_total = tl.sum(b_count, 0)
    b_shift = tl.sum(b_sum, 0) / tl.where(b_total > 0, b_total, 1.0)
    return b_total, b_origin + b_shift, tl.sum(b_square, 0) - b_total * b_shift * b_shift


@triton.jit
def _store_rows(p_rows, o_c, C, b_0, b_1, b_2):
    tl.store(p_rows + o_c, b_0, mask=o_c < C)
    tl.store(p_rows + C + o_c, b_1, mask=o_c < C)
    tl.store(p_rows + 2 * C + o_c, b_2, mask=o_c < C)


@triton.jit
def settle(
    p_saved, p_mean, p_var, p_batches, o_c, C, b_count, b_mean, b_m2, eps, momentum,
    TRACK: tl.constexpr, COUNT_BATCHES: tl.constexpr,
):  # fmt: skip
    """Updates the running statistics, counts the batch, stores what is saved and returns k, d and 1/std."""
    b_var = b_m2 / tl.maximum(b_count, 1.0)
    b_var = tl.where(b_var < 0, 0.0, b_var)  # a maximum would hide NaN
    if TRACK:
        b_unbiased = b_var * (b_count / tl.maximum(b_count - 1.0, 1.0))
        b_old = tl.load(p_mean + o_c, mask=o_c < C, other=0.0).to(tl.float64)
        tl.store(p_mean + o_c, (b_old + momentum * (b_mean - b_old)).to(p_mean.dtype.element_ty), mask=o_c < C)
        b_old = tl.load(p_var + o_c, mask=o_c < C, other=0.0).to(tl.float64)
        tl.store(p_var + o_c, (b_old + momentum * (b_unbiased - b_old)).to(p_var.dtype.element_ty), mask=o_c < C)
    if COUNT_BATCHES:
        if tl.program_id(1) == 0:
            tl.store(p_batches, tl.load(p_batches) + 1)
    return save(p_saved, o_c, C, b_mean, b_var, b_count, eps)


@triton.jit
def _apply_tile(
    p_x, p_y, p_rng, start, stop, start_c, C, HW, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
    THRESHOLD: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_c = start_c + tl.arange(0, BLOCK_C)
    o_m, o_x, m_x = tile_at(start, stop, o_c, C, HW, CHANNELS_LAST, BLOCK_M)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(COMPUTE)
    b_z = ((b_x - b_k[None, :]) - b_d[None, :]) * b_invstd[None, :] * b_w[None, :] + b_b[None, :]
    b_y = tl.where(b_z > 0, b_z, b_z * slope)
    b_y = drop(b_y, p_rng, offset, o_m, start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
    tl.store(p_y + o_x, round_to(b_y, p_y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["offset"])
def _local_kernel(
    p_x, p_y, p_weight, p_bias, p_saved, p_mean, p_var, p_batches, p_rng, M, C, HW, eps, momentum, slope, offset,
    TRACK: tl.constexpr, COUNT_BATCHES: tl.constexpr, AFFINE: tl.constexpr, THRESHOLD: tl.constexpr,
    GROUPED: tl.constexpr, COMPUTE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    start_c = tl.program_id(1) * BLOCK_C
    o_c = start_c + tl.arange(0, BLOCK_C)
    count, b_mean, b_m2 = block_stats(p_x, 0, M, o_c, C, HW, CHANNELS_LAST, COMPUTE, BLOCK_M, BLOCK_C)
    b_count = tl.zeros([BLOCK_C], tl.float64) + count
    b_k, b_d, b_invstd = settle(
        p_saved, p_mean, p_var, p_batches, o_c, C, b_count, b_mean, b_m2, eps, momentum, TRACK, COUNT_BATCHES
    )
    b_w, b_b = load_affine(p_weight, p_bias, o_c, C, AFFINE, COMPUTE, BLOCK_C)
    for start in range(0, M, BLOCK_M):
        _apply_tile(
            p_x, p_y, p_rng, start, M, start_c, C, HW, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
            THRESHOLD, GROUPED, COMPUTE, CHANNELS_LAST, BLOCK_M, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _stats_kernel(
    p_x, p_partial, p_counter, p_out, p_mean, p_var, p_batches, M, C, HW, rows_each, eps, momentum,
    FINISH: tl.constexpr, TRACK: tl.constexpr, COUNT_BATCHES: tl.constexpr, COMPUTE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i_m, i_c = tl.program_id(0), tl.program_id(1)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = i_m * rows_each
    stop = tl.minimum(first + rows_each, M)
    count, b_mean, b_m2 = block_stats(p_x, first, stop, o_c, C, HW, CHANNELS_LAST, COMPUTE, BLOCK_M, BLOCK_C)
    _store_rows(p_partial + i_m * 3 * C, o_c, C, tl.zeros([BLOCK_C], tl.float64) + count, b_mean, b_m2)
    if is_last_block(p_counter + i_c, tl.num_programs(0)):
        b_count, b_mean, b_m2 = merge(p_partial, tl.num_programs(0), o_c, C, BLOCK_P, BLOCK_C)
        if FINISH:
            settle(p_out, p_mean, p_var, p_batches, o_c, C, b_count, b_mean, b_m2, eps, momentum, TRACK, COUNT_BATCHES)
        else:
            _store_rows(p_out, o_c, C, b_count, b_mean, b_m2)


@triton.jit
def _finish_kernel(
    p_stats, p_saved, p_mean, p_var, p_batches, num, C, eps, momentum,
    TRACK: tl.constexpr, COUNT_BATCHES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_count, b_mean, b_m2 = merge(p_stats, num, o_c, C, BLOCK_P, BLOCK_C)
    settle(p_saved, p_mean, p_var, p_batches, o_c, C, b_count, b_mean, b_m2, eps, momentum, TRACK, COUNT_BATCHES)


@triton.jit(do_not_specialize=["offset"])
def _apply_kernel(
    p_x, p_y, p_weight, p_bias, p_saved, p_mean, p_var, p_rng, M, C, HW, eps, slope, offset,
    TRAINING: tl.constexpr, AFFINE: tl.constexpr, THRESHOLD: tl.constexpr, GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    start_c = tl.program_id(1) * BLOCK_C
    o_c = start_c + tl.arange(0, BLOCK_C)
    if TRAINING:
        b_k, b_d, b_invstd = load_saved(p_saved, o_c, C)
    else:  # every block stores the same: the backward pass must not depend on later changes
        b_mean = tl.load(p_mean + o_c, mask=o_c < C, other=0.0).to(tl.float64)
        b_var = tl.load(p_var + o_c, mask=o_c < C, other=0.0).to(tl.float64)
        b_k, b_d, b_invstd = save(p_saved, o_c, C, b_mean, b_var, tl.zeros([BLOCK_C], tl.float64) + M, eps)
    b_w, b_b = load_affine(p_weight, p_bias, o_c, C, AFFINE, COMPUTE, BLOCK_C)
    _apply_tile(
        p_x, p_y, p_rng, tl.program_id(0) * BLOCK_M, M, start_c, C, HW, b_k, b_d, b_invstd, b_w, b_b,
        slope, offset, THRESHOLD, GROUPED, COMPUTE, CHANNELS_LAST, BLOCK_M, BLOCK_C,
    )  # fmt: skip


Running = tuple[Tensor | None, Tensor | None, Tensor | None]  # mean, variance and the number of batches


def _flags(running: Running) -> dict[str, bool]:
    return {"TRACK": running[0] is not None, "COUNT_BATCHES": running[2] is not None}


def mark_updated(running: Running) -> None:
    """Counts the buffers' versions up, as an in-place torch op would: kernels write behind autograd's back."""
    for buffer in running:
        if buffer is not None:
            torch.autograd.graph.increment_version(buffer)


def new_saved(x: Tensor) -> Tensor:
    return x.new_empty(4, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


def sum_rows(x: Tensor, out: Tensor, running: Running, momentum: float, eps: float, finish: bool) -> None:
    cut = sum_tiles(x)
    partial = x.new_empty(cut.programs, 3, cut.channels, dtype=torch.float64)
    args = (x, partial, block_counters(x, cut.chunks), out, *running, *cut.shape, cut.rows_each, eps, momentum)
    constexprs = {"FINISH": finish, **_flags(running), "COMPUTE": compute_dtype(x), **cut.constexprs, "BLOCK_P": 16}
    launch(_stats_kernel, (cut.programs, cut.chunks), *args, num_warps=SUM_WARPS, **constexprs)


def stats(x: Tensor) -> Tensor:
    """[count, mean, M2] of each channel, float64 [3, C]."""
    out = x.new_empty(3, x.shape[1], dtype=torch.float64)
    sum_rows(x, out, (None, None, None), 0.0, 0.0, finish=False)
    return out


def finish(gathered: Tensor, x: Tensor, running: Running, momentum: float, eps: float) -> Tensor:
    """`saved` from statistics [W, 3, C]; updates the running ones."""
    num, _, channels = gathered.shape
    saved = new_saved(x)
    args = (gathered, saved, *running, num, channels, eps, momentum)
    grid = (1, triton.cdiv(channels, SUM_CHANNELS))
    launch(_finish_kernel, grid, *args, **_flags(running), BLOCK_P=16, BLOCK_C=SUM_CHANNELS)
    return saved


def apply(
    x: Tensor, weight, bias, saved: Tensor, running: Running, rng, training: bool, eps, slope, dropout, offset
) -> Tensor:
    """y from `saved`; in evaluation from the running statistics, which then are written to `saved`."""
    y, cut = torch.empty_like(x), map_tiles(x)
    args = (x, y, weight, bias, saved, *running[:2], rng, *cut.shape, eps, slope, offset)
    constexprs = {"TRAINING": training, **tile_constexprs(x, weight, dropout, cut)}
    launch(_apply_kernel, (cut.blocks, cut.chunks), *args, num_warps=MAP_WARPS, **constexprs)
    return y


def forward(
    x: Tensor, weight, bias, running: Running, rng, training: bool, momentum, eps, slope, dropout, offset
) -> tuple[Tensor, Tensor]:
    """y and `saved` without other ranks, by the strategy that suits the shape."""
    if not training:
        saved = new_saved(x)
        return apply(x, weight, bias, saved, running, rng, training, eps, slope, dropout, offset), saved
    if not is_local(x.numel() // x.shape[1], x.itemsize, x.device):
        saved = new_saved(x)
        sum_rows(x, saved, running, momentum, eps, finish=True)
        return apply(x, weight, bias, saved, running, rng, training, eps, slope, dropout, offset), saved
    cut = tiles(x, LOCAL_ELEMENTS, LOCAL_CHANNELS)
    y, saved = torch.empty_like(x), new_saved(x)
    args = (x, y, weight, bias, saved, *running, rng, *cut.shape, eps, momentum, slope, offset)
    constexprs = _flags(running) | tile_constexprs(x, weight, dropout, cut)
    launch(_local_kernel, (1, cut.chunks), *args, num_warps=LOCAL_WARPS, **constexprs)
    return y, saved


def tile_constexprs(x: Tensor, weight: Tensor | None, dropout: float, cut: Tiles) -> dict[str, object]:
    drop_with = {"THRESHOLD": dropout_threshold(dropout), "GROUPED": cut.grouped}
    return {"AFFINE": weight is not None, **drop_with, "COMPUTE": compute_dtype(x), **cut.constexprs}
