"""The order of training images, and the stream of batches in that order.

Images have global positions 0, 1, 2, ...; with n images in the split, epoch e covers positions [e n, (e + 1) n) and is
a permutation of them all. Position g belongs to lane g mod L, whatever the epoch, and lane l is read by rank l mod W:
the order is a function of the seed and the number of lanes, not of the ranks, and a position is all there is to resume.
In an epoch, the blocks of all shards are shuffled and taken as one sequence; each lane reads its own contiguous segment
of it, as long as the lane has positions in the epoch, and shuffles the images of each block.
"""

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from ali_dist.data.index import Index
from ali_dist.data.shards import Piece, Reader, blocks, pieces
from ali_dist.data.types import BLOCK
from ali_dist.recipe import UserError

BLOCK_ORDER, IMAGE_ORDER = 0, 1  # independent random sequences of one seed
READERS = 8  # threads that fetch blocks of a remote store


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

    `seed` and `lanes` fix the order; `micro_batch` is the global batch's images. A damaged shard raises UserError in
    `next()`, or `reader` counts it. `pin`: x lies in pinned memory, for asynchronous copies to CUDA.
    Use it as a context manager, or call `close()`.
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
        pin: bool = False,
    ) -> None:
        if not index.images(split):
            raise UserError(f"split {split!r} of data set {index.name!r} has no images")
        self.wait_seconds = 0.0
        """Seconds that `next()` has waited for data so far."""
        self._error: Exception | None = None
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(prefetch)
        stop = threading.Event()
        self.reader = Reader(replace(index, store=index.store.until(stop)), split)
        # A local read takes no longer than a copy; over a network, waiting for many at once is what makes it fast
        threads = ThreadPoolExecutor(READERS, "ali_dist.data.read") if index.store.remote else None
        order = {"seed": seed, "lanes": lanes, "micro_batch": micro_batch, "num_images": num_images}
        batches = _batches(self.reader, threads, **order, rank=rank, world=world, pin=pin)
        # The thread must not hold the stream, or a forgotten stream would never be collected
        thread = threading.Thread(target=_fill, args=(batches, self._ready, stop), name="ali_dist.data", daemon=True)
        self.close = weakref.finalize(self, _stop, self._ready, stop, thread, threads)
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
    index: Index,
    split: str,
    *,
    count: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """The first `count` images of a split in stored order (all, when it has fewer), `batch_size` at a time globally.

    Rows are dealt round robin; the last batch may be short, and a rank without rows in it gets an empty one.
    Raises UserError for an unknown split and for damaged shards.
    """
    count = min(count, index.images(split))
    reader = Reader(index, split)
    lane = _Lane((x, y, np.arange(len(y))) for x, y in reader.read(pieces(blocks(reader.shards), 0, count)))
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        whole, rows = _empty(index, np.arange(size), size), np.arange(rank, size, world)
        lane.fill(whole.x.numpy(), whole.y.numpy())
        yield Batch(whole.x[rows], whole.y[rows], whole.rows[rows], size)


class _Lane:
    """Images one after another out of an iterator over pieces x, y and the order of their images."""

    def __init__(self, source: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        self.source, self.x, self.y, self.order = source, None, None, np.empty(0, np.int64)

    def fill(self, x: np.ndarray, y: np.ndarray) -> None:
        """Puts the lane's next images into all rows of x and y."""
        done = 0
        while done < len(y):
            if not len(self.order):
                self.x = self.y = None  # at most one block a lane is held
                self.x, self.y, self.order = next(self.source)
            taken, self.order = self.order[: len(y) - done], self.order[len(y) - done :]
            now = slice(done, done + len(taken))
            x[now], y[now] = self.x[taken], self.y[taken]
            done += len(taken)


def _batches(
    reader: Reader,
    threads: ThreadPoolExecutor | None,
    *,
    seed: int,
    lanes: int,
    micro_batch: int,
    rank: int,
    world: int,
    num_images: int,
    pin: bool,
) -> Iterator[Batch]:
    mine = {}
    for lane in range(rank, lanes, world):
        turns, again = itertools.tee(_turns(reader, seed, lanes, lane, num_images))
        read = reader.read((turn.piece for turn in turns), threads)
        mine[lane] = _Lane((x, y, turn.order()) for (x, y), turn in zip(read, again, strict=True))
    for start in itertools.count(num_images, micro_batch):
        lane_of = (start + np.arange(micro_batch)) % lanes
        rows = np.flatnonzero(lane_of % world == rank)
        batch = _empty(reader.index, rows, micro_batch, pin)
        x, y = batch.x.numpy(), batch.y.numpy()
        # This rank's lanes take turns, so each one's rows are evenly spaced: slices, which numpy copies fastest
        for first, lane in enumerate(lane_of[rows[: len(mine)]].tolist()):
            mine[lane].fill(x[first :: len(mine)], y[first :: len(mine)])
        yield batch


class _Turn(NamedTuple):
    """A piece that a lane reads, and the seed of its images' order, of which `skip` are left out."""

    piece: Piece
    seed: tuple[int, ...]
    skip: int

    def order(self) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(len(self.piece))[self.skip :]


def _turns(reader: Reader, seed: int, lanes: int, lane: int, num_images: int) -> Iterator[_Turn]:
    """What the lane reads, without end, from its first position at or after `num_images`."""
    whole = list(blocks(reader.shards))
    n = sum(map(len, whole))
    for epoch in itertools.count(num_images // n):
        first, last = epoch * n, (epoch + 1) * n
        start = sum(_below(last, other, lanes) - _below(first, other, lanes) for other in range(lane))
        count = _below(last, lane, lanes) - _below(first, lane, lanes)
        order = np.random.default_rng((BLOCK_ORDER, seed, epoch)).permutation(len(whole))
        skip = max(_below(num_images, lane, lanes) - _below(first, lane, lanes), 0)
        for number, piece in enumerate(pieces((whole[i] for i in order), start, start + count)):
            if skip < len(piece):
                yield _Turn(piece, (IMAGE_ORDER, seed, epoch, lane, number), skip)
            skip = max(skip - len(piece), 0)


def order_of(index: Index, split: str, *, seed: int, lanes: int, epoch: int) -> np.ndarray:
    """int64 [n]: which image of the split's stored order stands at each position of an epoch."""
    reader, n = Reader(index, split), index.images(split)
    bases, base = {}, 0
    for shard in reader.shards:
        bases[shard.name] = base
        base += shard.images
    found, positions = np.empty(n, np.int64), np.arange(epoch * n, (epoch + 1) * n)
    for lane in range(lanes):
        mine = np.flatnonzero(positions % lanes == lane)
        turns, taken = _turns(reader, seed, lanes, lane, epoch * n), 0
        while taken < len(mine):
            piece, *_ = turn = next(turns)
            images = bases[piece.shard.name] + piece.block * BLOCK + piece.start + turn.order()
            found[mine[taken : taken + len(images)]] = images
            taken += len(images)
    return found


def _below(position: int, lane: int, lanes: int) -> int:
    """How many positions before this one belong to the lane."""
    return (position - lane + lanes - 1) // lanes


def _empty(index: Index, rows: np.ndarray, size: int, pin: bool = False) -> Batch:
    """A batch of these rows whose images and labels are still to be filled in."""
    attributes = len(index.attributes)
    return Batch(
        x=torch.empty(len(rows), *index.shape, dtype=torch.uint8, pin_memory=pin),
        y=torch.empty(
            (len(rows), attributes) if attributes else len(rows), dtype=torch.uint8 if attributes else torch.int64
        ),
        rows=torch.from_numpy(rows),
        size=size,
    )


def _fill(batches: Iterator[Batch], ready: queue.Queue, stop: threading.Event) -> None:
    """The thread: what goes wrong here is raised in `next()`."""
    try:
        for batch in batches:
            ready.put(batch)
            if stop.is_set():
                return
    except Exception as error:
        ready.put(error)


def _stop(
    ready: queue.Queue, stop: threading.Event, thread: threading.Thread, threads: ThreadPoolExecutor | None
) -> None:
    stop.set()
    if threads:
        threads.shutdown(wait=False, cancel_futures=True)
    while thread.is_alive():
        try:
            ready.get_nowait()  # makes room for a thread that waits in put()
        except queue.Empty:
            thread.join(0.01)
