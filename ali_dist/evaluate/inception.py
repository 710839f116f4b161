"""Inception v3 as it was published on 2015-12-05: the network of the Fréchet Inception distance (arXiv:1706.08500).

Weights have the names of the file pt_inception-2015-12-05, a conversion of TensorFlow's. Three things tell the network
from later ones: its resizing, average pools that leave the padding out, and a last block that pools by maximum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, FEATURES = 299, 2048

# Maps and kernel of each convolution of a branch; a row of two kernels ends the branch in two halves side by side.
Branches = dict[str, tuple[tuple, ...]]
TALL, WIDE = (7, 1), (1, 7)
FORK = (384, (1, 3), (3, 1))


def _a(pool: int) -> Branches:
    return {
        "branch1x1": ((64, 1),),
        "branch5x5": ((48, 1), (64, 5)),
        "branch3x3dbl": ((64, 1), (96, 3), (96, 3)),
        "branch_pool": ((pool, 1),),
    }


def _c(maps: int) -> Branches:
    return {
        "branch1x1": ((192, 1),),
        "branch7x7": ((maps, 1), (maps, WIDE), (192, TALL)),
        "branch7x7dbl": ((maps, 1), (maps, TALL), (maps, WIDE), (maps, TALL), (192, WIDE)),
        "branch_pool": ((192, 1),),
    }


B: Branches = {"branch3x3": ((384, 3),), "branch3x3dbl": ((64, 1), (96, 3), (96, 3)), "branch_pool": ()}
D: Branches = {
    "branch3x3": ((192, 1), (320, 3)),
    "branch7x7x3": ((192, 1), (192, WIDE), (192, TALL), (192, 3)),
    "branch_pool": (),
}
E: Branches = {
    "branch1x1": ((320, 1),),
    "branch3x3": ((384, 1), FORK),
    "branch3x3dbl": ((448, 1), (384, 3), FORK),
    "branch_pool": ((192, 1),),
}

STEM = (  # name, maps in, maps, kernel, stride, padding; a pool of 3, 2 follows those marked
    ("Conv2d_1a_3x3", 3, 32, 3, 2, 0, False),
    ("Conv2d_2a_3x3", 32, 32, 3, 1, 0, False),
    ("Conv2d_2b_3x3", 32, 64, 3, 1, 1, True),
    ("Conv2d_3b_1x1", 64, 80, 1, 1, 0, False),
    ("Conv2d_4a_3x3", 80, 192, 3, 1, 0, True),
)
BLOCKS = (  # name, maps in, branches, pool: the mean or the maximum of 3x3, or the maximum at every other place
    ("Mixed_5b", 192, _a(32), "mean"),
    ("Mixed_5c", 256, _a(64), "mean"),
    ("Mixed_5d", 288, _a(64), "mean"),
    ("Mixed_6a", 288, B, "halve"),
    ("Mixed_6b", 768, _c(128), "mean"),
    ("Mixed_6c", 768, _c(160), "mean"),
    ("Mixed_6d", 768, _c(160), "mean"),
    ("Mixed_6e", 768, _c(192), "mean"),
    ("Mixed_7a", 768, D, "halve"),
    ("Mixed_7b", 1280, E, "mean"),
    ("Mixed_7c", 2048, E, "max"),
)


class Inception(nn.Module):
    """uint8 or float [n, 3, H, W] in 0..255 -> float32 [n, 2048], the mean over the last block's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = {name for name, *_, pool in STEM if pool}
        for name, c_in, maps, kernel, stride, padding, _ in STEM:
            self.add_module(name, Conv(c_in, maps, kernel, stride, padding))
        for name, c_in, branches, pool in BLOCKS:
            self.add_module(name, Mixed(c_in, branches, pool))

    def forward(self, x: Tensor) -> Tensor:
        h = (resize(x.float(), SIZE) - 128) / 128
        for name, layer in self.named_children():
            h = layer(h)
            if name in self.pooled:
                h = F.max_pool2d(h, 3, 2)
        return h.mean((2, 3))


class Conv(nn.Module):
    def __init__(self, c_in: int, maps: int, kernel: int | tuple[int, int], stride: int, padding: int | str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, maps, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(maps, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side; where the block halves the size, the last 3x3 of each does it, without padding."""

    def __init__(self, c_in: int, branches: Branches, pool: str) -> None:
        super().__init__()
        self.pool, self.steps = pool, {}
        for branch, rows in branches.items():
            maps_in, self.steps[branch] = c_in, []
            for number, (maps, *kernels) in enumerate(rows, 1):
                halves = pool == "halve" and number == len(rows)
                step = branch if len(rows) == 1 else f"{branch}_{number}"
                names = [step] if len(kernels) == 1 else [f"{step}{letter}" for letter in "ab"]
                for name, kernel in zip(names, kernels, strict=True):
                    self.add_module(name, Conv(maps_in, maps, kernel, 2 if halves else 1, 0 if halves else "same"))
                self.steps[branch].append(names)
                maps_in = maps

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch, steps in self.steps.items():
            h = self._pooled(x) if branch == "branch_pool" else x
            for names in steps:
                h = torch.cat([self.get_submodule(name)(h) for name in names], 1)
            found.append(h)
        return torch.cat(found, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "mean":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 2) if self.pool == "halve" else F.max_pool2d(x, 3, 1, 1)


def resize(x: Tensor, size: int) -> Tensor:
    """Bilinear, as TensorFlow 1 did it: the new pixel i lies at i * old / new of the old ones, without half pixels."""
    for dim in (2, 3):
        old = x.shape[dim]
        at = torch.arange(size, device=x.device) * torch.tensor(old / size, dtype=torch.float32)
        low = at.long()
        share = (at - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(old - 1))
        x = a + (b - a) * share
    return x
