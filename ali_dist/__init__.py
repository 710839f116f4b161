"""Distributed training of Adversarially Learned Inference (ALI, arXiv:1606.00704).

`model = ali_dist.load(run)`, then `model.sample`, `.encode`, `.decode`, `.reconstruct` and `.interpolate`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ali_dist.model import load


def __getattr__(name: str) -> object:
    # On first use, so that commands which train nothing start without importing torch.
    if name == "load":
        from ali_dist.model import load

        return load
    raise AttributeError(f"module 'ali_dist' has no attribute {name!r}")


__all__ = ["load"]
