"""The labelled images that metrics read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ali_dist.data.index import Index
from ali_dist.data.shards import Reader, blocks, pieces
from ali_dist.data.stream import validation
from ali_dist.evaluate.work import Chunk, Work
from ali_dist.model import Features, Model
from ali_dist.recipe import UserError


@dataclass(frozen=True, slots=True)
class Labelled:
    """x uint8 [N, C, H, W]; y int64 [N] of classes, or uint8 [N, A] of attributes."""

    x: Tensor
    y: Tensor


def check_classes(index: Index) -> None:
    """UserError for a data set without classes, or with one alone."""
    if not index.classes:
        raise UserError(f"data set {index.name} has no classes: --metrics reconstruction,posterior need none")
    if len(index.classes) < 2:
        raise UserError(f"data set {index.name} has one class, which leaves nothing to tell apart: prepare it with two")


def check_unconditional(model: Model) -> None:
    """UserError for an encoder that is given what a probe of its codes would have to find out."""
    if model.labels:
        raise UserError(f"{model.checkpoint} is conditional: its encoder is given the labels, so probes show nothing")


def unseen_split(model: Model, index: Index) -> str:
    """Labelled images that the run was not trained on: the official test images, else its validation images."""
    labelled = "test" in index.splits and (
        "test" not in index.notes or sum(index.notes["test"].label_counts) == index.images("test")
    )
    return "test" if labelled and model.recipe.train_split != "test" else model.recipe.valid_split


def identity(index: Index, split: str) -> str:
    """SHA-256, in hex, of the SHA-256s of a split's shards: of its very bytes."""
    return hashlib.sha256("".join(shard.sha256 for shard in index.shards(split)).encode()).hexdigest()


def given(model: Model, y: Tensor) -> Tensor | None:
    """The labels where the model is conditional."""
    return y if model.labels else None


def first(index: Index, split: str, count: int) -> Labelled:
    """The first `count` images of a split in stored order (training splits are stored in a random order)."""
    batches = list(validation(index, split, count=count, batch_size=256))
    return Labelled(torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches]))


def read(index: Index, split: str, chunk: Chunk) -> Labelled:
    """A chunk of a split."""
    reader = Reader(index, split)
    x, y = zip(*reader.read(pieces(blocks(reader.shards), chunk.start, chunk.stop)), strict=True)
    return Labelled(torch.from_numpy(np.concatenate(x)), torch.from_numpy(np.concatenate(y)))


def codes(model: Model, index: Index, split: str, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """mu, float32 [n, latent], and labels [n] of a split's images."""
    x, y = zip(*work.each(_codes, index.images(split), model, index, split), strict=True)
    return np.concatenate(x), np.concatenate(y)


def _codes(model: Model, index: Index, split: str, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
    images = read(index, split, chunk)
    return model.encode(images.x).numpy(), images.y.numpy()


def layers(
    model: Model, index: Index, split: str, kind: Features, folder: Path, work: Work
) -> tuple[np.ndarray, np.ndarray]:
    """`Model.features` [n, F] of a split's images, in a file of `folder` rather than in memory, and labels [n]."""
    count, x, labels, row = index.images(split), None, [], 0
    for part, y in work.each(_layers, count, model, index, split, kind):
        if x is None:
            x = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", np.float32, (count, part.shape[1]))
        x[row : row + len(part)] = part
        row += len(part)
        labels.append(y)
    return x, np.concatenate(labels)


def _layers(model: Model, index: Index, split: str, kind: Features, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
    images = read(index, split, chunk)
    return model.features(images.x, kind).numpy(), images.y.numpy()
