"""Few images with labels: their draw, and batches of which a part are theirs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ali_dist.data.index import Index
from ali_dist.data.shards import Reader
from ali_dist.data.stream import Batch, Stream, validation
from ali_dist.data.types import BLOCK, UNLABELLED
from ali_dist.recipe import UserError

LABELLED_ORDER = 2  # beside the stream's random sequences of one seed


def balanced_draw(y: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows of `per_class` labels of every class, drawn without replacement; UserError when a class has fewer."""
    generator, rows = np.random.default_rng(seed), []
    for label in np.unique(y[y != UNLABELLED]):
        of_class = np.flatnonzero(y == label)
        if len(of_class) < per_class:
            raise UserError(f"class {label} has {len(of_class)} training images, fewer than the {per_class} to draw")
        rows.append(generator.choice(of_class, per_class, replace=False))
    return np.concatenate(rows)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The labelled images: their places in the split's stored order, ascending, x uint8 [n, C, H, W], y int64 [n]."""

    places: Tensor
    x: Tensor
    y: Tensor

    def to_json(self) -> dict[str, list[int]]:
        return {"images": self.places.tolist(), "classes": self.y.tolist()}


def draw(index: Index, split: str, labels: int, seed: int) -> Drawn:
    """As many images of each class; the same ones for the same data set, split and seed.

    Reads the split twice, so that no more is in memory than what is drawn.
    """
    y = torch.cat([batch.y for batch in _all(index, split)])
    places = np.sort(balanced_draw(y.numpy(), labels // len(index.classes), seed))
    chosen = np.zeros(len(y), bool)
    chosen[places] = True
    x, start = [], 0
    for batch in _all(index, split):
        x.append(batch.x[torch.from_numpy(chosen[start : start + len(batch.x)])])
        start += len(batch.x)
    return Drawn(torch.from_numpy(places), torch.cat(x), y[places])


def _all(index: Index, split: str) -> Iterator[Batch]:
    return validation(index, split, count=index.images(split), batch_size=BLOCK)


class SemiSupervised:
    """Endless batches whose first rows are a stream's, UNLABELLED, and whose last rows are labelled images.

    `stream` is None where all are labelled, else it gives `micro_batch - labelled` images a batch. The labelled ones
    come in a new random order each time all have been seen, a function of the seed alone; ranks share them out.
    """

    def __init__(
        self,
        stream: Stream | None,
        drawn: Drawn,
        *,
        seed: int,
        micro_batch: int,
        labelled: int,
        rank: int = 0,
        world: int = 1,
        num_images: int = 0,
        pin: bool = False,
    ) -> None:
        self.stream, self.drawn, self.pin = stream, drawn, pin
        self.seed, self.micro_batch, self.labelled = seed, micro_batch, labelled
        self.mine = np.arange(rank, labelled, world)
        self.batch = num_images // micro_batch
        self.epoch, self.order = -1, np.empty(0, np.int64)

    @property
    def reader(self) -> Reader | None:
        """Of the stream, where there is one."""
        return self.stream.reader if self.stream else None

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for images so far."""
        return self.stream.wait_seconds if self.stream else 0.0

    def __next__(self) -> Batch:
        picked = torch.from_numpy(np.array([self._image(i) for i in self.batch * self.labelled + self.mine], np.int64))
        rows = torch.from_numpy(self.micro_batch - self.labelled + self.mine)
        x, y = self.drawn.x[picked], self.drawn.y[picked]
        self.batch += 1
        if self.stream is not None:
            others = next(self.stream)
            unknown = torch.full((len(others.x),), UNLABELLED)
            x, y, rows = torch.cat([others.x, x]), torch.cat([unknown, y]), torch.cat([others.rows, rows])
        return Batch(x.pin_memory() if self.pin else x, y, rows, self.micro_batch)

    def _image(self, position: int) -> int:
        """Which of the drawn images is the labelled sequence's at this position."""
        epoch, place = divmod(int(position), len(self.drawn.y))
        if epoch != self.epoch:
            generator = np.random.default_rng((LABELLED_ORDER, self.seed, epoch))
            self.epoch, self.order = epoch, generator.permutation(len(self.drawn.y))
        return int(self.order[place])

    def __enter__(self) -> "SemiSupervised":
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.close()
