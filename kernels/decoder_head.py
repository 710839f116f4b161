"""y = sigmoid(conv1x1(leaky_relu(batch_norm(h)), W) + b): the decoder's last batch norm and its output layer.

h: [N, C, H, W], float32, bfloat16 or float16, at most 256 channels; weight, bias and the running statistics: [C];
W: [Cout, C] or [Cout, C, 1, 1], at most 4 outputs; b: [Cout, H, W], one number a channel and pixel. y: [N, Cout, H, W],
float32, or the dtype of h without `upcast`. Batch norm is that of bn_leaky_relu, with a = leaky_relu(batch_norm(h)):
    t = sum over c of W[:, c] * a[c] + b,  y = sigmoid(t)
Backward, dt = dy * y * (1 - y):  dW = sum of dt * a over rows,  db = sum of dt over images,  da = W^T dt, which
batch norm's backward takes to dh, dweight and dbias. Only h, y, the mean and 1/std are kept: a is never written, both
passes compute it in float32 from h. Without `upcast` y is cast at the end, and kept in float32 besides.

Passes over h: 2 + 3, in two launches forward (mean and 1/std; the rest) and four backward (dt and db; sums; their
totals; dh). Across ranks (`reduce`, see bn_leaky_relu) forward takes a third, to merge the statistics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import bn_forward, bn_reference, head_kernels
from kernels.bn_leaky_relu import Reduce, bn_leaky_relu, bn_leaky_relu_ref, check_norm
from kernels.dispatch import below_autograd, register, uncompiled, use_triton
from kernels.head_kernels import MAX_CHANNELS, MAX_OUTPUTS, new_y
from kernels.tiles import dense, dense_like


def decoder_head_ref(
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    upcast: bool = True,
    **norm: bool | float,
) -> Tensor:
    a = bn_leaky_relu_ref(h, weight, bias, running_mean, running_var, num_batches_tracked, **norm)
    y = _output(a, head_weight, head_bias)
    return y if upcast else y.to(h.dtype)


def _output(a: Tensor, head_weight: Tensor, head_bias: Tensor) -> Tensor:
    t = F.conv2d(a, head_weight.to(a.dtype).view(*head_weight.shape[:2], 1, 1))
    return torch.sigmoid(t.to(torch.promote_types(t.dtype, torch.float32)) + head_bias)


def _forward(h, weight, bias, head_weight, head_bias, mean, var, batches, training, momentum, eps, slope, triton):
    h, running = dense(h), (mean, var, batches)
    if not triton:
        norm = (weight, bias, running, None, training, momentum, eps, slope, 0.0, 0)
        a, saved = bn_reference.forward(h, *norm)
        return dense_like(_output(a.to(saved.dtype), head_weight, head_bias), h), saved
    if not training:
        saved = head_kernels.running_saved(h, mean, var, eps)
    else:
        saved = bn_forward.new_saved(h)
        bn_forward.sum_rows(h, saved, running, momentum, eps, finish=True)
        bn_forward.mark_updated(running)
    return head_kernels.head(h, weight, bias, head_weight, head_bias, saved, slope), saved


def _backward(dy, h, weight, bias, head_weight, head_bias, y, saved, training, slope, triton):
    h = dense(h)
    dy, args = dense_like(dy, h), (h, weight, bias, head_weight, saved, slope)
    if not triton:
        return _plain_backward(dy * y * (1 - y), *args, head_bias, training)
    dt, dhead_bias = head_kernels.logit_grad(dy, y, head_bias)
    dh = None if training else torch.empty_like(h)
    sums, *grads = head_kernels.gradient_sums(dt, *args, dh)
    return head_kernels.input_grad(dt, *args, sums) if training else dh, *grads, dhead_bias


def _plain_backward(dt, h, weight, bias, head_weight, saved, slope, head_bias, training):
    norm = (None, training, slope, 0.0, 0)
    a = bn_reference.apply(h, weight, bias, saved, (None,) * 3, None, True, 0.0, slope, 0.0, 0).to(dt.dtype)
    dh, *affine = bn_reference.backward(
        torch.einsum("nohw,oc->nchw", dt, head_weight.to(dt.dtype)), h, weight, bias, saved, *norm
    )
    dhead = torch.einsum("nohw,nchw->oc", dt, a).to(head_weight.dtype)
    return dense_like(dh, h), *affine, dhead, dt.sum(0).to(head_bias.dtype)


def _fake_backward(dy, h, weight, bias, head_weight, head_bias, *_):
    affine = (h.new_empty(0) if weight is None else torch.empty_like(weight) for _ in "wb")
    return torch.empty_like(dense(h)), *affine, torch.empty_like(head_weight), torch.empty_like(head_bias)


def _gradients(weight: Tensor | None, dh, dweight, dbias, *head) -> tuple[Tensor | None, ...]:
    return dh, *((None, None) if weight is None else (dweight, dbias)), *head


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, head_weight, head_bias, mean, var, batches, *options):
        with below_autograd():
            y, saved = _forward_op(h, weight, bias, head_weight, head_bias, mean, var, batches, *options)
        training, _, _, slope, triton = options
        ctx.save_for_backward(h, weight, bias, head_weight, head_bias, y, saved)
        ctx.options = (training, slope, triton)
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return y, saved

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 13
        grads = _backward_op(dy, *ctx.saved_tensors, *ctx.options)
        return *_gradients(ctx.saved_tensors[1], *grads), *(None,) * 8


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, head_weight, head_bias, running, momentum, eps, slope, reduce):
        h = dense(h)
        saved = bn_forward.finish(reduce(bn_forward.stats(h)), h, running, momentum, eps)
        if not h.is_cuda and saved[3, 0] <= 1:
            raise ValueError("Expected more than 1 value per channel over all ranks when training")
        y = head_kernels.head(h, weight, bias, head_weight, head_bias, saved, slope)
        ctx.save_for_backward(h, weight, bias, head_weight, head_bias, y, saved)
        ctx.slope, ctx.reduce = slope, reduce
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, weight, bias, head_weight, head_bias, y, saved = ctx.saved_tensors
        dt, dhead_bias = head_kernels.logit_grad(dense_like(dy, h), y, head_bias)
        args = (dt, h, weight, bias, head_weight, saved, ctx.slope)
        sums, *grads = head_kernels.gradient_sums(*args)
        dh = head_kernels.input_grad(*args, ctx.reduce(sums).sum(0))
        return *_gradients(weight, dh, *grads, dhead_bias), *(None,) * 5


_forward_op = register(
    "decoder_head(Tensor h, Tensor? weight, Tensor? bias, Tensor head_weight, Tensor head_bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training,"
    " float momentum, float eps, float slope, bool triton) -> (Tensor, Tensor)",
    _forward,
    lambda h, weight, bias, head_weight, *_: (new_y(dense(h), len(head_weight)), bn_forward.new_saved(h)),
    _Function,
)
_backward_op = register(
    "decoder_head_backward(Tensor dy, Tensor h, Tensor? weight, Tensor? bias, Tensor head_weight, Tensor head_bias,"
    " Tensor y, Tensor saved, bool training, float slope, bool triton) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


@uncompiled
def _synchronised(*args):
    return _Synchronised.apply(*args)


def _check(h: Tensor, head_weight: Tensor, head_bias: Tensor, triton: bool) -> None:
    if h.dim() != 4:
        raise ValueError(f"expected [N, C, H, W], got {list(h.shape)}")
    outputs, channels = head_weight.shape[0], h.shape[1]
    if head_weight.shape[1:2] != h.shape[1:2] or head_weight[0].numel() != channels:
        raise ValueError(f"head_weight must have shape [Cout, {channels}], got {list(head_weight.shape)}")
    if head_bias.shape != (outputs, *h.shape[2:]):
        raise ValueError(f"head_bias must have shape {[outputs, *h.shape[2:]]}, got {list(head_bias.shape)}")
    if head_weight.device != h.device or head_bias.device != h.device:
        raise ValueError(f"head_weight is on {head_weight.device}, head_bias on {head_bias.device}, h on {h.device}")
    if triton and (channels > MAX_CHANNELS or outputs > MAX_OUTPUTS):
        limits = f"at most {MAX_CHANNELS} channels and {MAX_OUTPUTS} outputs"
        raise ValueError(f"the kernels take {limits}, got {channels} and {outputs}")


def decoder_head(
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.01,
    upcast: bool = True,
    reduce: Reduce | None = None,
    impl: str = "auto",
) -> Tensor:
    """sigmoid(conv1x1(leaky_relu(batch_norm(h)), head_weight) + head_bias), [N, Cout, H, W] in the layout of h.

    y is float32 (float64 from float64), without `upcast` of the dtype of h. In training it normalises with the batch's
    statistics (of all ranks, given `reduce`), updates the running ones that are given and adds 1 to
    num_batches_tracked; in evaluation it uses the running ones. Raises ValueError for a wrong shape or device, for more
    channels or outputs than the kernels take and for one row in training, TypeError for a dtype without kernels,
    RuntimeError when `impl` cannot run here.
    """
    triton = use_triton(impl, h)
    _check(h, head_weight, head_bias, triton)
    check_norm(h, weight, bias, running_mean, running_var, training, reduce)
    running = (running_mean, running_var, num_batches_tracked)
    norm = {"training": training, "momentum": momentum, "eps": eps, "slope": slope}
    inputs = (h, weight, bias, head_weight.flatten(1).contiguous(), head_bias.contiguous())
    if not triton:
        y = _output(bn_leaky_relu(h, weight, bias, *running, **norm, reduce=reduce, impl="ref"), head_weight, head_bias)
    elif training and reduce is not None:
        y = _synchronised(*inputs, running, momentum, eps, slope, reduce)
    else:
        y = _forward_op(*inputs, *running, *norm.values(), True)[0]
    return y if upcast else y.to(h.dtype)
