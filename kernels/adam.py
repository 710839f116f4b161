"""Adam over flat buffers in one launch; `kernels.flat_adam` is the optimizer around it.

With t the number of updates including this one, g the gradient, m = exp_avg and v = exp_avg_sq:
    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
as torch.optim.Adam has it (Kingma and Ba, arXiv:1412.6980). p, m, v: float32 [K]; copy: p rounded to a smaller type.
t and lr are read from device tensors, t counted up in the same launch: a replayed CUDA graph makes the next update.
Where `skip` is given and not 0 nothing changes, so that a graph, which cannot raise, keeps out what is not finite.
Reads p, g, m, v, writes p, m, v and the copy: 30 bytes an element with float32 gradients and a bfloat16 copy.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import INTERPRET, launch, register, use_triton
from kernels.random import round_to
from kernels.tiles import block_counters, compute_dtype, is_last_block

BLOCK = 16384 if INTERPRET else 1024


def adam_ref(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    copy: Tensor | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    skip: Tensor | None = None,
) -> None:
    if skip is not None:
        written = [tensor for tensor in (param, exp_avg, exp_avg_sq, step, copy) if tensor is not None]
        before = [tensor.clone() for tensor in written]
        adam_ref(param, grad, exp_avg, exp_avg_sq, step, lr, copy, beta1, beta2, eps)
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(torch.where(skip != 0, old, tensor))
        return
    step.add_(1)
    t = step[0].double()
    grad = grad.to(param.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq * (1 / (1 - beta2**t))).sqrt_().add_(eps)
    param.sub_((exp_avg / denominator).mul_(lr.view(()) / (1 - beta1**t)))
    if copy is not None:
        copy.copy_(param)


@triton.jit
def _kernel(
    p_param,
    p_grad,
    p_exp_avg,
    p_exp_avg_sq,
    p_step,
    p_lr,
    p_copy,
    p_skip,
    p_counter,
    K,
    num_steps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    added = 1.0
    if HAS_SKIP:
        moves = tl.load(p_skip) == 0
        K, added = tl.where(moves, K, 0), tl.where(moves, 1.0, 0.0)
    mask = o < K
    # In float64, because 1 - beta2^t would lose four of float32's seven digits in the first updates.
    t = tl.load(p_step).to(tl.float64) + 1
    rate = (tl.load(p_lr).to(tl.float64) / (1 - tl.exp(t * LOG_BETA1))).to(COMPUTE)
    correction = (1 / (1 - tl.exp(t * LOG_BETA2))).to(COMPUTE)
    b_g = tl.load(p_grad + o, mask=mask, other=0.0).to(COMPUTE)
    b_m = tl.load(p_exp_avg + o, mask=mask, other=0.0)
    b_v = tl.load(p_exp_avg_sq + o, mask=mask, other=0.0)
    b_p = tl.load(p_param + o, mask=mask, other=0.0)
    if BETA1 > 0.5:  # as lerp does: from the nearer end, so that beta1 = 0 gives g itself
        b_m += (b_g - b_m) * (1 - BETA1)
    else:
        b_m = b_g - (b_g - b_m) * BETA1
    b_v = b_v * BETA2 + b_g * b_g * (1 - BETA2)
    b_p -= rate * (b_m / (tl.sqrt(b_v * correction) + EPS))
    tl.store(p_exp_avg + o, b_m, mask=mask)
    tl.store(p_exp_avg_sq + o, b_v, mask=mask)
    tl.store(p_param + o, b_p, mask=mask)
    if HAS_COPY:
        tl.store(p_copy + o, round_to(b_p, p_copy.dtype.element_ty), mask=mask)
    # The last block, since by then every block has read the count.
    if is_last_block(p_counter, tl.num_programs(0)):
        o_s = tl.arange(0, BLOCK_S)
        b_t = tl.zeros([BLOCK_S], tl.float64) + (t - 1 + added)
        tl.store(p_step + o_s, b_t.to(p_step.dtype.element_ty), mask=o_s < num_steps)


def _adam(param, grad, exp_avg, exp_avg_sq, step, lr, copy, skip, beta1, beta2, eps, triton_):
    if not triton_:
        adam_ref(param, grad, exp_avg, exp_avg_sq, step, lr, copy, beta1, beta2, eps, skip)
        return
    size, num_steps = param.numel(), step.numel()
    args = (param, grad, exp_avg, exp_avg_sq, step, lr, copy, skip, block_counters(param, 1), size, num_steps)
    launch(
        _kernel,
        (max(1, triton.cdiv(size, BLOCK)),),
        *args,
        BETA1=beta1,
        BETA2=beta2,
        LOG_BETA1=_log(beta1),
        LOG_BETA2=_log(beta2),
        EPS=eps,
        HAS_COPY=copy is not None,
        HAS_SKIP=skip is not None,
        COMPUTE=compute_dtype(param),
        BLOCK=BLOCK,
        BLOCK_S=triton.next_power_of_2(num_steps),
    )
    written = [tensor for tensor in (param, exp_avg, exp_avg_sq, step, copy) if tensor is not None]
    torch.autograd.graph.increment_version(written)


def _log(beta: float) -> float:
    return math.log(max(beta, 1e-300))  # t times log(0) has no number; 1e-300 to any power is lost beside 1


_op = register(
    "adam(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor lr,"
    " Tensor(e!)? copy, Tensor? skip, float beta1, float beta2, float eps, bool triton) -> ()",
    _adam,
    lambda *args: None,
)


def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    copy: Tensor | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    impl: str = "auto",
    skip: Tensor | None = None,
) -> None:
    """Updates `param`, `exp_avg`, `exp_avg_sq`, `step` and `copy` (any of the float types) in place, unless `skip`.

    The first three and `grad` (any of the float types) are contiguous and of one shape; `step` [S] holds the number of
    updates so far, S times; `lr` and `skip` have one element. Raises ValueError for a wrong shape, layout, device, beta
    or eps, TypeError for moments of another dtype than `param` or a dtype without kernels, RuntimeError when `impl`
    cannot run.
    """
    buffers = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "copy": copy}
    for name, tensor in buffers.items():
        if tensor is not None and (tensor.shape != exp_avg.shape or not tensor.is_contiguous()):
            raise ValueError(f"{name}: expected {list(exp_avg.shape)}, contiguous, got {list(tensor.shape)}")
    if step.dim() != 1 or step.numel() == 0 or lr.numel() != 1 or (skip is not None and skip.numel() != 1):
        raise ValueError(f"expected step [S], lr [1] and skip [1], got {list(step.shape)} and {list(lr.shape)}")
    if any(tensor.device != param.device for tensor in (*buffers.values(), step, lr, skip) if tensor is not None):
        raise ValueError(f"every tensor must be on the device of param, {param.device}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0):
        raise ValueError(f"expected 0 <= beta < 1 and eps >= 0, got {beta1}, {beta2} and {eps}")
    use = use_triton(impl, param)
    if not param.dtype == exp_avg.dtype == exp_avg_sq.dtype or param.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"param and moments must be float32, got {param.dtype}, {exp_avg.dtype}, {exp_avg_sq.dtype}")
    if not use:
        adam_ref(param, grad, exp_avg, exp_avg_sq, step, lr, copy, beta1, beta2, eps, skip)
    else:
        _op(param, grad, exp_avg, exp_avg_sq, step, lr, copy, skip, beta1, beta2, eps, True)
