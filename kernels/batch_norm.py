"""`BatchNormLeakyReLU`: nn.BatchNorm2d, its activation and the next layer's input dropout as one module."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from kernels.bn_leaky_relu import Reduce, bn_leaky_relu


class BatchNormLeakyReLU(_NormBase):
    """dropout(leaky_relu(batch_norm(x), slope), dropout) for x [N, C] or [N, C, H, W].

    Constructor and state dict are those of nn.BatchNorm2d, so either loads the other's checkpoints; `slope`, `dropout`
    and the number `offset` that tells its dropout apart from other layers' are settings, not state. `reduce` (see
    bn_leaky_relu) takes the batch statistics over all ranks. Dropout acts in training only and then needs `rng`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        slope: float = 0.01,
        dropout: float = 0.0,
        offset: int = 0,
        reduce: Reduce | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.slope, self.dropout, self.offset = slope, dropout, offset
        self.reduce, self.impl = reduce, impl

    def arguments(self, rng: Tensor | None = None) -> dict[str, Any]:
        """All that `bn_leaky_relu`, and the ops that do its work in passing, take besides x, for one call."""
        momentum = self.momentum
        if momentum is None:  # the running statistics are the plain average over batches
            momentum = 1.0 / (float(self.num_batches_tracked) + 1) if self.num_batches_tracked is not None else 0.0
        return {
            "weight": self.weight,
            "bias": self.bias,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "num_batches_tracked": self.num_batches_tracked,
            # Without running statistics, as in nn.BatchNorm2d, evaluation too normalises with the batch's own.
            "training": self.training or self.running_mean is None,
            "momentum": momentum,
            "eps": self.eps,
            "slope": self.slope,
            "dropout": self.dropout if self.training else 0.0,
            "rng": rng,
            "offset": self.offset,
            "reduce": self.reduce if self.training else None,
            "impl": self.impl,
        }

    def forward(self, x: Tensor, rng: Tensor | None = None) -> Tensor:
        return bn_leaky_relu(x, **self.arguments(rng))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slope={self.slope}, dropout={self.dropout}"
