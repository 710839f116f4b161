"""Adam on a CPU: torch.optim.Adam's fused update without its class, whose first use imports PyTorch's compiler."""

from typing import Any

import torch
from torch import Tensor, nn


class Adam:
    """Kingma and Ba (arXiv:1412.6980), algorithm 1, to the bit as torch.optim.Adam(..., fused=True) does it.

    `state` and `param_groups` are as there: parameter -> {"step" float32 [], "exp_avg", "exp_avg_sq" as the parameter},
    made at a parameter's first update. Parameters without a gradient stay as they are.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> None:
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, "lr": lr, "betas": betas, "eps": eps}]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not given:
                continue
            states = [self.state.setdefault(parameter, {}) or self._begin(parameter) for parameter in given]
            gradients = [parameter.grad for parameter in given]
            steps, means, squares = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            rates = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
            fixed = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
            torch._fused_adam_(given, gradients, means, squares, [], steps, **rates, **fixed)

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        self.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
        return self.state[parameter]
