"""The labelled images that metrics read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ali_dist.data.index import Index
from ali_dist.data.stream import validation


@dataclass(frozen=True, slots=True)
class Labelled:
    """x uint8 [N, C, H, W], y int64 [N]."""

    x: Tensor
    y: Tensor


def first(index: Index, split: str, count: int) -> Labelled:
    """The first `count` images of a split in stored order (training splits are stored in a random order)."""
    batches = list(validation(index, split, count=count, batch_size=256))
    return Labelled(torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches]))
