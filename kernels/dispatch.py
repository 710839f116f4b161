"""Which implementation of an op runs, and how its kernels are launched and registered.

`impl` is "auto" (Triton for CUDA tensors, plain torch elsewhere), "ref" (plain torch) or "triton". Kernels run on CPU
tensors only under Triton's interpreter, which TRITON_INTERPRET=1 turns on if it is set before triton is imported.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

IMPLS = ("auto", "ref", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTERPRET = bool(triton.knobs.runtime.interpret)  # jit functions are bound to the interpreter when they are defined
NAMESPACE = "ali_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def use_triton(impl: str, x: Tensor) -> bool:
    """True when Triton kernels are to run on `x`; what is asked for by name is taken or refused, never swapped.

    Raises ValueError for an unknown `impl`, TypeError for a dtype without kernels and RuntimeError for a device on
    which Triton cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "ref" or (impl == "auto" and not x.is_cuda):
        return False
    if not x.is_cuda and not INTERPRET and _recorder is None:
        raise RuntimeError(
            f"impl='triton' needs a CUDA tensor, got one on {x.device.type}"
            " (on a CPU, set TRITON_INTERPRET=1 before triton is imported)"
        )
    if x.dtype not in FLOATS and not (x.dtype == torch.float64 and INTERPRET):
        raise TypeError(f"no kernel for {x.dtype}: float32, bfloat16, float16 (float64 in the interpreter)")
    return True


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, as a recorder sees it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    hip_warps: int


_recorder: tuple[list[Launch], bool] | None = None


@contextmanager
def record_launches(run: bool = True) -> Iterator[list[Launch]]:
    """Collects every launch made inside; with `run=False` they are not made, so outputs stay unwritten."""
    global _recorder
    outer, launches = _recorder, []
    _recorder = (launches, run)
    try:
        yield launches
    finally:
        _recorder = outer


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    hip_warps: int | None = None,
    **constexprs: Any,
) -> None:
    """Runs `kernel` on the device of its first argument.

    `hip_warps` is the number of warps on AMD's GPUs, whose warps have 64 threads, where it must differ.
    Multiply-add fusion is off: forward and backward recompute the same value and must round it alike.
    """
    if _recorder is not None:
        _recorder[0].append(Launch(kernel, grid, args, constexprs, num_warps, hip_warps or num_warps))
        if not _recorder[1]:
            return
    if 0 in grid:
        return
    if torch.version.hip is not None:
        num_warps = hip_warps or num_warps
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constexprs)
    else:
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constexprs)


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    autograd: type[torch.autograd.Function] | None = None,
) -> Callable:
    """Registers an op for every device and returns it.

    `autograd` is a Function whose forward calls the returned op inside `below_autograd()`. It goes to the dispatcher's
    Autograd key directly, because torch.library.register_autograd refuses ops that update buffers in place. An op
    without one passes no gradients on.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    at_autograd = torch.library.fallthrough_kernel if autograd is None else lambda *args: autograd.apply(*args)
    _library.impl(name, at_autograd, "Autograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def uncompiled(function: Callable) -> Callable:
    """torch.compiler.disable, from the first call on: PyTorch imports its compiler for it, which takes a second."""
    disabled = None

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args)

    return call


def below_autograd() -> Any:
    """Context in which a registered op runs its implementation instead of its autograd Function."""
    return torch._C._AutoDispatchBelowAutograd()
