"""The order of training images, and the stream of batches in that order.

Images have global positions 0, 1, 2, ...; with n images in the split, epoch e covers positions [e n, (e + 1) n) and is
a permutation of them all. Position g belongs to lane g mod L, whatever the epoch, and lane l is read by rank l mod W:
the order is a function of the seed and the number of lanes, not of the ranks, and a position is all there is to resume.
In an epoch, the shards are shuffled and taken as one sequence; each lane reads its own contiguous segment of it,
as long as the lane has positions in the epoch, and shuffles the images of each block.
"""

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ali_dist.data.index import Index
from ali_dist.data.shards import pieces, read
from ali_dist.recipe import UserError

SHARD_ORDER, IMAGE_ORDER = 0, 1  # independent random sequences of one seed


@dataclass(frozen=True, slots=True)
class Batch:
    """A rank's part of a global batch."""

    x: torch.Tensor
    """uint8 [n, C, H, W], the rank's rows."""
    y: torch.Tensor
    """int64 [n], classes, -1 where unknown; or uint8 [n, A], attributes 0 or 1."""
    rows: torch.Tensor
    """int64 [n], each image's row in the global batch, ascending."""
    size: int
    """Images of the global batch."""


def shares(micro_batch: int, lanes: int, world: int) -> int:
    """Smallest number of rows any rank gets in any batch, wherever it starts; 0 means that a rank would sit empty."""
    lane = (np.arange(lanes)[:, None] + np.arange(micro_batch)) % lanes
    return min(int(np.bincount(row % world, minlength=world).min()) for row in lane)


class Stream:
    """Endless iterator over a rank's `Batch`es from position `num_images` on; a thread keeps `prefetch` of them ready.

    `seed` and `lanes` fix the order; `micro_batch` is the global batch's images. A damaged shard raises UserError, here
    or in `next()`. Use it as a context manager, or call `close()`.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        seed: int,
        lanes: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        num_images: int = 0,
        prefetch: int = 4,
    ) -> None:
        if not index.images(split):
            raise UserError(f"split {split!r} of data set {index.name!r} has no images")
        self.wait_seconds = 0.0
        """Seconds that `next()` has waited for data so far."""
        self._error: Exception | None = None
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(prefetch)
        stop = threading.Event()
        batches = _batches(index, split, seed, lanes, micro_batch, rank, world, num_images)
        # The thread must not hold the stream, or a forgotten stream would never be collected
        thread = threading.Thread(target=_fill, args=(batches, self._ready, stop), name="ali_dist.data", daemon=True)
        self.close = weakref.finalize(self, _stop, self._ready, stop, thread)
        """Ends the thread and waits for it; also done when the stream is collected and when the interpreter exits."""
        thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise RuntimeError("the stream is closed")
        if self._error is None:
            started = time.perf_counter()
            item = self._ready.get()
            self.wait_seconds += time.perf_counter() - started
            if isinstance(item, Batch):
                return item
            self._error = item
        raise self._error

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def validation(
    index: Index, split: str, *, count: int, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """The first `count` images of a split in stored order (all, when it has fewer), `batch_size` at a time globally.

    Rows are dealt round robin; the last batch may be short, and a rank without rows in it gets an empty one.
    Raises UserError for an unknown split and for damaged shards.
    """
    count = min(count, index.images(split))
    plan = list(pieces(index.shards(split), 0, count))
    lane = _Lane((x, y, np.arange(len(y))) for x, y in read(index, plan))
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        x, y = _empty(index, size)
        lane.fill(x, y, np.arange(size))
        rows = np.arange(rank, size, world)
        yield _batch(x[rows], y[rows], rows, size)


class _Lane:
    """Images one after another out of an iterator over pieces x, y and the order of their images."""

    def __init__(self, source: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        self.source, self.x, self.y, self.order = source, None, None, np.empty(0, np.int64)

    def fill(self, x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> None:
        """Puts the lane's next images into these rows."""
        while len(rows):
            if not len(self.order):
                self.x = self.y = None  # at most one block a lane is held
                self.x, self.y, self.order = next(self.source)
            count = min(len(rows), len(self.order))
            now, rows = rows[:count], rows[count:]
            taken, self.order = self.order[:count], self.order[count:]
            x[now], y[now] = self.x[taken], self.y[taken]


def _batches(
    index: Index, split: str, seed: int, lanes: int, micro_batch: int, rank: int, world: int, num_images: int
) -> Iterator[Batch]:
    mine = {lane: _Lane(_lane(index, split, seed, lanes, lane, num_images)) for lane in range(rank, lanes, world)}
    for start in itertools.count(num_images, micro_batch):
        lane_of = (start + np.arange(micro_batch)) % lanes
        rows = np.flatnonzero(lane_of % world == rank)
        x, y = _empty(index, len(rows))
        for lane, images in mine.items():
            images.fill(x, y, np.flatnonzero(lane_of[rows] == lane))
        yield _batch(x, y, rows, micro_batch)


def _lane(
    index: Index, split: str, seed: int, lanes: int, lane: int, num_images: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The lane's pieces, with the order of their images, from its first position at or after `num_images`."""
    shards, n = index.shards(split), index.images(split)
    for epoch in itertools.count(num_images // n):
        first, last = epoch * n, (epoch + 1) * n
        start = sum(_below(last, other, lanes) - _below(first, other, lanes) for other in range(lane))
        count = _below(last, lane, lanes) - _below(first, lane, lanes)
        order = np.random.default_rng((SHARD_ORDER, seed, epoch)).permutation(len(shards))
        plan = list(enumerate(pieces([shards[i] for i in order], start, start + count)))
        skip = max(_below(num_images, lane, lanes) - _below(first, lane, lanes), 0)
        while plan and skip >= len(plan[0][1]):
            skip -= len(plan.pop(0)[1])
        for (number, _), (x, y) in zip(plan, read(index, [piece for _, piece in plan]), strict=True):
            shuffled = np.random.default_rng((IMAGE_ORDER, seed, epoch, lane, number)).permutation(len(y))
            yield x, y, shuffled[skip:]
            skip = 0


def _below(position: int, lane: int, lanes: int) -> int:
    """How many positions before this one belong to the lane."""
    return (position - lane + lanes - 1) // lanes


def _empty(index: Index, images: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.empty((images, len(index.attributes)), np.uint8) if index.attributes else np.empty(images, np.int64)
    return np.empty((images, *index.shape), np.uint8), y


def _batch(x: np.ndarray, y: np.ndarray, rows: np.ndarray, size: int) -> Batch:
    return Batch(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(rows), size)


def _fill(batches: Iterator[Batch], ready: queue.Queue, stop: threading.Event) -> None:
    """The thread: what goes wrong here is raised in `next()`."""
    try:
        for batch in batches:
            ready.put(batch)
            if stop.is_set():
                return
    except Exception as error:
        ready.put(error)


def _stop(ready: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while thread.is_alive():
        try:
            ready.get_nowait()  # makes room for a thread that waits in put()
        except queue.Empty:
            thread.join(0.01)
