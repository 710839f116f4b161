"""`bench order`: how far the order of training images is from a uniform permutation."""

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ali_dist import cli
from ali_dist.data.index import load_index
from ali_dist.data.stream import order_of
from ali_dist.data.types import BLOCK
from ali_dist.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How far the order of training images is from a uniform permutation, beside real permutations of as many."""

    dataset: str = "tinyimagenet"
    """Prepared data set; no image is read."""
    data: str = ""
    """Folder or address of prepared shards; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    batch_size: int = 0
    """Images of a batch; default: the recipe's."""
    lanes: int = 0
    """Independent streams; default: the recipe's."""
    epochs: int = 4
    """Epochs to look at."""
    json: bool = False
    """Print JSON alone."""

    def run(self) -> None:
        if self.dataset not in RECIPES:
            raise cli.did_you_mean("data set", self.dataset, RECIPES)
        recipe = RECIPES[self.dataset]
        index = load_index(cli.data_folder(self.data), self.dataset)
        batch_size, lanes = self.batch_size or recipe.optim.batch_size, self.lanes or recipe.lanes
        n, rng = index.images("train"), np.random.default_rng(0)
        ours = [order_of(index, "train", seed=recipe.seed, lanes=lanes, epoch=e) for e in range(self.epochs)]
        uniform = [rng.permutation(n) for _ in range(self.epochs)]
        result = {"dataset": self.dataset, "images": n, "batch_size": batch_size, "lanes": lanes, "epochs": self.epochs}
        result |= {"ours": measure(ours, batch_size), "uniform": measure(uniform, batch_size)}
        print(json.dumps(result, indent=1) if self.json else table(result))


def measure(orders: list[np.ndarray], batch_size: int) -> dict[str, float]:
    """Statistics of epochs' orders, each int64 [n] of stored places; all but the first compare with a permutation's."""
    n = len(orders[0])
    whole = n // batch_size * batch_size
    place = np.arange(n)
    block = [order // BLOCK for order in orders]
    batches = [one[:whole].reshape(-1, batch_size) for one in orders]
    return {
        "correlation of position and stored place": float(
            np.mean([abs(np.corrcoef(place, order)[0, 1]) for order in orders])
        ),
        "correlation of an image's positions in two epochs": float(
            np.mean([abs(np.corrcoef(np.argsort(a), np.argsort(b))[0, 1]) for a, b in pairwise(orders)])
        ),
        "distance of stored neighbours, share of an epoch": float(
            np.mean([np.abs(np.diff(np.argsort(order))).mean() / n for order in orders])
        ),
        "different blocks in a batch": float(
            np.mean([len(np.unique(row)) for one in block for row in one[:whole].reshape(-1, batch_size)])
        ),
        "images of a batch that share the next epoch's batch with another of it": float(
            np.mean([_together(a, np.argsort(b) // batch_size) for a, b in zip(batches, orders[1:], strict=False)])
        ),
    }


def _together(batches: np.ndarray, next_batch: np.ndarray) -> float:
    """Share of images whose batch, [batches, size], meets them again in `next_batch` [n]."""
    after = np.sort(next_batch[batches], axis=1)
    same = after[:, 1:] == after[:, :-1]
    met = np.zeros_like(after, bool)
    met[:, 1:] |= same
    met[:, :-1] |= same
    return float(met.mean())


def table(result: dict[str, Any]) -> str:
    lines = [
        "{images:,} images, batches of {batch_size}, {lanes} lanes, {epochs} epochs".format_map(result),
        f"{'':75} {'ours':>9} {'uniform':>9}",
    ]
    lines += [f"{name:75} {ours:>9.4f} {result['uniform'][name]:>9.4f}" for name, ours in result["ours"].items()]
    return "\n".join(lines)
