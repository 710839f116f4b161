"""What the kernel tests share."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.dispatch import NAMESPACE
from kernels.gate import FLOOR, deviation, differentiable, double, error, run

__all__ = ["FLOOR", "OpCalls", "assert_as_exact", "differentiable", "double", "error", "run"]


def assert_as_exact(op, inputs, options, floor=None):
    """The Triton kernels are within twice plain torch's error of float64, or within `floor`."""
    assert (found := deviation(op, inputs, options, floor)) is None, found


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
