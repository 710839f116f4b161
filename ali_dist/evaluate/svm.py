"""L2-SVMs on the encoder's features from few labels (arXiv:1606.00704, section 4.3, table 1)."""

import itertools
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from ali_dist.data.index import Index, held_out_split
from ali_dist.data.labelled import balanced_draw
from ali_dist.data.progress import Progress
from ali_dist.evaluate.data import check_classes, check_unconditional, layers
from ali_dist.evaluate.work import ALONE, Work
from ali_dist.model import Features, Model
from ali_dist.published import SVM
from ali_dist.recipe import UserError
from ali_dist.recipes import SEMI_SUPERVISED

HELD_OUT = 10_000
GRID = np.exp(np.linspace(-20, 20, 50))  # of C, the authors'
ROWS = 4_096  # test rows scored at a time

log = logging.getLogger(__name__)


class Svm:
    """An L2-SVM, one against the rest, fitted in the span of its rows: the same as on the features themselves.

    Its weights are combinations of the n rows, so n coordinates that keep all products between rows say as much as
    thousands of features.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        """x float32 [n, F], y int [n]."""
        self.x, self.y = x.astype(np.float64), y
        values, vectors = np.linalg.eigh(self.x @ self.x.T)
        kept = values > values[-1] * 1e-12
        self.roots, self.vectors = np.sqrt(values[kept]), vectors[:, kept]

    def fit(self, c: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights [F, K], intercepts [K] and the classes [K]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the grid's largest values need not converge
            svm = LinearSVC(C=c, dual="auto", random_state=0).fit(self.vectors * self.roots, self.y)
        weights = self.x.T @ (self.vectors / self.roots) @ svm.coef_.T
        return weights.astype(np.float32), svm.intercept_.astype(np.float32), svm.classes_


def error(x: np.ndarray, y: np.ndarray, fitted: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Share of the rows of x [n, F] that are given another class than y."""
    weights, intercepts, classes = fitted
    wrong = 0
    for first in range(0, len(y), ROWS):
        scores = x[first : first + ROWS] @ weights + intercepts
        found = classes[(scores[:, 0] > 0).astype(int) if len(classes) == 2 else scores.argmax(1)]
        wrong += int((found != y[first : first + ROWS]).sum())
    return wrong / len(y)


def labelled_split(index: Index) -> str:
    """The official training images: the split from which semi-supervised training draws its labels too.

    On SVHN that is `valid`, as `train` holds the extra images there.
    """
    known = SEMI_SUPERVISED.get(index.name)
    return known.train_split if known else "train"


def folds(
    model: Model, index: Index, kind: Features, folder: Path, work: Work
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features and labels for drawing, for choosing C and for testing.

    C is chosen on a `valid` that is neither drawn from nor tested on, else on the last of the images to draw from, at
    most a fifth of them: on SVHN the last 10,000 official training images, as in the paper.
    """
    split, test = labelled_split(index), held_out_split(index)
    x, y = layers(model, index, split, kind, folder, work)
    if "valid" not in (split, test):
        yield from ((x, y), layers(model, index, "valid", kind, folder, work))
    else:
        held_out = min(HELD_OUT, len(y) // 5)
        yield from ((x[:-held_out], y[:-held_out]), (x[-held_out:], y[-held_out:]))
    yield layers(model, index, test, kind, folder, work)


def svm(
    model: Model,
    index: Index,
    work: Work = ALONE,
    *,
    kind: Features = "script",
    grid: np.ndarray = GRID,
) -> dict[str, Any]:
    """Mean and deviation of the test error over `work.draws` balanced draws of `work.labels`; see `Model.features`.

    Of the grid's values of C the one is taken that errs least on up to 10,000 held-out images, fitted to the first
    draw. UserError for fewer labels than classes.
    """
    check_classes(index)
    check_unconditional(model)
    draws, per_class = work.draws, work.labels // len(index.classes)
    if not per_class:
        raise UserError(
            f"--labels {work.labels} is fewer than the {len(index.classes)} classes of data set {index.name}: give more"
        )
    progress, fits = Progress("fits"), itertools.count(1)

    def fit(one: Svm, c: float, *rows: np.ndarray) -> float:
        found = error(*rows, one.fit(c))
        progress(next(fits), len(grid) + draws)
        return found

    with tempfile.TemporaryDirectory() as folder:
        (x, y), (held_x, held_y), (test_x, test_y) = folds(model, index, kind, Path(folder), work)
        held_x, held_y = held_x[:HELD_OUT], held_y[:HELD_OUT]
        if len(held_y) < HELD_OUT:
            log.warning(f"C is chosen on {len(held_y)} held-out images, {index.name} has no {HELD_OUT} to spare")
        drawn = [balanced_draw(y, per_class, seed) for seed in range(draws)]
        first = Svm(x[drawn[0]], y[drawn[0]])
        tried = [fit(first, c, held_x, held_y) for c in grid]
        c = grid[int(np.argmin(tried))]
        errors = [fit(Svm(x[rows], y[rows]), c, test_x, test_y) for rows in drawn]
    return {
        "error": float(np.mean(errors)),
        "error_std": float(np.std(errors, ddof=1)) if draws > 1 else 0.0,
        "features": kind,
        "feature_count": first.x.shape[1],
        "labels": per_class * len(index.classes),
        "labels_from": labelled_split(index),
        "draws": draws,
        "seed": 0,
        "C": float(c),
        "held_out_error": min(tried),
        "held_out_images": len(held_y),
        "split": held_out_split(index),
        "test_images": len(test_y),
        "published_error_percent": list(SVM.get(index.name, ())),
    }
