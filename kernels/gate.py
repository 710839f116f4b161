"""How right an op is: outputs and gradients against float64, where an error may be twice that of plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.ops import Inputs, Op

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3}
SHAPES = ((6, 16), (3, 8, 5, 5))


def double(value: Any) -> Any:
    """`value` in float64, with its requires_grad; anything but a floating tensor unchanged."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def differentiable(outputs: Any) -> list[Tensor]:
    """Those of an op's outputs that take a gradient: none where it updates its inputs instead."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [y for y in outputs if y is not None and y.requires_grad]


def run(
    function: Callable[..., Any], inputs: Inputs, seeds: list[Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    """Outputs and gradients by name, with random upstream gradients drawn from `seeds` (a list, filled when empty).

    An op without gradients updates its inputs: its outputs are copies of them, updated.
    """
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
    if not names:
        updated = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        function(**{**inputs, **updated}, **options)
        return updated
    outputs = function(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeded = differentiable(outputs)
    if not seeds:
        seeds = [] if seeds is None else seeds
        seeds.extend(torch.randn(y.shape, device=y.device).to(y.dtype) for y in seeded)
    upstream = [seed.to(y.dtype) for seed, y in zip(seeds, seeded, strict=True)]
    grads = torch.autograd.grad(seeded, [inputs[name] for name in names], upstream, allow_unused=True)
    named = {f"out{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(names, grads, strict=True) if grad is not None}


def error(actual: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def deviation(op: Op, inputs: Inputs, options: dict[str, Any], floor: float | None = None) -> str | None:
    """What the op's Triton kernels get wrong, if anything: further from float64 than twice plain torch and `floor`."""
    seeds: list[Tensor] = []
    actual = run(op.function, inputs, seeds, **options, impl="triton")
    plain = run(op.reference, inputs, seeds, **options)
    exact = run(op.reference, {name: double(value) for name, value in inputs.items()}, seeds, **options)
    if actual.keys() != exact.keys():
        return f"it gives {', '.join(actual)}, not {', '.join(exact)}"
    for name, value in actual.items():
        if value.shape != exact[name].shape or value.dtype != plain[name].dtype:
            return f"{name} is {value.dtype} {list(value.shape)}, not {plain[name].dtype} {list(exact[name].shape)}"
        limit = max(2 * error(plain[name], exact[name]), FLOOR[value.dtype] if floor is None else floor)
        found = error(value, exact[name])
        if not found <= limit:  # NaN is no smaller
            return f"{name} is off by {found:.1e}, allowed {limit:.1e}"
    return None


def gate(op: Op, device: str) -> str | None:
    """Why `op` may not be timed on `device`, or None: a quick check of every option and dtype on small shapes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for option, options in op.options.items():
            for dtype, shape in ((dtype, shape) for dtype in op.dtypes for shape in SHAPES):
                try:
                    found = deviation(op, op.inputs(shape, dtype, device), options)
                except Exception as failure:  # whatever it is, the op is not to be timed
                    found = f"{type(failure).__name__}: {failure}"
                if found:
                    return f"{option}, {dtype}, {list(shape)}: {found}"
    return None
