"""How a metric goes over many images: in fixed chunks, by any number of workers, to the same number."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ali_dist.data.progress import Progress
from ali_dist.data.types import BLOCK
from ali_dist.model import Model

R = TypeVar("R")
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Like `map`, whose results come in the items' order, but may compute in other processes."""


def exact_float32() -> None:
    """Has GPUs compute in float32 all through, which convolutions there do not by default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def device_kind(_: object = None) -> str:
    """Where networks compute in this process: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Images [start, stop) of a split's stored order, or as many samples."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def generator(self) -> torch.Generator:
        """The chunk's own noise, whoever computes it."""
        return torch.Generator().manual_seed(self.start)


@dataclass(frozen=True)
class Work:
    """What all metrics of one command share."""

    map: Map = map
    images: int = 10_000
    """Images of the data set and samples that the distances between the two compare."""
    reference: str = "train"
    """The split whose images those are."""
    inception: Path | None = None
    """File of Inception's weights, if not the downloaded one."""
    cache: Path = Path("~/.cache/ali_dist/features")
    """Folder of reference statistics and downloaded weights."""
    classifier: Model | None = None
    """Another run's D that says which classes samples show."""
    labels: int = 1_000
    """Labels of a draw, for L2-SVMs; as many of each class as this divided by the classes, rounded down."""
    draws: int = 100
    """Draws of them."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What one metric leaves for another, by name."""

    def each(self, function: Callable[..., R], count: int, *held: Any, unit: str = "images") -> Iterator[R]:
        """`function(*held, chunk)` for the chunks that make up `count` images, in order, with a progress bar.

        Chunks are the blocks of the shards. What is `held` goes to each worker once; networks in it (its members
        `net`) are moved to the GPU of the process that computes, where there is one.
        """
        chunks = [Chunk(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
        progress = Progress(unit)
        for chunk, found in zip(chunks, self.map(_Held(function, held), chunks), strict=True):
            progress(chunk.stop, count)
            yield found


@dataclass(frozen=True, slots=True)
class _Held:
    function: Callable[..., Any]
    held: tuple[Any, ...]

    def __call__(self, chunk: Chunk) -> Any:
        exact_float32()
        for one in self.held:
            if isinstance(getattr(one, "net", None), nn.Module):
                one.net.to(device_kind())
        return self.function(*self.held, chunk)


ALONE = Work()
"""In this process."""
