"""OPS: one row per op, read by the tests and the benchmark. A new op is one file and one row here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from kernels.adam import adam, adam_ref
from kernels.bias_leaky_relu_dropout import bias_leaky_relu_dropout, bias_leaky_relu_dropout_ref
from kernels.bn_forward import is_local
from kernels.bn_leaky_relu import bn_leaky_relu, bn_leaky_relu_ref
from kernels.decoder_head import decoder_head, decoder_head_ref
from kernels.image_pair import image_pair, image_pair_ref
from kernels.joint_input import joint_input, joint_input_ref
from kernels.latent_pair import latent_pair, latent_pair_ref
from kernels.maxout import maxout, maxout_ref

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Shape = tuple[int, ...]
Inputs = dict[str, Tensor | None]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call moves and launches; parameters and other vectors of one number a channel are not counted."""

    forward_bytes: int
    backward_bytes: int
    forward_launches: int
    backward_launches: int


def passes(
    forward: float,
    backward: float,
    launches: tuple[int, int],
    more: tuple[float, float] = (0, 0),
    dropped: float = 0,
) -> Callable[..., Cost]:
    """The cost of an op that passes `forward` and `backward` times over a tensor of the shape and dtype given.

    `more` is what forward and backward move besides, in bytes for each of its elements whatever its dtype. `dropped`
    such tensors go through PyTorch's dropout where the options have it: a launch, with a byte mask, either way.
    """

    def cost(shape: Shape, dtype: torch.dtype, dropout: float = 0.0, **options: Any) -> Cost:
        mask = dropped * (2 * dtype.itemsize + 1) if dropout else 0
        each = (forward * dtype.itemsize + more[0] + mask, backward * dtype.itemsize + more[1] + mask)
        return Cost(*(round(count * prod(shape)) for count in each), *(count + bool(mask) for count in launches))

    return cost


@dataclass(frozen=True, slots=True)
class Op:
    """An op: `function(**inputs, **options, impl=...)` and `reference(**inputs, **options)` in plain torch.

    `inputs(shape, dtype, device)` draws the tensors by name; the floating ones with requires_grad get gradients.
    `options` are the settings to test, by name; `shapes` are layers of the networks, by name, for the benchmark.
    The first dimension of `shapes` is the batch of 128 images or twice that, unless `batched` is False.
    `cost(shape, dtype, **options)` is what a call moves and launches, `peers` the same for others' kernels: "eager" is
    `reference`, "compile" what torch.compile makes of it, others are functions in `rivals`, called as `reference` is.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., Inputs]
    options: dict[str, dict[str, Any]]
    shapes: dict[str, Shape]
    cost: Callable[..., Cost]
    peers: dict[str, Callable[..., Cost]]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    batched: bool = True
    rivals: dict[str, Callable[..., Any]] = field(default_factory=dict)


def features(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Normal features [N, C] or [N, C, H, W], channels last."""
    x = torch.randn(shape, device=device).to(dtype)
    return (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()


def rng(device: str = "cpu") -> Tensor:
    return torch.tensor([2**40 + 11, 2**33 + 5], device=device)


def _bias_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    bias = torch.randn(shape[1], device=device).requires_grad_()
    return {"x": features(shape, dtype, device), "bias": bias, "rng": rng(device)}


def _bn_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    weight, bias, mean = torch.randn(3, shape[1], device=device).to(torch.promote_types(dtype, torch.float32)).unbind()
    affine = {"weight": weight.clone().requires_grad_(), "bias": bias.clone().requires_grad_()}
    running = {"running_mean": mean.clone(), "running_var": mean.square() + 0.5}
    return {"x": features(shape, dtype, device), **affine, **running, "rng": rng(device)}


def _bn_cost(shape: Shape, dtype: torch.dtype, training: bool = True, **options: Any) -> Cost:
    if not training:
        return passes(2, 3, (1, 1))(shape, dtype)
    rows, device = prod(shape) // shape[1], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    forward = (2, 1) if is_local(rows, dtype.itemsize, device) else (3, 2)
    backward = (3, 1) if is_local(rows, 2 * dtype.itemsize, device) else (5, 2)
    return passes(forward[0], backward[0], (forward[1], backward[1]))(shape, dtype)


def _cudnn_bn(x, weight, bias, running_mean, running_var, training=True, slope=0.01, dropout=0.0, **options) -> Tensor:
    """Called by name, because in bfloat16 PyTorch does not choose cuDNN by itself."""
    settings = (training, options.get("momentum", 0.1), options.get("eps", 1e-5))
    z, *_ = torch.cudnn_batch_norm(x, weight, bias, running_mean, running_var, *settings)
    return F.dropout(F.leaky_relu(z, slope), dropout)


def _joint_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """`shape` is the output's: D_x's channels beside D_z's in the networks' own, with a condition in others."""
    n, channels, plane = shape[0], shape[1], [1] * (len(shape) - 2)
    cx = {2304: 256, 1536: 512, 1024: 512}.get(channels)
    widths = [cx, channels - cx] if cx else [channels // 4, channels // 2, channels - channels // 4 - channels // 2]
    parts = dict(zip("xzc", (features((n, width, *plane), dtype, device) for width in widths), strict=False))
    norm = _bn_inputs((1, widths[0]), dtype, device) | {"rng": rng(device)}
    return norm | parts | {"z_bias": torch.randn(widths[1], device=device).requires_grad_()}


def _head_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    shape = (*shape, 1, 1)[:4]
    norm = {name: value for name, value in _bn_inputs((1, shape[1]), dtype, device).items() if name not in ("x", "rng")}
    head_weight = torch.randn(3, shape[1], device=device).to(norm["weight"].dtype).requires_grad_()
    head_bias = torch.randn(3, *shape[2:], device=device).to(head_weight.dtype).requires_grad_()
    return {"h": features(shape, dtype, device), **norm, "head_weight": head_weight, "head_bias": head_bias}


def _head_cost(shape: Shape, dtype: torch.dtype, training: bool = True, **options: Any) -> Cost:
    """Passes over h, and over the image's three float32 numbers a pixel."""
    counts = (2, 1, 3, 5, 2, 4) if training else (1, 1, 2, 4, 2, 3)
    each, image = prod(shape) * dtype.itemsize, 12 * prod(shape) // shape[1]
    return Cost(counts[0] * each + counts[1] * image, counts[2] * each + counts[3] * image, *counts[4:])


def _adam_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    size, exact = prod(shape), torch.promote_types(dtype, torch.float32)
    param, exp_avg = torch.randn(2, size, dtype=exact, device=device).unbind()
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg.square() + 0.1}
    clock = {"step": torch.full((3,), 4.0, device=device), "lr": torch.tensor(1e-2, dtype=exact, device=device)}
    clock["skip"] = torch.zeros((), device=device)
    copy = torch.zeros(size, dtype=torch.bfloat16, device=device)
    return {"param": param, "grad": torch.randn(size, device=device).to(dtype), **moments, **clock, "copy": copy}


def _fused_adam(param, grad, exp_avg, exp_avg_sq, step, lr, copy, beta1, beta2, eps, skip) -> None:
    moments = ([exp_avg], [exp_avg_sq], [], [step[0]])
    options = {"beta1": beta1, "beta2": beta2, "lr": lr, "eps": eps, "weight_decay": 0.0}
    options["found_inf"] = skip
    torch_adam([param], [grad], *moments, fused=True, amsgrad=False, maximize=False, **options)
    copy.copy_(param)


def _image_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    x_tilde = features(shape, dtype, device)
    x = torch.empty_like(x_tilde, dtype=torch.uint8, requires_grad=False).random_(256)
    return {"x": x, "x_tilde": x_tilde, "rng": rng(device)}


def _latent_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    n, channels = shape[:2]
    plane = [1] * (len(shape) - 2)
    noise = torch.randn(2, n, channels // 2, dtype=torch.promote_types(dtype, torch.float32), device=device)
    encoded = torch.randn(n, channels, *plane, device=device).to(dtype).requires_grad_()
    return {"encoded": encoded, "eps": noise[0], "z": noise[1], "rng": rng(device)}


OPS = {
    op.name: op
    for op in (
        Op(
            name="bias_leaky_relu_dropout",
            function=bias_leaky_relu_dropout,
            reference=bias_leaky_relu_dropout_ref,
            inputs=_bias_inputs,
            options={"plain": {"slope": 0.02}, "dropout": {"dropout": 0.2, "offset": 3}},
            shapes={"D_x 1": (256, 64, 31, 31), "D_z 1": (256, 2048, 1, 1), "D joint 1": (256, 4096, 1, 1)},
            cost=passes(2, 3, (1, 1)),
            # eager: add, leaky ReLU; backward leaky ReLU, sum for the bias
            peers={"eager": passes(4, 4, (2, 2), dropped=1), "compile": passes(2, 4, (1, 2))},
        ),
        Op(
            name="bn_leaky_relu",
            function=bn_leaky_relu,
            reference=bn_leaky_relu_ref,
            inputs=_bn_inputs,
            options={
                "plain": {"slope": 0.02},
                "dropout": {"dropout": 0.2, "offset": 3},
                "eval": {"training": False, "eps": 1e-4},
            },
            shapes={
                "G_z 7": (128, 2048, 1, 1),
                "G_z 5": (128, 256, 4, 4),
                "G_x 6": (128, 64, 28, 28),
                "G_x 8": (128, 64, 64, 64),
                "D_x 2": (256, 64, 28, 28),
                "D_x 3": (256, 128, 13, 13),
                "D_x 6": (256, 256, 1, 1),
            },
            cost=_bn_cost,
            # eager: ATen's channels-last bfloat16 kernels, the counter of batches, leaky ReLU
            peers={
                "eager": passes(5, 8, (6, 4), dropped=1),
                "compile": passes(3, 5, (3, 3)),
                "cudnn": passes(5, 8, (2, 2), dropped=1),
            },
            rivals={"cudnn": _cudnn_bn},
        ),
        Op(
            name="adam",
            function=adam,
            reference=adam_ref,
            inputs=_adam_inputs,
            options={"plain": {"beta1": 0.5, "beta2": 0.999, "eps": 1e-8}},
            shapes={"G_z and G_x": (10_976_576,), "D": (32_985_856,)},
            batched=False,
            cost=passes(1, 0, (1, 0), (26, 0)),
            # eager: ten passes over buffers and nine launches for scalars; fused: the count, the update, the copy
            peers={
                "eager": passes(1, 0, (19, 0), (90, 0)),
                "compile": passes(1, 0, (2, 0), (26, 0)),
                "fused": passes(1, 0, (3, 0), (30, 0)),
            },
            rivals={"fused": _fused_adam},
            dtypes=(torch.float32,),
        ),
        Op(
            name="maxout",
            function=maxout,
            reference=maxout_ref,
            inputs=_bias_inputs,
            options={"plain": {}, "dropout": {"dropout": 0.5, "offset": 3}},
            shapes={"D_x 1": (256, 32, 28, 28), "D_x 2": (256, 64, 13, 13), "D joint 1": (256, 1024, 1, 1)},
            cost=passes(1.5, 2.5, (1, 1)),
            # eager: add, maximum; backward five for either piece, two to put each back, sum, bias
            peers={"eager": passes(3.5, 21, (2, 16), dropped=0.5), "compile": passes(1.5, 3.5, (1, 2))},
        ),
        Op(
            name="image_pair",
            function=image_pair,
            reference=image_pair_ref,
            inputs=_image_inputs,
            options={"plain": {}, "dropout": {"dropout": 0.2, "offset": 3}},
            shapes={"Tiny ImageNet": (128, 3, 64, 64), "SVHN, CIFAR-10": (128, 3, 32, 32)},
            cost=passes(3, 2, (1, 1), (1, 0)),
            # eager: to float, quotient, cast, cat; backward a view
            peers={"eager": passes(5, 0, (4, 0), (17, 0), dropped=2), "compile": passes(3, 2, (1, 1), (1, 0))},
        ),
        Op(
            name="latent_pair",
            function=latent_pair,
            reference=latent_pair_ref,
            inputs=_latent_inputs,
            options={"plain": {}, "dropout": {"dropout": 0.2, "offset": 3}},
            shapes={"Tiny ImageNet": (128, 512, 1, 1), "CIFAR-10": (128, 128, 1, 1)},
            cost=passes(2, 2, (1, 1), (6, 2)),
            # eager: cast, exp, product, sum, two casts, cat; backward cast, two products, cat, cast
            peers={"eager": passes(4, 1.5, (7, 5), (24, 26), dropped=1), "compile": passes(2, 2, (1, 1), (6, 2))},
        ),
        Op(
            name="joint_input",
            function=joint_input,
            reference=joint_input_ref,
            inputs=_joint_inputs,
            options={
                "plain": {"slope": 0.02},
                "dropout": {"dropout": 0.2, "offset": 3},
                "eval": {"training": False, "eps": 1e-4},
            },
            shapes={"Tiny ImageNet": (256, 2304, 1, 1), "CelebA": (256, 1536, 1, 1), "SVHN": (256, 1024, 1, 1)},
            cost=passes(2, 3, (1, 1)),
            # eager: batch norm and its counter, bias, two leaky ReLUs, concatenation; shares as in Tiny ImageNet
            peers={"eager": passes(6, 4.5, (9, 6), dropped=1), "compile": passes(2, 5, (2, 3))},
        ),
        Op(
            name="decoder_head",
            function=decoder_head,
            reference=decoder_head_ref,
            inputs=_head_inputs,
            options={
                "plain": {"slope": 0.02},
                "narrow": {"upcast": False},
                "eval": {"training": False, "eps": 1e-4},
            },
            shapes={"Tiny ImageNet": (128, 64, 64, 64), "SVHN": (128, 32, 32, 32)},
            cost=_head_cost,
            # eager: as bn_leaky_relu, a convolution, float32, sum, sigmoid; backward those and dW, then bn_leaky_relu's
            peers={"eager": passes(6, 10, (10, 9)), "compile": passes(4, 7, (5, 6))},
        ),
    )
}
