"""What the kernel tests share: float64 truth, and the rule that an error may be twice that of plain torch."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.dispatch import NAMESPACE

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3}


def double(value):
    """`value` in float64, with its requires_grad; anything but a floating tensor unchanged."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def differentiable(outputs):
    """Those of an op's outputs that take a gradient: none where it updates its inputs instead."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [y for y in outputs if y is not None and y.requires_grad]


def run(function, inputs, seeds=None, **options):
    """Outputs and gradients by name, with random upstream gradients drawn from `seeds` (a list, filled when empty).

    An op without gradients updates its inputs: its outputs are copies of them, updated.
    """
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    if not names:
        updated = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        function(**{**inputs, **updated}, **options)
        return updated
    outputs = function(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeded = differentiable(outputs)
    if not seeds:
        seeds.extend(torch.randn(y.shape, device=y.device).to(y.dtype) for y in seeded)
    upstream = [seed.to(y.dtype) for seed, y in zip(seeds, seeded, strict=True)]
    grads = torch.autograd.grad(seeded, [inputs[name] for name in names], upstream, allow_unused=True)
    named = {f"out{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(names, grads, strict=True) if grad is not None}


def error(actual, exact):
    exact = exact.double()
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_as_exact(op, inputs, options, floor=None):
    """The Triton kernels are within twice plain torch's error of float64, or within `floor`."""
    seeds = []
    actual = run(op.function, inputs, seeds, **options, impl="triton")
    plain = run(op.reference, inputs, seeds, **options)
    exact = run(op.reference, {name: double(value) for name, value in inputs.items()}, seeds, **options)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert value.shape == exact[name].shape and value.dtype == plain[name].dtype, name
        limit = max(2 * error(plain[name], exact[name]), FLOOR[value.dtype] if floor is None else floor)
        assert error(value, exact[name]) <= limit, (name, error(value, exact[name]), limit)


class OpCalls(TorchDispatchMode):
    """Collects the calls of this package's registered ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            differentiable = not func._schema.name.endswith("_backward")
            copies = [
                a.detach().clone().requires_grad_(a.requires_grad and differentiable) if torch.is_tensor(a) else a
                for a in args
            ]
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))
