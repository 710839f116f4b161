"""Reading shards, the one door to webdataset: only plain local tar files of .npy arrays, checked, never unpickled."""

import hashlib
import itertools
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from ali_dist.data.index import BLOCK, Index, Shard, prepare_command
from ali_dist.recipe import UserError

wds.utils.enforce_security = True  # no shell commands, no unpickling, whatever the environment says

# Shards whose SHA-256 this process has found right, with the inode and time that tell a replaced file
_checked: set[tuple] = set()


@dataclass(frozen=True, slots=True)
class Piece:
    """Images [start, stop) of a block."""

    shard: Shard
    block: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def pieces(shards: Iterable[Shard], start: int, stop: int) -> Iterator[Piece]:
    """The blocks, or parts of them, that make up images [start, stop) of the shards seen as one sequence."""
    base = 0
    for shard in shards:
        first, last = max(start - base, 0), min(stop - base, shard.images)
        while first < last:
            block = first // BLOCK
            end = min(last, (block + 1) * BLOCK)
            yield Piece(shard, block, first - block * BLOCK, end - block * BLOCK)
            first = end
        base += shard.images


def read(index: Index, plan: Sequence[Piece]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields x uint8 [n, C, H, W] and y for each piece of the plan, which goes forward in each shard; y is int64 [n] of
    classes or uint8 [n, A] of attributes.

    UserError, naming the shard, when it is missing, changed, cut short or holds fewer images than the index says.
    """
    shards = [shard for shard, _ in itertools.groupby(piece.shard for piece in plan)]
    samples = wds.DataPipeline(
        lambda: _open_all(index, shards),
        wds.pipelinefilter(tar_file_expander)(),
        wds.pipelinefilter(group_by_keys)(),
    )
    waiting = iter(plan)
    piece = next(waiting, None)
    if piece is None:
        return
    try:
        for sample in samples:
            if (sample["__url__"], sample["__key__"]) != (piece.shard.name, _key(piece)):
                continue
            yield _decode(index, piece, sample)
            piece = next(waiting, None)
            if piece is None:
                return
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise _bad(index, piece.shard, f"cannot be read ({error.args[0] if error.args else error})") from error
    raise _bad(index, piece.shard, f"lacks block {_key(piece)}")


def verify(index: Index, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Reads everything: UserError when any shard's bytes, checksum, arrays or number of images are not the index's.

    `progress` is called with the images read so far and in all.
    """
    total, done = sum(map(index.images, index.splits)), 0
    for split, shards in index.splits.items():
        for _, y in read(index, list(pieces(shards, 0, index.images(split)))):
            done += len(y)
            progress(done, total)


def _open_all(index: Index, shards: Iterable[Shard]) -> Iterator[dict[str, Any]]:
    """webdataset's first stage."""
    for shard in shards:
        with _open(index, shard) as stream:
            yield {"url": shard.name, "stream": stream}


def _open(index: Index, shard: Shard) -> BinaryIO:
    """Opens a shard whose size, and at the first opening whose SHA-256, is the index's."""
    path = index.folder / shard.name
    try:
        stream = open(path, "rb")
    except OSError as error:
        raise _bad(index, shard, f"cannot be opened ({error.strerror})") from error
    try:
        stat = os.fstat(stream.fileno())
        if stat.st_size != shard.bytes:
            raise _bad(index, shard, f"has {stat.st_size:,} bytes instead of {shard.bytes:,}")
        mark = (path, shard.sha256, stat.st_ino, stat.st_mtime_ns)
        if mark not in _checked:
            if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
                raise _bad(index, shard, "has changed since it was prepared (its SHA-256 differs)")
            stream.seek(0)
            _checked.add(mark)
    except BaseException:
        stream.close()
        raise
    return stream


def _decode(index: Index, piece: Piece, sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    try:
        # Taken out of the sample, which webdataset keeps alive until the next one
        members = "x", "attributes" if index.attributes else "y"
        x, y = (np.lib.format.read_array(BytesIO(sample.pop(f"{name}.npy")), allow_pickle=False) for name in members)
    except KeyError as error:
        raise ValueError(f"block {_key(piece)} has no {error.args[0]}") from error
    images = min(BLOCK, piece.shard.images - piece.block * BLOCK)
    labels = ((images, len(index.attributes)), np.uint8) if index.attributes else ((images,), np.int64)
    if x.shape != (images, *index.shape) or x.dtype != np.uint8 or (y.shape, y.dtype) != labels:
        raise ValueError(f"block {_key(piece)} holds {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}")
    return x[piece.start : piece.stop], y[piece.start : piece.stop]


def _key(piece: Piece) -> str:
    return f"{piece.block:06d}"


def _bad(index: Index, shard: Shard, what: str) -> UserError:
    command = prepare_command(index.folder.parent, index.name)
    return UserError(
        f"shard {index.folder / shard.name} {what}: `{command} --force` makes it anew, --verify checks all"
    )
