"""y = dropout([leaky_relu(batch_norm(x)), leaky_relu(z + z_bias), c], p): the joint discriminator's input.

x: [N, Cx], D_x's last convolution; z: [N, Cz], D_z's last product; c: [N, Cc] or None, a condition's embedding, taken
as it is; all of one dtype, float32, bfloat16 or float16, and each perhaps with a plane of [1, 1] behind. weight, bias
and the running statistics: [Cx]; z_bias: [Cz] or None. y: [N, Cx + Cz + Cc], the parts side by side along channels,
then the next layer's input dropout over the whole of it, its elements numbered as kernels/random.py says.

Batch norm is that of bn_leaky_relu, and so is its backward. With g = dropout(dy): dc = g beside c,
dz = g * (1 if z + z_bias > 0 else slope) beside z, dz_bias = sum of dz over rows. Only x, z, mean and 1/std are kept.

One launch each way, 2 + 3 passes over y. Forward, some programs each own all rows of a few channels of x,
the others place tiles of z and c; backward, every program owns all rows of a few channels, so its sums need no other.
Across ranks (`reduce`, see bn_leaky_relu) one launch more each way, around the exchange. With more rows than a block
walks twice within its cache (bn_forward.is_local) bn_leaky_relu, bias_leaky_relu_dropout and torch.cat compose the op.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import bn_forward, bn_reference
from kernels.bias_leaky_relu_dropout import bias_leaky_relu_dropout, bias_leaky_relu_dropout_ref
from kernels.bn_leaky_relu import Reduce, bn_leaky_relu, bn_leaky_relu_ref, check_norm
from kernels.dispatch import below_autograd, register, uncompiled, use_triton
from kernels.joint_kernels import launch_backward, launch_forward
from kernels.random import check_rng, dropout_ref
from kernels.tiles import check_channels


def joint_input_ref(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    z_bias: Tensor | None = None,
    c: Tensor | None = None,
    slope: float = 0.01,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
    **norm: bool | float,
) -> Tensor:
    running = (running_mean, running_var, num_batches_tracked)
    parts = [bn_leaky_relu_ref(x, weight, bias, *running, slope=slope, **norm)]
    parts.append(bias_leaky_relu_dropout_ref(z, z_bias, slope))
    return dropout_ref(torch.cat(parts if c is None else [*parts, c], 1), dropout, rng, offset)


def _forward(
    x, weight, bias, z, z_bias, c, mean, var, batches, rng, training, momentum, eps, slope, dropout, offset, triton
):
    running = (mean, var, batches)
    if triton:
        norm = (weight, bias, running, None, training, momentum, eps)
        return launch_forward(x, z, c, z_bias, *norm, rng, slope, dropout, offset)
    part, saved = bn_reference.forward(x, weight, bias, running, None, training, momentum, eps, slope, 0.0, 0)
    return _join(part, z, z_bias, c, rng, slope, dropout, offset), saved


def _join(part: Tensor, z: Tensor, z_bias, c, rng, slope, dropout, offset) -> Tensor:
    parts = [part, bias_leaky_relu_dropout_ref(z, z_bias, slope)]
    return dropout_ref(torch.cat(parts if c is None else [*parts, c], 1), dropout, rng, offset)


def _split(dy: Tensor, x: Tensor, z: Tensor, z_bias, rng, slope, dropout, offset) -> tuple[Tensor, ...]:
    """In plain torch: the gradient at leaky_relu(batch_norm(x)), then dz, dz_bias and dc."""
    dy = dropout_ref(dy, dropout, rng, offset)
    dx, dz, dc = (part.contiguous() for part in dy.split([x.shape[1], z.shape[1], _rest(dy, x, z)], 1))
    dz = torch.where((z if z_bias is None else z + z_bias.to(z.dtype)) > 0, dz, dz * slope)
    return dx, dz, z.new_empty(0) if z_bias is None else dz.sum(0, dtype=z_bias.dtype), dc


def _rest(dy: Tensor, x: Tensor, z: Tensor) -> int:
    return dy.shape[1] - x.shape[1] - z.shape[1]


def _backward(dy, x, weight, bias, z, z_bias, saved, rng, training, slope, dropout, offset, triton):
    if triton:
        args = (dy.contiguous(), x, z, weight, bias, z_bias, saved, rng, training, slope, dropout, offset)
        return launch_backward(*args)[1:]
    part, *others = _split(dy, x, z, z_bias, rng, slope, dropout, offset)
    return *bn_reference.backward(part, x, weight, bias, saved, None, training, slope, 0.0, 0), *others


def _fake_forward(x, weight, bias, z, z_bias, c, *_):
    width = x.shape[1] + z.shape[1] + (0 if c is None else c.shape[1])
    return x.new_empty(x.shape[0], width), bn_forward.new_saved(x)


def _fake_backward(dy, x, weight, bias, z, z_bias, *_):
    affine = (x.new_empty(0) if weight is None else torch.empty_like(weight) for _ in "wb")
    dz_bias = x.new_empty(0) if z_bias is None else torch.empty_like(z_bias)
    return torch.empty_like(x), *affine, torch.empty_like(z), dz_bias, x.new_empty(x.shape[0], _rest(dy, x, z))


def _gradients(given: list[bool], *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias, z, z_bias and c, None for those not given."""
    return tuple(grad if there else None for there, grad in zip(given, grads, strict=True))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, z, z_bias, c, mean, var, batches, rng, training, momentum, eps, *options):
        with below_autograd():
            y, saved = _forward_op(
                x, weight, bias, z, z_bias, c, mean, var, batches, rng, training, momentum, eps, *options
            )
        ctx.save_for_backward(x, weight, bias, z, z_bias, saved, rng)
        ctx.options, ctx.given = (training, *options), [a is not None for a in (x, weight, bias, z, z_bias, c)]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return y, saved

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 17
        return *_gradients(ctx.given, *_backward_op(dy, *ctx.saved_tensors, *ctx.options)), *(None,) * 11


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, z, z_bias, c, rng, running, momentum, eps, options, reduce, triton):
        if triton:
            norm = (weight, bias, running, reduce(bn_forward.stats(x)), True, momentum, eps)
            y, saved = launch_forward(x, z, c, z_bias, *norm, rng, *options)
        else:
            saved = bn_reference.finish(reduce(bn_reference.stats(x)), x, running, momentum, eps)
            part = bn_reference.apply(x, weight, bias, saved, running, None, True, eps, options[0], 0.0, 0)
            y = _join(part, z, z_bias, c, rng, *options)
        if not x.is_cuda and saved[3, 0] <= 1:
            raise ValueError("Expected more than 1 value per channel over all ranks when training")
        ctx.save_for_backward(x, weight, bias, z, z_bias, saved, rng)
        ctx.given = [a is not None for a in (x, weight, bias, z, z_bias, c)]
        ctx.options, ctx.reduce, ctx.triton = options, reduce, triton
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, z, z_bias, saved, rng = ctx.saved_tensors
        norm, dy = (weight, bias, saved), dy.contiguous()
        if ctx.triton:
            args = (dy, x, z, weight, bias, z_bias, saved, rng, True, *ctx.options)
            sums, _, dweight, dbias, *others = launch_backward(*args, store_dx=False)
            dx = launch_backward(*args, sums=ctx.reduce(sums).sum(0))[1]
        else:
            part, *others = _split(dy, x, z, z_bias, rng, *ctx.options)
            plain = (None, ctx.options[0], 0.0, 0)
            sums, dweight, dbias = bn_reference.gradient_sums(part, x, *norm, *plain)
            dx = bn_reference.input_grad(part, x, *norm, ctx.reduce(sums).sum(0), *plain)
        return *_gradients(ctx.given, dx, dweight, dbias, *others), *(None,) * 7


_options = "Tensor? rng, bool training, float momentum, float eps, float slope, float dropout, int offset, bool triton"
_forward_op = register(
    "joint_input(Tensor x, Tensor? weight, Tensor? bias, Tensor z, Tensor? z_bias, Tensor? c,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
    f" {_options}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _Function,
)
_backward_op = register(
    "joint_input_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor z, Tensor? z_bias, Tensor saved,"
    f" {_options.replace(' float momentum, float eps,', '')}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


@uncompiled
def _synchronised(*args):
    return _Synchronised.apply(*args)


def _composed(x, weight, bias, z, z_bias, c, running, rng, norm: dict, slope, dropout, offset) -> Tensor:
    """The op from others, for more rows than one block walks."""
    parts = [bn_leaky_relu(x, weight, bias, *running, **norm, slope=slope, impl="triton")]
    parts.append(bias_leaky_relu_dropout(z, z_bias, slope, impl="triton"))
    y = torch.cat(parts if c is None else [*parts, c], 1)
    return bias_leaky_relu_dropout(y, None, 1.0, dropout, rng, offset, impl="triton") if dropout else y


def _check_parts(x: Tensor, z: Tensor, c: Tensor | None) -> None:
    """Raises unless the parts fit together."""
    for name, part in {"x": x, "z": z, "c": c}.items():
        if part is None:
            continue
        if part.dim() not in (2, 4) or part.shape[2:].numel() != 1 or len(part) != len(x):
            raise ValueError(f"expected [N, C] or [N, C, 1, 1], for x, z and c alike, got {name} {list(part.shape)}")
        if part.device != x.device:
            raise ValueError(f"{name} is on {part.device}, x on {x.device}")
        if part.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {part.dtype}")


def joint_input(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    z_bias: Tensor | None = None,
    c: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.01,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    offset: int = 0,
    reduce: Reduce | None = None,
    impl: str = "auto",
) -> Tensor:
    """dropout([leaky_relu(batch_norm(x)), leaky_relu(z + z_bias), c], dropout), [N, Cx + Cz + Cc] with x's dtype.

    y has a plane of [1, 1] behind when x has one. In training it normalises with the batch's statistics (of all ranks,
    given `reduce`), updates the running ones that are given and adds 1 to num_batches_tracked; in evaluation it uses
    the running ones. `rng` (int64 [seed, step]) and `offset` are read only when dropout > 0. Raises ValueError for a
    wrong shape, device, dropout or rng and for one row in training, TypeError for parts of different dtypes or a dtype
    without kernels, RuntimeError when `impl` cannot run here.
    """
    triton = use_triton(impl, x)
    _check_parts(x, z, c)
    check_norm(x, weight, bias, running_mean, running_var, training, reduce)
    check_channels(z, z_bias=z_bias)
    check_rng(dropout, rng, offset, x)
    plane, running = x.shape[2:], (running_mean, running_var, num_batches_tracked)
    x, z, c = (None if part is None else part.flatten(1).contiguous() for part in (x, z, c))
    inputs, options = (x, weight, bias, z, z_bias, c), (slope, dropout, offset)
    norm = {"training": training, "momentum": momentum, "eps": eps}
    if triton and not bn_forward.is_local(len(x), x.itemsize, x.device):
        y = _composed(*inputs, running, rng, norm | {"reduce": reduce}, *options)
    elif training and reduce is not None:
        y = _synchronised(*inputs, rng, running, momentum, eps, options, reduce, triton)
    elif triton:
        y = _forward_op(*inputs, *running, rng, *norm.values(), *options, True)[0]
    else:
        settings = {"slope": slope, "dropout": dropout, "rng": rng, "offset": offset}
        y = joint_input_ref(x, z, weight, bias, *running, z_bias=z_bias, c=c, **norm, **settings)
    return y.view(*y.shape, *plane)
