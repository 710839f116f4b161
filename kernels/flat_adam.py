"""torch.optim.Adam with each group's parameters in one flat buffer and one launch of `kernels.adam` an update.

Parameters, gradients and moments are views of their group's buffers, in the parameters' own shapes and strides, so
modules and state dicts see what they would with torch.optim.Adam, whose checkpoints are read and written.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.adam import adam

ALIGN = 64  # elements: parameters start on cache lines, so vector loads from them stay possible
UNSUPPORTED = ("weight_decay", "amsgrad", "maximize", "differentiable")


class _Buffers:
    """The flat buffers of one parameter group; gaps between parameters hold zeros and stay zero."""

    def __init__(self, params: list[Tensor], copy_dtype: torch.dtype | None) -> None:
        first = params[0]
        for p in params:
            if p.dtype not in (torch.float32, torch.float64) or (p.dtype, p.device) != (first.dtype, first.device):
                raise TypeError(f"parameters of a group must all be float32 on one device, got {p.dtype} on {p.device}")
        self.params = params
        ends = torch.tensor([-(-p.numel() // ALIGN) * ALIGN for p in params]).cumsum(0).tolist()
        self.starts = [0, *ends[:-1]]
        self.param, self.grad, self.exp_avg, self.exp_avg_sq = first.new_zeros(4, ends[-1]).unbind()
        self.copy = None if copy_dtype is None else self.param.to(copy_dtype)
        self.step = torch.zeros(len(params), device=first.device)
        self.lr, self.lr_written = torch.zeros((), dtype=torch.float64, device=first.device), 0.0
        self.views, self.grads = self._views(self.param), self._views(self.grad)
        self.copies = [] if self.copy is None else [copy.requires_grad_() for copy in self._views(self.copy)]
        self.moments = [
            {"step": step, "exp_avg": m, "exp_avg_sq": v}
            for step, m, v in zip(
                self.step.unbind(), self._views(self.exp_avg), self._views(self.exp_avg_sq), strict=True
            )
        ]
        for p, view in zip(params, self.views, strict=True):
            view.copy_(p)
            p.data = view
        self.refresh_copy()

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """One tensor a parameter, with its shape and its order of dimensions in memory."""
        strides = [torch.empty_like(p, device="meta").stride() for p in self.params]
        return [
            buffer[start : start + p.numel()].as_strided(p.shape, stride)
            for p, start, stride in zip(self.params, self.starts, strides, strict=True)
        ]

    def refresh_copy(self) -> None:
        if self.copy is not None:
            with torch.no_grad():
                self.copy.copy_(self.param)

    def rate(self, lr: float | Tensor) -> Tensor:
        """`lr` on the device: as given when a tensor, else written only when it has changed."""
        if isinstance(lr, Tensor):
            return lr
        if lr != self.lr_written:
            self.lr.fill_(lr)
            self.lr_written = lr
        return self.lr

    def gather(self) -> None:
        """Copies into the flat gradient what autograd has put elsewhere."""
        for i, (p, view) in enumerate(zip(self.params, self.views, strict=True)):
            if p.data_ptr() != view.data_ptr():
                raise RuntimeError(f"parameter {i} has left its flat buffer: make the optimizer after .to() or .data =")
        pairs = [
            (own, given)
            for own, given in zip(self.grads, self.gradients(), strict=True)
            if own.data_ptr() != given.data_ptr() or own.dtype != given.dtype
        ]
        if pairs:
            torch._foreach_copy_([g for g, _ in pairs], [given for _, given in pairs])

    def gradients(self) -> list[Tensor]:
        """What autograd has given each parameter, or else its copy."""
        copies = self.copies or [None] * len(self.params)
        given = [
            p.grad if p.grad is not None or copy is None else copy.grad
            for p, copy in zip(self.params, copies, strict=True)
        ]
        for i, (p, gradient) in enumerate(zip(self.params, given, strict=True)):
            if gradient is None:
                raise RuntimeError(f"parameter {i}, {list(p.shape)}, has no gradient: a group is updated as a whole")
        return given

    def adopt(self, state: dict[Tensor, Any]) -> None:
        """Copies in the moments that were put into `state` from outside, zeros where there are none."""
        adopted, fresh = False, not any(state[p] for p in self.params)
        for p, own in zip(self.params, self.moments, strict=True):
            given = state[p]
            if all(given.get(name) is tensor for name, tensor in own.items()):
                continue
            adopted = True
            for name, tensor in own.items():
                tensor.copy_(given[name]) if name in given else tensor.zero_()
            state[p] = dict(own)
        if adopted and not fresh and (self.step != self.step[0]).any():
            raise ValueError(f"parameters of a group must have had equally many updates, got {self.step.tolist()}")


class FlatAdam(torch.optim.Adam):
    """Adam without weight decay or its other variants, each group updated in one launch.

    Every parameter needs a gradient at every step. After `zero_grad(set_to_none=False)` autograd accumulates into the
    flat gradient, and the step has nothing to gather. With `copy_dtype`, `copies` maps each parameter to itself rounded
    to that type as of the last step (call `refresh_copies` after changing parameters by other means); a network may
    compute with a copy, whose gradient then counts as the parameter's. As a CUDA graph reads no Python, `write_rates`
    brings a changed `lr` to the device before its replay, and `found_inf`, set as GradScaler sets it, a float32 tensor
    on the device, lets updates happen only while it is 0. `impl` as in `kernels.adam`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        copy_dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        self.impl, self.copy_dtype = impl, copy_dtype
        self._buffers: list[_Buffers] = []
        self.copies: dict[Tensor, Tensor] = {}
        self.gathered = False
        super().__init__(params, lr, betas, eps, fused=True)
        self._step_supports_amp_scaling = False  # torch's fused Adam unscales gradients itself, this one does not

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _refuse_variants(group)
        buffers = _Buffers(group["params"], self.copy_dtype)
        buffers.adopt(self.state)
        self._buffers.append(buffers)
        self.copies.update(zip(buffers.params, buffers.copies, strict=False))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every group; RuntimeError when a parameter has no gradient or has been moved."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, buffers in zip(self.param_groups, self._buffers, strict=True):
            buffers.adopt(self.state)
            if not self.gathered:
                buffers.gather()
            adam(
                buffers.param,
                buffers.grad,
                buffers.exp_avg,
                buffers.exp_avg_sq,
                buffers.step,
                buffers.rate(group["lr"]),
                buffers.copy,
                *group["betas"],
                group["eps"],
                impl=self.impl,
                skip=getattr(self, "found_inf", None),
            )
            torch.autograd.graph.increment_version(buffers.params)
        self.gathered = False
        return loss

    @torch.no_grad()
    def gather(self) -> list[Tensor]:
        """Each group's gradients as one tensor, zeros in its gaps, which the next step takes as they are then."""
        for buffers in self._buffers:
            buffers.gather()
        self.gathered = True
        return [buffers.grad for buffers in self._buffers]

    def slice_of(self, parameters: Sequence[Tensor]) -> slice:
        """Where in its group's flat tensors a run of consecutive parameters lies, their gaps included."""
        for buffers in self._buffers:
            places = {id(p): i for i, p in enumerate(buffers.params)}
            if id(parameters[0]) in places:
                first, last = (places[id(p)] for p in (parameters[0], parameters[-1]))
                return slice(buffers.starts[first], (*buffers.starts, buffers.param.numel())[last + 1])
        raise ValueError("these are not this optimizer's parameters")

    @torch.no_grad()
    def twins(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Moves `tensors`, one like each parameter, to flat buffers like theirs; each group's, and its parameters'."""
        rest, pairs = list(tensors), []
        for buffers in self._buffers:
            flat = torch.zeros_like(buffers.param)
            mine, rest = rest[: len(buffers.params)], rest[len(buffers.params) :]
            for tensor, view in zip(mine, buffers._views(flat), strict=True):
                view.copy_(tensor)
                tensor.data = view
            pairs.append((flat, buffers.param))
        return pairs

    def write_rates(self) -> None:
        for group, buffers in zip(self.param_groups, self._buffers, strict=True):
            buffers.rate(group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.gathered = False
        for copy in self.copies.values():
            copy.grad = None
        if set_to_none:
            super().zero_grad(set_to_none)
            return
        for buffers in self._buffers:
            buffers.grad.zero_()
            for p, grad in zip(buffers.params, buffers.grads, strict=True):
                p.grad = grad

    def refresh_copies(self) -> None:
        for buffers in self._buffers:
            buffers.refresh_copy()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Reads the state of a FlatAdam or torch.optim.Adam; ValueError for a variant of Adam that is not this one."""
        for group in state_dict["param_groups"]:
            _refuse_variants(group)
        super().load_state_dict(state_dict)
        for buffers in self._buffers:
            buffers.adopt(self.state)


def _refuse_variants(group: dict[str, Any]) -> None:
    asked = [name for name in UNSUPPORTED if group.get(name)]
    if asked:
        raise ValueError(f"FlatAdam has no {', '.join(asked)}")
