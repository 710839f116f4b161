"""The labelled images that metrics read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ali_dist.data.index import Index
from ali_dist.data.stream import validation
from ali_dist.recipe import UserError


@dataclass(frozen=True, slots=True)
class Labelled:
    """x uint8 [N, C, H, W], y int64 [N]."""

    x: Tensor
    y: Tensor


def check_classes(index: Index) -> None:
    """UserError for a data set without classes."""
    if not index.classes:
        raise UserError(f"data set {index.name} has no classes: --metrics reconstruction,posterior need none")


def first(index: Index, split: str, count: int) -> Labelled:
    """The first `count` images of a split in stored order (training splits are stored in a random order)."""
    batches = list(validation(index, split, count=count, batch_size=256))
    return Labelled(torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches]))
