"""How a tensor [N, C] or [N, C, H, W] is cut into tiles of rows x channels, on the host and inside kernels.

Row r is pixel r % (H*W) of image r // (H*W). Channels last (and [N, C]) is the fast path: a tile's rows are contiguous
channels, read 16 bytes at a time. NCHW is right but slower: there a tile is one channel wide.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import INTERPRET

# Tiles follow from the shape alone, so sums are cut alike on every device. Chosen by count, not yet measured on a GPU.
INTERPRETER_SCALE = 8 if INTERPRET else 1  # the interpreter pays about 1 ms a program: fewer and larger
MAP_ELEMENTS, MAP_CHANNELS, MAP_WARPS = 4096, 64, 4  # elements of two bytes
# A reduction has few programs, each with much in flight, and chunks of few channels (64 bytes of bfloat16), since its
# last block reads programs * block_c partial sums while the other multiprocessors idle.
SUM_ELEMENTS, SUM_CHANNELS, SUM_WARPS = 4096, 32, 8
MAX_PROGRAMS = 8 if INTERPRET else 264  # two for each of an H200's 132 multiprocessors


def check_channels(x: Tensor, **vectors: Tensor | None) -> None:
    """ValueError unless `x` is [N, C] or [N, C, H, W] and each vector None or one number a channel on its device."""
    if x.dim() not in (2, 4):
        raise ValueError(f"expected [N, C] or [N, C, H, W], got {list(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} must have shape [{x.shape[1]}], got {list(vector.shape)}")
        if vector is not None and vector.device != x.device:
            raise ValueError(f"{name} is on {vector.device}, the input on {x.device}")


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """`x` itself when it is channels_last or contiguous, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()


def dense_like(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the memory layout of the dense tensor `x`."""
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y.contiguous()


def compute_dtype(x: Tensor) -> tl.dtype:
    """The type in which kernels compute: float32, or float64 for float64 tensors."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@dataclass(frozen=True, slots=True)
class Tiles:
    """`rows` x `channels` cut into tiles; in a reduction each program walks `rows_each` rows, tile by tile."""

    rows: int
    channels: int
    plane: int
    channels_last: bool
    block_m: int
    block_c: int
    rows_each: int

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.rows, self.block_m)

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.channels, self.block_c)

    @property
    def programs(self) -> int:
        return max(1, triton.cdiv(self.rows, self.rows_each))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Kernel arguments M, C, HW."""
        return self.rows, self.channels, self.plane

    @property
    def constexprs(self) -> dict[str, object]:
        return {"CHANNELS_LAST": self.channels_last, "BLOCK_M": self.block_m, "BLOCK_C": self.block_c}

    @property
    def grouped(self) -> bool:
        """Whether eight neighbours of a tile share one Philox call."""
        return self.block_c % 8 == 0 and self.channels % 8 == 0


def map_tiles(x: Tensor) -> Tiles:
    """The tiles of a dense `x` for a kernel that treats every tile in a program of its own."""
    return tiles(x, MAP_ELEMENTS * 2 // max(x.itemsize, 2), MAP_CHANNELS)


def sum_tiles(x: Tensor) -> Tiles:
    """The tiles of a dense `x` for a kernel that sums over rows."""
    return tiles(x, SUM_ELEMENTS, SUM_CHANNELS)


def tiles(x: Tensor, elements: int, channel_block: int) -> Tiles:
    """The tiles of a dense `x`: about `elements` each, of at most `channel_block` channels."""
    n, channels = x.shape[:2]
    plane = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
    rows, channels_last = n * plane, x.dim() == 2 or is_channels_last(x)
    block_c = min(channel_block * INTERPRETER_SCALE, triton.next_power_of_2(channels)) if channels_last else 1
    block_m = max(1, min(elements * INTERPRETER_SCALE // block_c, triton.next_power_of_2(rows)))
    programs = max(1, MAX_PROGRAMS // triton.cdiv(channels, block_c))
    rows_each = max(1, triton.cdiv(rows, programs * block_m)) * block_m
    return Tiles(rows, channels, plane, channels_last, block_m, block_c, rows_each)


_counters: dict[tuple[str, int], Tensor] = {}


def block_counters(x: Tensor, size: int) -> Tensor:
    """At least `size` zeros (int32) in which the blocks of one launch count themselves; `is_last_block` resets them.

    One buffer a stream, as launches on a stream never overlap: that saves clearing a new one before every launch.
    """
    key = (str(x.device), torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)
    if key not in _counters or _counters[key].numel() < size:
        _counters[key] = torch.zeros(max(size, 4096), dtype=torch.int32, device=x.device)
    return _counters[key]


@triton.jit
def tile_at(start, stop, o_c, C, HW, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows start .. start + BLOCK_M, below `stop`, and channels `o_c`: int64 rows, offsets in memory, mask."""
    o_m = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
    m_x = (o_m < stop)[:, None] & (o_c < C)[None, :]
    if CHANNELS_LAST:
        return o_m, o_m[:, None] * C + o_c[None, :], m_x
    return o_m, (o_m // HW * C * HW + o_m % HW)[:, None] + o_c[None, :] * HW, m_x


@triton.jit
def is_last_block(p_counter, num_blocks):
    """Counts this block in; True in the one that arrives last, where everything the others stored can be read.

    Read it past the first-level cache (cache_modifier=".cg"), which may hold stale lines.
    """
    tl.debug_barrier()
    last = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") == num_blocks - 1
    if last:
        tl.store(p_counter, 0)
    return last


@triton.jit
def sum_partials(p_partial, num, stride, o_c, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum of the `num` rows, `stride` apart, that other blocks have stored, at the columns `o_c` below `C`."""
    b_total = tl.zeros([BLOCK_P, BLOCK_C], p_partial.dtype.element_ty)
    for first in range(0, num, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        m_p = (o_p < num)[:, None] & (o_c < C)[None, :]
        b_total += tl.load(p_partial + o_p[:, None] * stride + o_c[None, :], mask=m_p, other=0.0, cache_modifier=".cg")
    return tl.sum(b_total, 0)
