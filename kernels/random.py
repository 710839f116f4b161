"""Counter-based dropout, the same bits in Triton and in plain torch.

Element e of a tensor, counted with channels innermost (NHWC) whatever its memory layout, belongs to group e // 8. One
Philox4x32-7 call per group (Salmon et al., 2011: the fewest rounds that pass BigCrush), with key = seed and counter =
(group, step >> 32, step & 0xffffffff, offset), gives four words, so eight 16-bit numbers, low half first; the element
is kept when number e % 8 is at least round(p * 65536).

`rng` is an int64 tensor [seed, step] on the device, so a replayed CUDA graph draws fresh masks once its step moves on
and a resumed run draws the same masks again; `offset` (below 2^31) tells apart the layers of one step. No mask is
stored: backward draws it again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import INTERPRET as _INTERPRET
from kernels.dispatch import register

INTERPRET = tl.constexpr(_INTERPRET)
_ROUND = (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
ROUNDS = tl.constexpr(7)
_CHUNK = 1 << 16  # groups


def dropout_threshold(p: float) -> int:
    """Elements whose 16-bit number is below this are dropped. Raises ValueError unless 0 <= p < 1."""
    threshold = round(p * 65536) if 0 <= p < 1 else 65536
    if threshold > 65535:
        raise ValueError(f"dropout must be in [0, 1), got {p}")
    return threshold


def dropout_scale(p: float) -> float:
    """1 / (share kept), with p as rounded to 16 bits, so that the mean is kept exactly."""
    return 65536 / (65536 - dropout_threshold(p))


def check_rng(p: float, rng: Tensor | None, offset: int, x: Tensor) -> None:
    """Raises ValueError when dropout is asked for without a usable `rng`."""
    if dropout_threshold(p) == 0:
        return
    if rng is None or rng.shape != (2,) or rng.dtype != torch.int64 or rng.device != x.device:
        raise ValueError(f"dropout needs rng, an int64 tensor [seed, step] on {x.device}")
    if not 0 <= offset < 2**31:
        raise ValueError(f"dropout offset must be in [0, 2^31), got {offset}")


def philox(c02: Tensor, c13: Tensor, key: Tensor, rounds: int = ROUNDS.value) -> tuple[Tensor, ...]:
    """Philox4x32 (Salmon et al., 2011) of counters (c0, c2) and (c1, c3), int64 [2, n] each, and key int64 [2].

    Returns the words w0, w1, w2 and w3, [n] each; the counters are overwritten. Two of them a tensor, since on a CPU
    the number of operations counts as much as their size.
    """
    factors = key.new_tensor([_ROUND, _ROUND[::-1]])[:, :, None]
    keys = key.flip(0) + key.new_tensor([[i * _KEY[1], i * _KEY[0]] for i in range(rounds)])
    keys[1::2] = keys[1::2].flip(1)  # every round swaps its two words
    keys = (keys & _LOW)[:, :, None]
    product = torch.empty_like(c02)
    for i in range(rounds):
        # The 64-bit product may wrap into the sign, but shift and mask still give the high word. The low words are
        # left with what stands above them until the next round's mask.
        torch.mul(c02, factors[i % 2], out=product)
        torch.bitwise_right_shift(product, 32, out=c02).bitwise_xor_(keys[i])
        c02[0].bitwise_xor_(c13[1])
        c02[1].bitwise_xor_(c13[0])
        c02.bitwise_and_(_LOW)
        c13, product = product, c13
    c13.bitwise_and_(_LOW)
    first, second = (1, 0) if rounds % 2 else (0, 1)  # every round swaps them
    return c02[first], c13[first], c02[second], c13[second]


def _keep(rng: Tensor, elements: int, threshold: int, offset: int) -> Tensor:
    """Bool [elements], a chunk at a time so that a CPU's cache holds it."""
    groups = (elements + 7) // 8
    seed, step = rng.unbind()
    key = torch.stack([seed & _LOW, seed >> 32 & _LOW])
    first = torch.stack([torch.zeros_like(step), step & _LOW])
    second = torch.stack([step >> 32 & _LOW, torch.full_like(step, offset)])
    words = torch.empty(groups, 4, dtype=torch.int32, device=rng.device)
    for start in range(0, groups, _CHUNK):
        size = min(_CHUNK, groups - start)
        c02, c13 = (half[:, None].expand(2, size).clone() for half in (first, second))
        torch.arange(start, start + size, out=c02[0])
        for i, word in enumerate(philox(c02, c13, key)):
            words[start : start + size, i] = word
    numbers = words.view(torch.int16).flatten()[:elements]  # low half first, as the machine stores a word
    return numbers.bitwise_xor_(-32768) >= threshold - 32768  # the unsigned order, in signed numbers


_keep_op = register(
    "dropout_keep(Tensor rng, int elements, int threshold, int offset) -> Tensor",
    _keep,
    lambda rng, elements, threshold, offset: rng.new_empty(elements, dtype=torch.bool),
)


def keep_mask(x: Tensor, p: float, rng: Tensor, offset: int) -> Tensor:
    """Bool tensor of the shape of `x`, [N, C] or [N, C, H, W]: True where dropout keeps the element."""
    keep = _keep_op(rng, x.numel(), dropout_threshold(p), offset)
    if x.dim() == 2:
        return keep.view(x.shape)
    n, c, h, w = x.shape
    return keep.view(n, h, w, c).permute(0, 3, 1, 2)


def dropout_ref(x: Tensor, p: float, rng: Tensor | None, offset: int) -> Tensor:
    """Dropout in plain torch, differentiable in `x`."""
    if dropout_threshold(p) == 0:
        return x
    return x * keep_mask(x, p, rng, offset).to(x.dtype).mul_(dropout_scale(p))


@triton.jit
def _group_words(p_rng, offset, group):
    seed = tl.load(p_rng)
    step = tl.load(p_rng + 1)
    group = group.to(tl.uint32)
    zero = group * 0
    high, low = zero + (step >> 32).to(tl.uint32), zero + step.to(tl.uint32)
    return tl.philox(seed, group, high, low, zero + offset, ROUNDS)


@triton.jit
def drop(
    x,
    p_rng,
    offset,
    o_m,
    start_c,
    C,
    THRESHOLD: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Dropout of the tile `x`, rows `o_m` and channels start_c .. start_c + BLOCK_C; its own backward.

    GROUPED (C, start_c and BLOCK_C multiples of 8) makes one Philox call per 8 elements, else one per element. A
    dropped NaN stays NaN, as in PyTorch.
    """
    if THRESHOLD == 0:
        return x
    if GROUPED:
        group = (o_m[:, None] * C + start_c) // 8 + tl.arange(0, BLOCK_C // 8)[None, :]
        w0, w1, w2, w3 = _group_words(p_rng, offset, group)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        number = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK_M, BLOCK_C])
    else:
        element = o_m[:, None] * C + (start_c + tl.arange(0, BLOCK_C))[None, :]
        w0, w1, w2, w3 = _group_words(p_rng, offset, element // 8)
        lane = element % 8
        word = tl.where(lane < 2, w0, tl.where(lane < 4, w1, tl.where(lane < 6, w2, w3)))
        number = tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)
    scale = tl.full((), 65536.0 / (65536 - THRESHOLD), x.dtype)
    return x * tl.where(number >= THRESHOLD, scale, scale * 0)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Cast to `dtype`, to nearest even: by hand where the interpreter would truncate, on the way to bfloat16."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            x = x.to(tl.float32)
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
