"""Logistic regression on rows that lie in a file, as more features of more images than memory holds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from ali_dist.evaluate.work import device_kind

ROWS = 4_096  # at a time
ITERATIONS, SLOPE, GAIN = 500, 1e-4, 1e-6  # when a fit ends; the slope is scikit-learn's default
PAIRS = 20  # of steps and slopes that L-BFGS keeps: layers that go together need more than the usual 10


def standardise(x: np.ndarray, *others: np.ndarray) -> None:
    """Gives x, float32 [n, F], features of mean 0 and deviation 1, in place, and does the same to the others."""
    mean = sum(part.sum(0, dtype=np.float64) for part in _parts(x)) / len(x)
    variance = sum(np.square(part - mean).sum(0) for part in _parts(x)) / len(x)
    scale = np.where(variance > 0, np.sqrt(variance), 1)
    for rows in (x, *others):
        for part in _parts(rows):
            part[:] = (part - mean) / scale


def _parts(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[first : first + ROWS] for first in range(0, len(x), ROWS))


class Rows:
    """x float32 [n, F] and classes y int64 [n], a part at a time on the device that computes; kept there if it can."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.device, self.count, self.features = device_kind(), len(x), x.shape[1]
        keep = self.device == "cpu" or x.nbytes < torch.cuda.mem_get_info()[0] / 2  # on a CPU a part is a view
        there = self.device if keep else "cpu"
        self.parts = [
            (part.to(there), labels.to(there))
            for part, labels in zip(torch.from_numpy(x).split(ROWS), torch.from_numpy(y).split(ROWS), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x.to(self.device), y.to(self.device)) for x, y in self.parts)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Weights float64 [K, F + 1], the last column the intercepts; and whether it was not cut short."""

    weights: np.ndarray
    iterations: int
    converged: bool

    def error(self, rows: Rows) -> float:
        """Share of the rows that are given another class than theirs."""
        weights = torch.from_numpy(self.weights).float().to(rows.device)
        return sum((_scores(x, weights).argmax(1) != y).sum().item() for x, y in rows) / rows.count


def fit(
    rows: Rows,
    classes: int,
    decay: float,
    start: np.ndarray | None = None,
    *,
    iterations: int = ITERATIONS,
    slope: float = SLOPE,
    gain: float = GAIN,
    progress: Callable[[int], None] = lambda done: None,
) -> Fitted:
    """The least mean cross-entropy plus decay / 2 times the squared weights, intercepts apart, by L-BFGS on all rows.

    That is scikit-learn's LogisticRegression of C = 1 / (n decay). Products with x are in float32, all else in float64.
    It ends when no slope is larger than `slope`, when an iteration gains less than `gain` of the loss, or after as many
    `iterations`, each of which calls `progress`.
    """
    shape, done = (classes, rows.features + 1), 0

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(shape)
        near = weights.float().to(rows.device)
        total, slopes = 0.0, torch.zeros(shape, dtype=torch.float64, device=rows.device)
        for x, y in rows:
            scores = _scores(x, near).double()
            total += F.cross_entropy(scores, y, reduction="sum").item()
            residual = scores.softmax(1) - F.one_hot(y, classes)
            slopes[:, :-1] += residual.float().T @ x
            slopes[:, -1] += residual.sum(0)
        slopes = slopes.cpu() / rows.count
        slopes[:, :-1] += decay * weights[:, :-1]
        penalty = decay / 2 * weights[:, :-1].square().sum().item()
        return total / rows.count + penalty, slopes.flatten().numpy()

    def after(_: np.ndarray) -> None:
        nonlocal done
        done += 1
        progress(done)

    start = np.zeros(shape) if start is None else start
    options = {"maxiter": iterations, "gtol": slope, "ftol": gain, "maxcor": PAIRS}
    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", callback=after, options=options)
    return Fitted(found.x.reshape(shape), found.nit, found.success)


def _scores(x: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[:, -1], x, weights[:, :-1].T)
