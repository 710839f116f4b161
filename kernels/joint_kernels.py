"""Triton kernels of joint_input, and the functions that launch them, on dense parts [N, C].

Programs lie on the grid's second axis, those of x first: the helpers of bn_leaky_relu count a batch in its program 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bn_backward import LOCAL_BACKWARD_ELEMENTS, load_channels, store_dx, store_sums
from kernels.bn_forward import (
    LOCAL_CHANNELS,
    LOCAL_ELEMENTS,
    LOCAL_WARPS,
    block_stats,
    load_affine,
    mark_updated,
    merge,
    new_saved,
    save,
    settle,
)
from kernels.dispatch import launch
from kernels.random import drop, dropout_threshold, round_to
from kernels.tiles import Tiles, compute_dtype, tile_at, tiles

BATCH, RANKS, RUNNING = 0, 1, 2  # where the statistics come from: x, those of all ranks, the running ones


@triton.jit
def _place(
    p_part, p_bias, p_y, p_rng, start, start_c, M, W, first, C, slope, offset,
    HAS_BIAS: tl.constexpr, THRESHOLD: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of a part of W channels, its bias and leaky ReLU, into the channels of y from `first` on."""
    o_c = start_c + tl.arange(0, BLOCK_C)
    o_m, o_part, m_part = tile_at(start, M, o_c, W, 1, True, BLOCK_M)
    b_y = tl.load(p_part + o_part, mask=m_part, other=0.0).to(COMPUTE)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_c, mask=o_c < W, other=0.0).to(COMPUTE)[None, :]
    b_y = tl.where(b_y > 0, b_y, b_y * slope)
    b_y = drop(b_y, p_rng, offset, o_m, first + start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
    p_out = p_y + o_m[:, None] * C + (first + o_c)[None, :]
    tl.store(p_out, round_to(b_y, p_y.dtype.element_ty), mask=m_part)


@triton.jit
def _normalise(
    p_x, p_y, p_weight, p_bias, p_gathered, p_saved, p_mean, p_var, p_batches, p_rng,
    start_c, M, CX, C, num_ranks, eps, momentum, slope, offset,
    STATISTICS: tl.constexpr, TRACK: tl.constexpr, COUNT_BATCHES: tl.constexpr, AFFINE: tl.constexpr,
    THRESHOLD: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All rows of x's channels start_c .. start_c + BLOCK_C: statistics, then batch norm and leaky ReLU into y."""
    o_c = start_c + tl.arange(0, BLOCK_C)
    if STATISTICS == 2:
        b_mean = tl.load(p_mean + o_c, mask=o_c < CX, other=0.0).to(tl.float64)
        b_var = tl.load(p_var + o_c, mask=o_c < CX, other=0.0).to(tl.float64)
        b_k, b_d, b_invstd = save(p_saved, o_c, CX, b_mean, b_var, tl.zeros([BLOCK_C], tl.float64) + M, eps)
    else:
        if STATISTICS == 1:
            b_count, b_mean, b_m2 = merge(p_gathered, num_ranks, o_c, CX, 16, BLOCK_C)
        else:
            count, b_mean, b_m2 = block_stats(p_x, 0, M, o_c, CX, 1, True, COMPUTE, BLOCK_M, BLOCK_C)
            b_count = tl.zeros([BLOCK_C], tl.float64) + count
        b_k, b_d, b_invstd = settle(
            p_saved, p_mean, p_var, p_batches, o_c, CX, b_count, b_mean, b_m2, eps, momentum, TRACK, COUNT_BATCHES
        )
    b_w, b_b = load_affine(p_weight, p_bias, o_c, CX, AFFINE, COMPUTE, BLOCK_C)
    for start in range(0, M, BLOCK_M):
        o_m, o_x, m_x = tile_at(start, M, o_c, CX, 1, True, BLOCK_M)
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(COMPUTE)
        b_z = ((b_x - b_k[None, :]) - b_d[None, :]) * b_invstd[None, :] * b_w[None, :] + b_b[None, :]
        b_y = tl.where(b_z > 0, b_z, b_z * slope)
        b_y = drop(b_y, p_rng, offset, o_m, start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
        tl.store(p_y + o_m[:, None] * C + o_c[None, :], round_to(b_y, p_y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["offset"])
def _forward_kernel(
    p_x, p_z, p_c, p_y, p_weight, p_bias, p_zbias, p_gathered, p_saved, p_mean, p_var, p_batches, p_rng,
    M, CX, CZ, CC, num_ranks, eps, momentum, slope, offset,
    STATISTICS: tl.constexpr, TRACK: tl.constexpr, COUNT_BATCHES: tl.constexpr, AFFINE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_C: tl.constexpr, THRESHOLD: tl.constexpr, GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i, C = tl.program_id(1), CX + CZ + CC
    num_x, chunks_z, chunks_c = tl.cdiv(CX, BLOCK_C), tl.cdiv(CZ, BLOCK_C), tl.cdiv(CC, BLOCK_C)
    num_z = tl.cdiv(M, BLOCK_M) * chunks_z
    if i < num_x:
        _normalise(
            p_x, p_y, p_weight, p_bias, p_gathered, p_saved, p_mean, p_var, p_batches, p_rng,
            i * BLOCK_C, M, CX, C, num_ranks, eps, momentum, slope, offset,
            STATISTICS, TRACK, COUNT_BATCHES, AFFINE, THRESHOLD, GROUPED, COMPUTE, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    elif i < num_x + num_z:
        j = i - num_x
        _place(
            p_z, p_zbias, p_y, p_rng, j // chunks_z * BLOCK_M, j % chunks_z * BLOCK_C, M, CZ, CX, C, slope, offset,
            HAS_BIAS, THRESHOLD, GROUPED, COMPUTE, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    else:
        if HAS_C:
            j = i - num_x - num_z
            _place(
                p_c, None, p_y, p_rng, j // chunks_c * BLOCK_M, j % chunks_c * BLOCK_C, M, CC, CX + CZ, C, 1.0, offset,
                False, THRESHOLD, GROUPED, COMPUTE, BLOCK_M, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _grad_x_tile(
    p_dy, p_x, p_rng, start, start_c, M, CX, C, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
    THRESHOLD: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient at batch norm's output, and xhat; the output is rounded as in the forward pass, so its sign agrees."""
    o_c = start_c + tl.arange(0, BLOCK_C)
    o_m, o_x, m_x = tile_at(start, M, o_c, CX, 1, True, BLOCK_M)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(COMPUTE)
    b_g = tl.load(p_dy + o_m[:, None] * C + o_c[None, :], mask=m_x, other=0.0).to(COMPUTE)
    b_xhat = ((b_x - b_k[None, :]) - b_d[None, :]) * b_invstd[None, :]
    b_z = b_xhat * b_w[None, :] + b_b[None, :]
    b_g = drop(b_g, p_rng, offset, o_m, start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
    return tl.where(b_z > 0, b_g, b_g * slope), b_xhat, o_x, m_x


@triton.jit
def _grad_x(
    p_dy, p_x, p_dx, p_weight, p_bias, p_saved, p_sums, p_dweight, p_dbias, p_rng, start_c, M, CX, C, slope, offset,
    SUM: tl.constexpr, STORE_DX: tl.constexpr, TRAINING: tl.constexpr, AFFINE: tl.constexpr,
    THRESHOLD: tl.constexpr, GROUPED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All rows of a few channels of x: SUM stores their sums, STORE_DX dx from those or, without SUM, from p_sums."""
    o_c = start_c + tl.arange(0, BLOCK_C)
    b_k, b_d, b_invstd, b_w, b_b = load_channels(p_saved, p_weight, p_bias, o_c, CX, AFFINE, COMPUTE, BLOCK_C)
    if SUM:
        count = M
        b_sum_g = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
        b_sum_gx = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
        for start in range(0, M, BLOCK_M):
            b_g, b_xhat, o_x, m_x = _grad_x_tile(
                p_dy, p_x, p_rng, start, start_c, M, CX, C, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
                THRESHOLD, GROUPED, COMPUTE, BLOCK_M, BLOCK_C,
            )  # fmt: skip
            b_sum_g += b_g
            b_sum_gx += b_g * b_xhat
        b_total_g, b_total_gx = tl.sum(b_sum_g.to(tl.float64), 0), tl.sum(b_sum_gx.to(tl.float64), 0)
        store_sums(p_sums, p_dweight, p_dbias, o_c, CX, b_total_g, b_total_gx, AFFINE)
    else:
        count = tl.load(p_saved + 3 * CX)
        b_total_g = tl.load(p_sums + o_c, mask=o_c < CX, other=0.0)
        b_total_gx = tl.load(p_sums + CX + o_c, mask=o_c < CX, other=0.0)
    if STORE_DX:
        b_mean_g, b_mean_gx = (b_total_g / count).to(COMPUTE), (b_total_gx / count).to(COMPUTE)
        # read anew, as registers cannot keep them over the sums on every architecture
        b_k, b_d, b_invstd, b_w, b_b = load_channels(p_saved, p_weight, p_bias, o_c, CX, AFFINE, COMPUTE, BLOCK_C)
        for start in range(0, M, BLOCK_M):
            b_g, b_xhat, o_x, m_x = _grad_x_tile(
                p_dy, p_x, p_rng, start, start_c, M, CX, C, b_k, b_d, b_invstd, b_w, b_b, slope, offset,
                THRESHOLD, GROUPED, COMPUTE, BLOCK_M, BLOCK_C,
            )  # fmt: skip
            if TRAINING:
                store_dx(p_dx, b_g, b_xhat, o_x, m_x, b_w * b_invstd, b_mean_g, b_mean_gx)
            else:  # the statistics are constants; xhat may be infinite, so that no multiple of it will do
                tl.store(p_dx + o_x, round_to(b_g * (b_w * b_invstd)[None, :], p_dx.dtype.element_ty), mask=m_x)


@triton.jit
def _grad_part(
    p_dy, p_part, p_bias, p_dpart, p_dbias, p_rng, start_c, M, W, first, C, slope, offset,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, THRESHOLD: tl.constexpr, GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All rows of a few channels of a part that lies in y from channel `first` on."""
    o_c = start_c + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    for start in range(0, M, BLOCK_M):
        o_m, o_part, m_part = tile_at(start, M, o_c, W, 1, True, BLOCK_M)
        b_g = tl.load(p_dy + o_m[:, None] * C + (first + o_c)[None, :], mask=m_part, other=0.0).to(COMPUTE)
        b_g = drop(b_g, p_rng, offset, o_m, first + start_c, C, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
        if ACTIVATION:
            b_z = tl.load(p_part + o_part, mask=m_part, other=0.0).to(COMPUTE)
            if HAS_BIAS:
                b_z += tl.load(p_bias + o_c, mask=o_c < W, other=0.0).to(COMPUTE)[None, :]
            b_g = tl.where(b_z > 0, b_g, b_g * slope)
        tl.store(p_dpart + o_part, round_to(b_g, p_dpart.dtype.element_ty), mask=m_part)
        b_sum += b_g
    if HAS_BIAS:
        tl.store(p_dbias + o_c, round_to(tl.sum(b_sum.to(tl.float64), 0), p_dbias.dtype.element_ty), mask=o_c < W)


@triton.jit(do_not_specialize=["offset"])
def _backward_kernel(
    p_dy, p_x, p_z, p_dx, p_dz, p_dc, p_weight, p_bias, p_zbias, p_saved, p_sums, p_dweight, p_dbias, p_dzbias, p_rng,
    M, CX, CZ, CC, slope, offset,
    SUM: tl.constexpr, STORE_DX: tl.constexpr, TRAINING: tl.constexpr, AFFINE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_C: tl.constexpr, THRESHOLD: tl.constexpr, GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i, C = tl.program_id(1), CX + CZ + CC
    num_x, num_z = tl.cdiv(CX, BLOCK_C), tl.cdiv(CZ, BLOCK_C)
    if i < num_x:
        _grad_x(
            p_dy, p_x, p_dx, p_weight, p_bias, p_saved, p_sums, p_dweight, p_dbias, p_rng,
            i * BLOCK_C, M, CX, C, slope, offset,
            SUM, STORE_DX, TRAINING, AFFINE, THRESHOLD, GROUPED, COMPUTE, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    elif i < num_x + num_z:
        _grad_part(
            p_dy, p_z, p_zbias, p_dz, p_dzbias, p_rng, (i - num_x) * BLOCK_C, M, CZ, CX, C, slope, offset,
            True, HAS_BIAS, THRESHOLD, GROUPED, COMPUTE, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    else:
        if HAS_C:
            _grad_part(
                p_dy, None, None, p_dc, None, p_rng, (i - num_x - num_z) * BLOCK_C, M, CC, CX + CZ, C, 1.0, offset,
                False, False, THRESHOLD, GROUPED, COMPUTE, BLOCK_M, BLOCK_C,
            )  # fmt: skip


def _constexprs(y: Tensor, widths: tuple[int, ...], dropout: float, cut: Tiles) -> dict[str, object]:
    """`widths`: channels of x, z and c. Eight neighbours share a Philox call where all are multiples of 8."""
    return {
        "THRESHOLD": dropout_threshold(dropout),
        "GROUPED": cut.block_c % 8 == 0 and all(width % 8 == 0 for width in widths),
        "COMPUTE": compute_dtype(y),
        "BLOCK_M": cut.block_m,
        "BLOCK_C": cut.block_c,
    }


def launch_forward(
    x: Tensor, z: Tensor, c, z_bias, weight, bias, running, gathered, training: bool, momentum, eps,
    rng, slope, dropout, offset,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and `saved`; `gathered` are the statistics of all ranks [W, 3, Cx], None without other ranks."""
    widths = (x.shape[1], z.shape[1], 0 if c is None else c.shape[1])
    y, saved = x.new_empty(len(x), sum(widths)), new_saved(x)
    cut = tiles(y, LOCAL_ELEMENTS, LOCAL_CHANNELS)
    chunks = [triton.cdiv(width, cut.block_c) for width in widths]
    statistics = (BATCH if gathered is None else RANKS) if training else RUNNING
    flags = {"STATISTICS": statistics, "TRACK": running[0] is not None, "COUNT_BATCHES": running[2] is not None}
    flags |= {"AFFINE": weight is not None, "HAS_BIAS": z_bias is not None, "HAS_C": c is not None}
    args = (x, z, c, y, weight, bias, z_bias, gathered, saved, *running, rng, len(x), *widths)
    scalars = (0 if gathered is None else len(gathered), eps, momentum, slope, offset)
    constexprs = flags | _constexprs(y, widths, dropout, cut)
    grid = (1, chunks[0] + cut.blocks * (chunks[1] + chunks[2]))
    launch(_forward_kernel, grid, *args, *scalars, num_warps=LOCAL_WARPS, **constexprs)
    if training:
        mark_updated(running)
    return y, saved


def launch_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight, bias, z_bias, saved, rng, training: bool, slope, dropout, offset,
    sums: Tensor | None = None, store_dx: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The sums [2, Cx] of batch norm's backward, dx, dweight, dbias, dz, dz_bias and dc.

    With `sums`, those over all rows that `saved` counts, only dx is computed; without `store_dx` all but dx.
    """
    widths, given = (x.shape[1], z.shape[1], dy.shape[1] - x.shape[1] - z.shape[1]), sums is not None
    sums = sums if given else x.new_empty(2, widths[0], dtype=torch.promote_types(x.dtype, torch.float32))
    grads = (x, weight, bias, z, z_bias)
    dx, dweight, dbias, dz, dz_bias = (x.new_empty(0) if v is None else torch.empty_like(v) for v in grads)
    dc, cut = z.new_empty(len(z), widths[2]), tiles(dy, LOCAL_BACKWARD_ELEMENTS, LOCAL_CHANNELS)
    args = (dy, x, z, dx, dz, dc, weight, bias, z_bias, saved, sums, dweight, dbias, dz_bias, rng, len(x), *widths)
    constexprs = {"SUM": not given, "STORE_DX": store_dx, "TRAINING": training, "AFFINE": weight is not None}
    constexprs |= {"HAS_BIAS": z_bias is not None, "HAS_C": widths[2] > 0, **_constexprs(dy, widths, dropout, cut)}
    grid = (1, sum(triton.cdiv(width, cut.block_c) for width in (widths[:1] if given else widths)))
    launch(_backward_kernel, grid, *args, slope, offset, num_warps=LOCAL_WARPS, **constexprs)
    return sums, dx, dweight, dbias, dz, dz_bias, dc
