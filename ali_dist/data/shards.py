"""Reading shards, the one door to webdataset: blocks of plain tar files, checked before use, never unpickled.

A shard is an ordinary webdataset tar, but is read by block and not from its beginning: webdataset's own reader passes
over some kinds of damage (a file cut between members, a damaged header), and cannot begin in the middle.
"""

import hashlib
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import webdataset as wds

from ali_dist.data import block
from ali_dist.data.index import BLOCK, Index, Shard, mending
from ali_dist.data.parts import Damaged
from ali_dist.recipe import UserError

log = logging.getLogger(__name__)
wds.utils.enforce_security = True  # no shell commands, no unpickling, whatever the environment says


@dataclass(frozen=True, slots=True)
class Piece:
    """Images [start, stop) of a block."""

    shard: Shard
    block: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def blocks(shards: Iterable[Shard]) -> Iterator[Piece]:
    """All blocks, whole, in stored order."""
    for shard in shards:
        for number in range(len(shard.blocks)):
            yield Piece(shard, number, 0, min(BLOCK, shard.images - number * BLOCK))


def pieces(whole: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The blocks, or parts of them, that make up images [start, stop) of whole blocks seen as one sequence."""
    base = 0
    for one in whole:
        if base >= stop:
            return
        first, last = max(start - base, 0), min(stop - base, len(one))
        if first < last:
            yield Piece(one.shard, one.block, first, last)
        base += len(one)


class Reader:
    """Reads pieces of a split. A block that is not what the index says is an error, or replaced where it says so.

    In its place then stand images of the next shard whose same block is whole: the number of images, and with it every
    position, stays the same, and what is read depends on the damage alone, not on who reads or from where.
    """

    def __init__(self, index: Index, split: str) -> None:
        self.index, self.shards = index, index.shards(split)
        self.bad: dict[str, str] = {}
        """Shards found damaged, and what is wrong with them."""
        self.replaced = 0
        """Images read so far that stand for others."""

    def read(self, plan: Iterable[Piece], ahead: Executor | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields x uint8 [n, C, H, W] and y for each piece; y is int64 [n] of classes or uint8 [n, A] of attributes.

        With `ahead`, its threads read the first piece at once, and then one piece more than is used.
        UserError, naming the shard, when it is missing, changed, cut short or holds other images than the index says.
        """
        samples = map(self._sample, plan) if ahead is None else _Ahead(self._sample, iter(plan), ahead)
        return iter(wds.DataPipeline(lambda: samples, wds.to_tuple("x", "y")))

    def _sample(self, piece: Piece) -> dict[str, Any]:
        """As webdataset has them: one group of members, decoded."""
        try:
            x, y = self._block(piece.shard, piece.block)
            x, y = x[piece.start : piece.stop], y[piece.start : piece.stop]
        except Damaged as damage:
            if not self.index.skip_bad:
                raise bad_shard(self.index, piece.shard, damage) from damage
            self._note(piece.shard, damage)
            x, y = self._replacement(piece)
        return {"__key__": f"{piece.block:06d}", "__url__": piece.shard.name, "x": x, "y": y}

    def _block(self, shard: Shard, number: int) -> tuple[np.ndarray, np.ndarray]:
        return decode(self.index, shard, number, self.index.store.block(shard.name, shard.bytes, *shard.blocks[number]))

    def _replacement(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        at = self.shards.index(piece.shard)
        for other in self.shards[at + 1 :] + self.shards[:at]:
            try:
                x, y = self._block(other, piece.block % len(other.blocks))
            except Damaged as damage:
                self._note(other, damage)
                continue
            rows = np.arange(piece.start, piece.stop) % len(y)
            self.replaced += len(rows)
            return x[rows], y[rows]
        raise UserError(f"no shard is whole: {bad_shard(self.index, piece.shard, self.bad[piece.shard.name])}")

    def _note(self, shard: Shard, damage: Damaged) -> None:
        if shard.name not in self.bad:
            self.bad[shard.name] = str(damage)
            log.warning(f"shard {self.index.store}/{shard.name} {damage}: images of other shards stand for its own")


class _Ahead:
    """`map` whose next result a thread makes while the last one is used, and the first one at once."""

    def __init__(self, function: Callable[[Piece], dict[str, Any]], plan: Iterator[Piece], threads: Executor) -> None:
        self.function, self.plan, self.threads = function, plan, threads
        self._submit()

    def __iter__(self) -> "_Ahead":
        return self

    def __next__(self) -> dict[str, Any]:
        if self.future is None:
            raise StopIteration
        sample = self.future.result()
        self._submit()
        return sample

    def _submit(self) -> None:
        piece = next(self.plan, None)
        self.future = None if piece is None else self.threads.submit(self.function, piece)


def verify(index: Index, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Reads everything: UserError when any shard's bytes, checksums, arrays or number of images are not the index's.

    `progress` is called with the images read so far and in all.
    """
    total, done = sum(map(index.images, index.splits)), 0
    for shards in index.splits.values():
        for shard in shards:
            try:
                data = index.store.block(shard.name, shard.bytes, 0, shard.bytes, shard.sha256)
                for number, (offset, size, sha256) in enumerate(shard.blocks):
                    content = data[offset : offset + size]
                    if hashlib.sha256(content).hexdigest() != sha256:
                        raise Damaged(f"holds another block {number} than index.json says")
                    _, y = decode(index, shard, number, content)
                    done += len(y)
                    progress(done, total)
            except Damaged as damage:
                raise bad_shard(index, shard, damage) from damage


def decode(index: Index, shard: Shard, number: int, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a block from its members' bytes; Damaged when they are not as they should be."""
    images = min(BLOCK, shard.images - number * BLOCK)
    try:
        found = block.members(data)
        return block.images(found, (images, *index.shape)), block.labels(found, images, len(index.attributes))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise Damaged(f"cannot be read (block {number}: {error})") from error


def bad_shard(index: Index, shard: Shard, what: Damaged | str) -> UserError:
    """What is wrong, and what to do."""
    place = str(index.store).rpartition("/")[0]
    mend = mending(place, index.name, "--force")
    return UserError(
        f"shard {index.store}/{shard.name} {what}: {mend}; --verify checks all, --on-bad-shard skip goes on"
    )
