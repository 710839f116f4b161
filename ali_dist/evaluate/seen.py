"""What is kept of the features of many images, and the data set's own, computed once and cached."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ali_dist.data.index import Index
from ali_dist.evaluate.data import given, identity, read
from ali_dist.evaluate.features import FEATURES, FeatureNetwork
from ali_dist.evaluate.work import Chunk, Work
from ali_dist.model import Model
from ali_dist.recipe import UserError

FEWEST = 10  # images
KEPT = 10_000  # images whose features are kept: 82 MB of Inception's
VERSION = 1  # of the cached files

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """Features of images, passed by once: its memory does not grow with their number."""

    count: Tensor
    """int64, the images."""
    total: Tensor
    """float64 [F], the sum of their features."""
    products: Tensor
    """float64 [F, F], the sum of each image's products of two features."""
    features: Tensor
    """float32 [n, F] of the first images, at most KEPT."""

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased."""
        return (self.products - self.count * self.mean.outer(self.mean)) / (self.count - 1)


def see(parts: Iterable[Tensor]) -> Seen:
    """Adds up features float32 [n, F], part by part in float64, in the order they come."""
    count, total, products, kept = 0, 0, 0, []
    for part in parts:
        kept.append(part[: max(KEPT - count, 0)])
        wide = part.double()
        count, total, products = count + len(part), total + wide.sum(0), products + wide.T @ wide
    return Seen(torch.tensor(count), total, products, torch.cat(kept))


@dataclass(frozen=True, slots=True)
class Pair:
    """A data set and a model's samples, by the same network; as many of one as of the other."""

    real: Seen
    fake: Seen
    network: FeatureNetwork


def pair(model: Model, index: Index, features: str, work: Work) -> Pair:
    """Both sides for a row of FEATURES, once a command.

    A conditional model is given the labels of the images it is compared with. UserError when the split is not there
    or has too few images.
    """
    name = f"pair by {features}"
    if name not in work.kept:
        count = min(work.images, index.images(work.reference))
        if count < FEWEST:
            raise UserError(f"{count} images of split {work.reference!r} are too few: compare at least {FEWEST}")
        if count < work.images:
            log.warning(f"split {work.reference!r} has {count} images only, fewer than --images {work.images}")
        network = FEATURES[features](work)
        real = reference(index, network, count, work)
        fake = see(work.each(_of_samples, count, model, network, index, work.reference, unit="samples"))
        work.kept[name] = Pair(real, fake, network)
    return work.kept[name]


def _of_samples(model: Model, network: FeatureNetwork, index: Index, split: str, chunk: Chunk) -> Tensor:
    y = given(model, read(index, split, chunk).y) if model.labels else None
    z = torch.randn(len(chunk), model.latent, generator=chunk.generator())
    return network(quantised(model.decode(z, y)))


def _of_images(network: FeatureNetwork, index: Index, split: str, chunk: Chunk) -> Tensor:
    return network(read(index, split, chunk).x)


def quantised(x: Tensor) -> Tensor:
    """Images in [0, 1] as a file of theirs would hold them: uint8."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def reference(index: Index, network: FeatureNetwork, count: int, work: Work) -> Seen:
    """The first `count` images of the reference split, out of the cache where they have been seen before.

    A file belongs to a data set's very bytes, split, count, network, weights and preprocessing; one that is damaged
    is made anew. UserError when the folder can't be written to.
    """
    key = {
        "version": VERSION,
        "dataset": index.name,
        "shards": identity(index, work.reference),
        "split": work.reference,
        "images": count,
        "kept": KEPT,
        "network": network.name,
        "weights": network.weights,
        "preprocessing": network.preprocessing,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = work.cache / f"{index.name}-{work.reference}-{count}-{network.name}-{digest}.safetensors"
    if path.exists():
        try:
            return load_seen(path, key)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning(f"{path} is damaged ({error}): made anew")
    seen = see(work.each(_of_images, count, network, index, work.reference))
    save_seen(path, seen, key)
    return seen


def save_seen(path: Path, seen: Seen, key: dict[str, str | int]) -> None:
    """Writes all of it or nothing; UserError when that is not possible."""
    tensors = {name: tensor.contiguous() for name, tensor in asdict(seen).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        try:
            save_file(tensors, partial, {"key": json.dumps(key), "sha256": _digest(tensors)})
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write to --cache {path.parent} ({error}): give a writable folder") from error


def load_seen(path: Path, key: dict[str, str | int]) -> Seen:
    """What `save_seen` wrote under the same key; ValueError when it is something else."""
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if json.loads(about["key"]) != key or about["sha256"] != _digest(tensors):
        raise ValueError("it is not what its name says")
    return Seen(**tensors)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()
