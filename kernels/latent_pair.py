"""y = dropout([z_hat; z], p) with z_hat = mu + exp(log_sigma) * eps: inferred and drawn codes as one batch.

encoded: [N, 2L] or [N, 2L, 1, 1], mu in its first L channels and log_sigma in the others; eps, z: [N, L] or
[N, L, 1, 1]; all floating. y: [2N, L] or [2N, L, 1, 1], as encoded, of `dtype`; z_hat: float32 [N, L], for watching.
The reparameterisation of Kingma and Welling (arXiv:1312.6114). Backward, with g = dropout(dy, p)[:N]:
    dencoded = [g, g * exp(log_sigma) * eps]; eps and z get no gradient, and none flows through the second output.
Reads encoded, eps and z, writes y and z_hat; backward reads half of dy, log_sigma and eps: one launch each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import below_autograd, launch, register, use_triton
from kernels.random import check_rng, drop, dropout_ref, dropout_threshold, round_to
from kernels.tiles import MAP_CHANNELS, check_channels, compute_dtype, tile_at, tiles

ELEMENTS = 1024  # of a tile: codes are few, and small tiles spread them over more multiprocessors


def latent_pair_ref(
    encoded: Tensor,
    eps: Tensor,
    z: Tensor,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    dtype, wide = dtype or encoded.dtype, torch.promote_types(encoded.dtype, torch.float32)
    mu, log_sigma = encoded.flatten(1).to(wide).chunk(2, dim=1)
    z_hat = mu + torch.exp(log_sigma) * eps.flatten(1).detach()
    y = dropout_ref(torch.cat([z_hat.to(dtype), z.flatten(1).detach().to(dtype)]), dropout, rng, offset)
    return y.view(*y.shape, *encoded.shape[2:]), z_hat.detach()


@triton.jit(do_not_specialize=["offset"])
def _forward_kernel(
    p_encoded,
    p_eps,
    p_z,
    p_y,
    p_z_hat,
    p_rng,
    N,
    L,
    offset,
    THRESHOLD: tl.constexpr,
    GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start_c = tl.program_id(1) * BLOCK_C
    o_c = start_c + tl.arange(0, BLOCK_C)
    o_m, o_y, m_y = tile_at(tl.program_id(0) * BLOCK_M, 2 * N, o_c, L, 1, True, BLOCK_M)
    m_q = m_y & (o_m < N)[:, None]
    o_e = o_m[:, None] * 2 * L + o_c[None, :]
    b_mu = tl.load(p_encoded + o_e, mask=m_q, other=0.0).to(COMPUTE)
    b_log_sigma = tl.load(p_encoded + (o_e + L), mask=m_q, other=0.0).to(COMPUTE)
    b_eps = tl.load(p_eps + o_y, mask=m_q, other=0.0).to(COMPUTE)
    b_z_hat = b_mu + tl.exp(b_log_sigma) * b_eps
    tl.store(p_z_hat + o_y, b_z_hat, mask=m_q)
    # As an offset of the row: with N * L unknown, 16-byte loads would need it to be divisible.
    o_z = (o_m - N)[:, None] * L + o_c[None, :]
    b_z = tl.load(p_z + o_z, mask=m_y & (o_m >= N)[:, None], other=0.0).to(COMPUTE)
    b_y = tl.where(m_q, b_z_hat, b_z)
    b_y = drop(b_y, p_rng, offset, o_m, start_c, L, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
    tl.store(p_y + o_y, round_to(b_y, p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["offset"])
def _backward_kernel(
    p_dy,
    p_encoded,
    p_eps,
    p_dencoded,
    p_rng,
    N,
    L,
    offset,
    THRESHOLD: tl.constexpr,
    GROUPED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start_c = tl.program_id(1) * BLOCK_C
    o_c = start_c + tl.arange(0, BLOCK_C)
    o_m, o_y, m_y = tile_at(tl.program_id(0) * BLOCK_M, N, o_c, L, 1, True, BLOCK_M)
    o_e = o_m[:, None] * 2 * L + o_c[None, :]
    b_log_sigma = tl.load(p_encoded + (o_e + L), mask=m_y, other=0.0).to(COMPUTE)
    b_eps = tl.load(p_eps + o_y, mask=m_y, other=0.0).to(COMPUTE)
    b_g = tl.load(p_dy + o_y, mask=m_y, other=0.0).to(COMPUTE)
    b_g = drop(b_g, p_rng, offset, o_m, start_c, L, THRESHOLD, GROUPED, BLOCK_M, BLOCK_C)
    dtype: tl.constexpr = p_dencoded.dtype.element_ty
    tl.store(p_dencoded + o_e, round_to(b_g, dtype), mask=m_y)
    tl.store(p_dencoded + (o_e + L), round_to(b_g * tl.exp(b_log_sigma) * b_eps, dtype), mask=m_y)


def _outputs(encoded: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, latent = encoded.shape[0], encoded.shape[1] // 2
    wide = torch.promote_types(encoded.dtype, torch.float32)
    return encoded.new_empty(2 * n, latent, dtype=dtype), encoded.new_empty(n, latent, dtype=wide)


def _forward(encoded, eps, z, rng, dtype, dropout, offset, triton):
    encoded, eps, z = encoded.contiguous(), eps.contiguous(), z.contiguous()
    if not triton:
        return latent_pair_ref(encoded, eps, z, dtype, dropout, rng, offset)
    y, z_hat = _outputs(encoded, dtype)
    cut = tiles(y, ELEMENTS, MAP_CHANNELS)
    args = (encoded, eps, z, y, z_hat, rng, *eps.shape, offset)
    launch(_forward_kernel, (cut.blocks, cut.chunks), *args, **_constexprs(cut, dropout, z_hat))
    return y, z_hat


def _backward(dy, encoded, eps, rng, dropout, offset, triton):
    dy, encoded, eps = dy.contiguous(), encoded.contiguous(), eps.contiguous()
    if not triton:
        wide = torch.promote_types(encoded.dtype, torch.float32)
        g = dropout_ref(dy, dropout, rng, offset)[: len(eps)].to(wide)
        sigma = torch.exp(encoded[:, eps.shape[1] :].to(wide))
        return torch.cat([g, g * sigma * eps], dim=1).to(encoded.dtype)
    dencoded, cut = torch.empty_like(encoded), tiles(eps, ELEMENTS, MAP_CHANNELS)
    args = (dy, encoded, eps, dencoded, rng, *eps.shape, offset)
    launch(_backward_kernel, (cut.blocks, cut.chunks), *args, **_constexprs(cut, dropout, encoded))
    return dencoded


def _constexprs(cut, dropout, computed):
    return {
        "THRESHOLD": dropout_threshold(dropout),
        "GROUPED": cut.grouped,
        "COMPUTE": compute_dtype(computed),
        "BLOCK_M": cut.block_m,
        "BLOCK_C": cut.block_c,
    }


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, encoded, eps, z, rng, dtype, *options):
        with below_autograd():
            y, z_hat = _forward_op(encoded, eps, z, rng, dtype, *options)
        ctx.save_for_backward(encoded, eps, rng)
        ctx.options = options
        ctx.mark_non_differentiable(z_hat)
        return y, z_hat

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        return _backward_op(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None, None


_options = "float dropout, int offset, bool triton"
_forward_op = register(
    f"latent_pair(Tensor encoded, Tensor eps, Tensor z, Tensor? rng, ScalarType dtype, {_options}) -> (Tensor, Tensor)",
    _forward,
    lambda encoded, eps, z, rng, dtype, *options: _outputs(encoded, dtype),
    _Function,
)
_backward_op = register(
    f"latent_pair_backward(Tensor dy, Tensor encoded, Tensor eps, Tensor? rng, {_options}) -> Tensor",
    _backward,
    lambda dy, encoded, *others: encoded.new_empty(encoded.shape),
)


def latent_pair(
    encoded: Tensor,
    eps: Tensor,
    z: Tensor,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """dropout([mu + exp(log_sigma) * eps; z], dropout) in `dtype`, by default encoded's; and z_hat, float32.

    `rng` (int64 [seed, step]) and `offset` are read only when dropout > 0. Raises ValueError for a wrong shape, device,
    dropout or rng, TypeError for a dtype without kernels, RuntimeError when `impl` cannot run here.
    """
    check_channels(encoded)
    n, channels, *plane = encoded.shape
    if channels % 2 or any(size != 1 for size in plane):
        raise ValueError(f"expected [N, 2L] or [N, 2L, 1, 1], got {list(encoded.shape)}")
    for name, tensor in (("eps", eps), ("z", z)):
        if tensor.shape not in ((n, channels // 2), (n, channels // 2, 1, 1)):
            raise ValueError(f"{name}: expected [{n}, {channels // 2}], got {list(tensor.shape)}")
        if tensor.device != encoded.device:
            raise ValueError(f"{name} is on {tensor.device}, encoded on {encoded.device}")
    check_rng(dropout, rng, offset, encoded)
    use = use_triton(impl, encoded)
    dtype = dtype or encoded.dtype
    if not all(kind.is_floating_point for kind in (dtype, eps.dtype, z.dtype)):
        raise TypeError(f"no kernel for eps {eps.dtype}, z {z.dtype} to {dtype}: all must be floating")
    if not use:
        return latent_pair_ref(encoded, eps, z, dtype, dropout, rng, offset)
    y, z_hat = _forward_op(encoded.flatten(1), eps.flatten(1), z.flatten(1), rng, dtype, dropout, offset, True)
    return y.view(*y.shape, *plane), z_hat
