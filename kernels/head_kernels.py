"""Triton kernels of decoder_head, and the functions that launch them.

A tile is rows (pixels) x all channels, so that one program has whole pixels. `saved` and `sums` are those of
bn_leaky_relu. Backward first takes dy to dt, the gradient at the logits, which is a few numbers a pixel: what follows
then needs no logits. Sums over rows are made in float32 within a thread and in float64 beyond, in an order fixed by
the shape, without atomics: programs leave rows of float64 sums that a small kernel adds up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bn_backward import load_channels, store_dx
from kernels.bn_forward import new_saved, save
from kernels.dispatch import launch
from kernels.random import round_to
from kernels.tiles import INTERPRETER_SCALE, MAX_PROGRAMS, compute_dtype, is_channels_last, tile_at

MAX_CHANNELS, MAX_OUTPUTS = 256, 4  # a program holds whole pixels, and a tile of sums an output
TILE_BYTES, WARPS = 4096, 8  # by count, not yet measured on a GPU: 16 bytes a thread, so one row
COLUMNS, COLUMN_ROWS = 32, 32  # of the tiles that go down columns of small matrices


@triton.jit
def _load_head(p_head, o: tl.constexpr, o_c, C, COMPUTE: tl.constexpr):
    """The head's weights of output `o`, [BLOCK_C]: read where they are used, as kept ones would fill the registers."""
    return tl.load(p_head + o * C + o_c, mask=o_c < C, other=0.0).to(COMPUTE)


@triton.jit
def _pixels(o_m, o: tl.constexpr, HW, COUT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets of output `o` of the rows `o_m`."""
    if CHANNELS_LAST:
        return o_m * COUT + o
    return (o_m // HW * COUT + o) * HW + o_m % HW


@triton.jit
def _activations(p_h, o_h, m_h, b_k, b_d, b_invstd, b_w, b_b, slope, COMPUTE: tl.constexpr):
    """xhat, z and leaky_relu(z), rounded alike in every kernel."""
    b_h = tl.load(p_h + o_h, mask=m_h, other=0.0).to(COMPUTE)
    b_xhat = ((b_h - b_k[None, :]) - b_d[None, :]) * b_invstd[None, :]
    b_z = b_xhat * b_w[None, :] + b_b[None, :]
    return b_xhat, b_z, tl.where(b_z > 0, b_z, b_z * slope)


@triton.jit(do_not_specialize=["M"])
def _running_kernel(p_mean, p_var, p_saved, M, C, eps, BLOCK_C: tl.constexpr):
    """`saved` from the running statistics: the backward pass must not depend on later changes of those."""
    o_c = tl.arange(0, BLOCK_C)
    b_mean = tl.load(p_mean + o_c, mask=o_c < C, other=0.0).to(tl.float64)
    b_var = tl.load(p_var + o_c, mask=o_c < C, other=0.0).to(tl.float64)
    save(p_saved, o_c, C, b_mean, b_var, tl.zeros([BLOCK_C], tl.float64) + M, eps)


@triton.jit(do_not_specialize=["M"])
def _head_kernel(
    p_h, p_y, p_weight, p_bias, p_head, p_head_bias, p_saved, M, C, HW, slope,
    AFFINE: tl.constexpr, COMPUTE: tl.constexpr, COUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_c = tl.arange(0, BLOCK_C)
    b_k, b_d, b_invstd, b_w, b_b = load_channels(p_saved, p_weight, p_bias, o_c, C, AFFINE, COMPUTE, BLOCK_C)
    o_m, o_h, m_h = tile_at(tl.program_id(0) * BLOCK_M, M, o_c, C, HW, CHANNELS_LAST, BLOCK_M)
    _, _, b_a = _activations(p_h, o_h, m_h, b_k, b_d, b_invstd, b_w, b_b, slope, COMPUTE)
    for o in tl.static_range(COUT):
        b_t = tl.sum(b_a * _load_head(p_head, o, o_c, C, COMPUTE)[None, :], 1)
        b_t += tl.load(p_head_bias + o * HW + o_m % HW, mask=o_m < M, other=0.0).to(COMPUTE)
        tl.store(p_y + _pixels(o_m, o, HW, COUT, CHANNELS_LAST), tl.sigmoid(b_t), mask=o_m < M)


@triton.jit
def _dt_kernel(
    p_dy, p_y, p_dt, p_dhead_bias, N, HW,
    COUT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dt = dy * y * (1 - y), [N, COUT * HW] as in memory, and its sums over images, [COUT, HW]."""
    width = COUT * HW
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_sum = tl.zeros([BLOCK_N, BLOCK_K], p_dt.dtype.element_ty)
    for first in range(0, N, BLOCK_N):
        o_n = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_N)
        o_y, m_y = o_n[:, None] * width + o_k[None, :], (o_n < N)[:, None] & (o_k < width)[None, :]
        b_y = tl.load(p_y + o_y, mask=m_y, other=0.0)
        b_dt = tl.load(p_dy + o_y, mask=m_y, other=0.0) * (1 - b_y) * b_y
        tl.store(p_dt + o_y, b_dt, mask=m_y)
        b_sum += b_dt
    if CHANNELS_LAST:
        o_k = o_k % COUT * HW + o_k // COUT
    m_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K) < width
    b_total = tl.sum(b_sum.to(tl.float64), 0)
    tl.store(p_dhead_bias + o_k, round_to(b_total, p_dhead_bias.dtype.element_ty), mask=m_k)


@triton.jit
def _load_dt(p_dt, o_m, o: tl.constexpr, M, HW, COUT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    return tl.load(p_dt + _pixels(o_m, o, HW, COUT, CHANNELS_LAST), mask=o_m < M, other=0.0)[:, None]


@triton.jit
def _grad_tile(
    p_dt, p_h, p_head, p_weight, p_bias, p_saved, start, stop, C, HW, slope,
    AFFINE: tl.constexpr, COMPUTE: tl.constexpr, COUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dt of four outputs, [BLOCK_M, 1] each (the first's in place of those beyond COUT); g, leaky_relu(z), xhat,
    weight / std, offsets and mask of a tile of h."""
    o_c = tl.arange(0, BLOCK_C)
    b_k, b_d, b_invstd, b_w, b_b = load_channels(p_saved, p_weight, p_bias, o_c, C, AFFINE, COMPUTE, BLOCK_C)
    o_m, o_h, m_h = tile_at(start, stop, o_c, C, HW, CHANNELS_LAST, BLOCK_M)
    b_xhat, b_z, b_a = _activations(p_h, o_h, m_h, b_k, b_d, b_invstd, b_w, b_b, slope, COMPUTE)
    b_dt0 = _load_dt(p_dt, o_m, 0, stop, HW, COUT, CHANNELS_LAST)
    b_dt1, b_dt2, b_dt3 = b_dt0, b_dt0, b_dt0
    b_g = b_dt0 * _load_head(p_head, 0, o_c, C, COMPUTE)[None, :]
    if COUT > 1:
        b_dt1 = _load_dt(p_dt, o_m, 1, stop, HW, COUT, CHANNELS_LAST)
        b_g += b_dt1 * _load_head(p_head, 1, o_c, C, COMPUTE)[None, :]
    if COUT > 2:
        b_dt2 = _load_dt(p_dt, o_m, 2, stop, HW, COUT, CHANNELS_LAST)
        b_g += b_dt2 * _load_head(p_head, 2, o_c, C, COMPUTE)[None, :]
    if COUT > 3:
        b_dt3 = _load_dt(p_dt, o_m, 3, stop, HW, COUT, CHANNELS_LAST)
        b_g += b_dt3 * _load_head(p_head, 3, o_c, C, COMPUTE)[None, :]
    b_g = tl.where(b_z > 0, b_g, b_g * slope)
    return b_dt0, b_dt1, b_dt2, b_dt3, b_g, b_a, b_xhat, b_w * b_invstd, o_h, m_h


@triton.jit
def _store_row(p_row, b_sum, o_c, C):
    tl.store(p_row + o_c, tl.sum(b_sum.to(tl.float64), 0), mask=o_c < C)


@triton.jit(do_not_specialize=["M"])
def _sums_kernel(
    p_dt, p_h, p_dh, p_weight, p_bias, p_head, p_saved, p_partial, M, C, HW, rows_each, slope,
    STORE_DH: tl.constexpr, AFFINE: tl.constexpr, COMPUTE: tl.constexpr, COUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows [2 + COUT, C] of p_partial: sums of g, of g * xhat, and the head's dweight.

    In evaluation, where the statistics are constants, STORE_DH also stores dh = weight / std * g.
    """
    o_c, first = tl.arange(0, BLOCK_C), tl.program_id(0) * rows_each
    stop = tl.minimum(first + rows_each, M)
    b_sum_g = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    b_sum_gx = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    b_sum_0 = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    b_sum_1 = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    b_sum_2 = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    b_sum_3 = tl.zeros([BLOCK_M, BLOCK_C], COMPUTE)
    for start in range(first, stop, BLOCK_M):
        tl.debug_barrier()  # no need of it but that the compiler then leaves the vectors' loads in the loop
        b_dt0, b_dt1, b_dt2, b_dt3, b_g, b_a, b_xhat, b_scale, o_h, m_h = _grad_tile(
            p_dt, p_h, p_head, p_weight, p_bias, p_saved, start, stop, C, HW, slope,
            AFFINE, COMPUTE, COUT, CHANNELS_LAST, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        b_sum_g += b_g
        b_sum_gx += b_g * b_xhat
        b_sum_0 += b_dt0 * b_a
        if COUT > 1:
            b_sum_1 += b_dt1 * b_a
        if COUT > 2:
            b_sum_2 += b_dt2 * b_a
        if COUT > 3:
            b_sum_3 += b_dt3 * b_a
        if STORE_DH:
            tl.store(p_dh + o_h, round_to(b_g * b_scale[None, :], p_dh.dtype.element_ty), mask=m_h)
    p_row = p_partial + tl.program_id(0) * (2 + COUT) * C
    _store_row(p_row, b_sum_g, o_c, C)
    _store_row(p_row + C, b_sum_gx, o_c, C)
    _store_row(p_row + 2 * C, b_sum_0, o_c, C)
    if COUT > 1:
        _store_row(p_row + 3 * C, b_sum_1, o_c, C)
    if COUT > 2:
        _store_row(p_row + 4 * C, b_sum_2, o_c, C)
    if COUT > 3:
        _store_row(p_row + 5 * C, b_sum_3, o_c, C)


@triton.jit
def _store_columns(p_out, b_sum, o_k, first, width):
    """Those of the columns `o_k` that lie in first .. first + width, into p_out [width]."""
    m_k = (o_k >= first) & (o_k < first + width)
    tl.store(p_out + o_k - first, round_to(b_sum, p_out.dtype.element_ty), mask=m_k)


@triton.jit
def _add_up_kernel(
    p_partial, p_sums, p_dweight, p_dbias, p_dhead, num, C,
    AFFINE: tl.constexpr, COUT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    width = (2 + COUT) * C
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_all = tl.zeros([BLOCK_P, BLOCK_K], tl.float64)
    for first in range(0, num, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        m_k = (o_p < num)[:, None] & (o_k < width)[None, :]
        b_all += tl.load(p_partial + o_p[:, None] * width + o_k[None, :], mask=m_k, other=0.0)
    b_sum = tl.sum(b_all, 0)
    _store_columns(p_sums, b_sum, o_k, 0, 2 * C)
    if AFFINE:
        _store_columns(p_dbias, b_sum, o_k, 0, C)
        _store_columns(p_dweight, b_sum, o_k, C, C)
    _store_columns(p_dhead, b_sum, o_k, 2 * C, COUT * C)


@triton.jit(do_not_specialize=["M"])
def _dh_kernel(
    p_dt, p_h, p_dh, p_weight, p_bias, p_head, p_saved, p_sums, M, C, HW, slope,
    AFFINE: tl.constexpr, COMPUTE: tl.constexpr, COUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_c, count = tl.arange(0, BLOCK_C), tl.load(p_saved + 3 * C)
    b_mean_g = tl.load(p_sums + o_c, mask=o_c < C, other=0.0) / count
    b_mean_gx = tl.load(p_sums + C + o_c, mask=o_c < C, other=0.0) / count
    _, _, _, _, b_g, _, b_xhat, b_scale, o_h, m_h = _grad_tile(
        p_dt, p_h, p_head, p_weight, p_bias, p_saved, tl.program_id(0) * BLOCK_M, M, C, HW, slope,
        AFFINE, COMPUTE, COUT, CHANNELS_LAST, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    store_dx(p_dh, b_g, b_xhat, o_h, m_h, b_scale, b_mean_g, b_mean_gx)


def new_y(h: Tensor, outputs: int) -> Tensor:
    """[N, Cout, H, W] in the memory layout of the dense `h`, of the computing type."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    layout = torch.channels_last if is_channels_last(h) else torch.contiguous_format
    return torch.empty(h.shape[0], outputs, *h.shape[2:], dtype=dtype, device=h.device, memory_format=layout)


def _constexprs(h: Tensor, weight: Tensor | None, outputs: int) -> dict[str, object]:
    block_c = triton.next_power_of_2(h.shape[1])
    block_m = min(
        TILE_BYTES * INTERPRETER_SCALE // (block_c * h.itemsize), triton.next_power_of_2(h.numel() // h.shape[1])
    )
    flags = {"AFFINE": weight is not None, "COMPUTE": compute_dtype(h), "COUT": outputs}
    return {**flags, "CHANNELS_LAST": is_channels_last(h), "BLOCK_M": max(1, block_m), "BLOCK_C": block_c}


def _shape(h: Tensor) -> tuple[int, int, int]:
    """Kernel arguments M, C, HW."""
    plane = h.shape[2] * h.shape[3]
    return h.shape[0] * plane, h.shape[1], plane


def running_saved(h: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> Tensor:
    """`saved` of evaluation."""
    saved, (rows, channels, _) = new_saved(h), _shape(h)
    launch(
        _running_kernel, (1,), running_mean, running_var, saved, rows, channels, eps, num_warps=1, BLOCK_C=MAX_CHANNELS
    )
    return saved


def head(h: Tensor, weight, bias, head_weight, head_bias, saved, slope) -> Tensor:
    y, constexprs = new_y(h, len(head_weight)), _constexprs(h, weight, len(head_weight))
    args = (h, y, weight, bias, head_weight, head_bias, saved, *_shape(h), slope)
    grid = (triton.cdiv(_shape(h)[0], constexprs["BLOCK_M"]),)
    launch(_head_kernel, grid, *args, num_warps=WARPS, hip_warps=WARPS // 2, **constexprs)
    return y


def logit_grad(dy: Tensor, y: Tensor, head_bias: Tensor) -> tuple[Tensor, Tensor]:
    """dt, in memory as y and dy, and the gradient of the head's bias."""
    dt, dhead_bias = torch.empty_like(y), torch.empty_like(head_bias)
    width, block_k = head_bias.numel(), COLUMNS * 2 * INTERPRETER_SCALE
    constexprs = {"COUT": len(head_bias), "CHANNELS_LAST": is_channels_last(y), "BLOCK_N": COLUMN_ROWS}
    args = (dy, y, dt, dhead_bias, len(y), width // len(head_bias))
    launch(_dt_kernel, (triton.cdiv(width, block_k),), *args, num_warps=WARPS, **constexprs, BLOCK_K=block_k)
    return dt, dhead_bias


def gradient_sums(
    dt: Tensor, h: Tensor, weight, bias, head_weight, saved, slope, dh: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sums, dweight, dbias and the head's dweight; fills `dh` for constant statistics when it is given."""
    (rows, channels, _), outputs = _shape(h), len(head_weight)
    constexprs, block_k = _constexprs(h, weight, outputs), COLUMNS * INTERPRETER_SCALE
    block_m = constexprs["BLOCK_M"]
    rows_each = max(1, triton.cdiv(rows, MAX_PROGRAMS * block_m)) * block_m
    programs = max(1, triton.cdiv(rows, rows_each))
    partial = h.new_empty(programs, 2 + outputs, channels, dtype=torch.float64)
    args = (dt, h, dh, weight, bias, head_weight, saved, partial, *_shape(h), rows_each, slope)
    launch(
        _sums_kernel, (programs,), *args, num_warps=WARPS, hip_warps=WARPS // 2, STORE_DH=dh is not None, **constexprs
    )
    sums = h.new_empty(2, channels, dtype=torch.promote_types(h.dtype, torch.float32))
    grads = tuple(h.new_empty(0) if v is None else torch.empty_like(v) for v in (weight, bias, head_weight))
    constexprs = {"AFFINE": weight is not None, "COUT": outputs, "BLOCK_P": COLUMN_ROWS, "BLOCK_K": block_k}
    grid = (triton.cdiv((2 + outputs) * channels, block_k),)
    launch(_add_up_kernel, grid, partial, sums, *grads, programs, channels, **constexprs)
    return sums, *grads


def input_grad(dt: Tensor, h: Tensor, weight, bias, head_weight, saved, slope, sums: Tensor) -> Tensor:
    """dh from the sums over all rows that `saved` counts."""
    dh, constexprs = torch.empty_like(h), _constexprs(h, weight, len(head_weight))
    args = (dt, h, dh, weight, bias, head_weight, saved, sums, *_shape(h), slope)
    grid = (triton.cdiv(_shape(h)[0], constexprs["BLOCK_M"]),)
    launch(_dh_kernel, grid, *args, num_warps=WARPS, hip_warps=WARPS // 2, **constexprs)
    return dh
