"""What one toy run is, and the authors' settings."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ali_dist.cli import did_you_mean
from ali_dist.recipe import UserError, flag
from ali_dist.toy.data import NUM_TRAIN
from ali_dist.toy.nets import Precision
from ali_dist.toy.tables import MODELS

OWN = ("seed", "lr", "discriminator_lr", "beta1", "init_std")  # what may differ between the runs of one stack

TERMS = ("cycle", "energy", "near_energy", "nearest")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyRun:
    """All that decides a run's trajectory; the defaults are the authors' (ali_mixture.py)."""

    model: str
    """Model: a name in ali_dist.toy.tables.MODELS."""
    seed: int = 0
    """Seed of the weights, the order of the data and all noise."""
    lr: float = 1e-4
    """Adam's learning rate; beta2 is 0.999, epsilon 1e-8."""
    discriminator_lr: float = 1.0
    """The discriminator's learning rate over that of encoder and decoder."""
    beta1: float = 0.2
    """Adam's decay of the first moment: the authors' "0.8", in a framework whose beta1 was 1 - beta1."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    epochs: int = 200
    """Passes over the training points."""
    batch_size: int = 100
    """Points per update."""
    train_points: int = 100_000
    """Training points, the first of the data set's 100,000."""
    precision: Precision = "fp32"
    """Arithmetic of the products between hidden layers: float32, or bfloat16 (everything else stays float32)."""
    beginning: float = 0.5
    """Share of the epochs before the learning rate begins to fall."""
    lr_final: float = 1.0
    """Learning rate at the end over that at the start; falls along half a cosine after the beginning."""
    average_steps: int = 0
    """Half-life of the averaged weights in updates; 0: the last weights are the result."""
    game: float = 1.0
    """Weight of L_G itself in the loss of ALI's encoder and decoder, where one of the next four is not 0."""
    cycle: float = 0.0
    """Weight of a reconstruction's squared error there."""
    energy: float = 0.0
    """Weight there of the energy distance between the two joints."""
    near_energy: float = 0.0
    """Weight there of samples' energy distance to training points, near pairs counting more; rises to the end."""
    nearest: float = 0.0
    """Weight there of samples' distance to training points' reach; rises from 0 in the beginning."""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise did_you_mean("model", self.model, MODELS)
        for name in ("lr", "init_std", "epochs", "batch_size", "train_points", "lr_final", "discriminator_lr", "game"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{flag(name)} must be positive, not {value}")
        for name in TERMS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{flag(name)} must not be negative, not {value}")
            if value and self.model != "ali":
                raise UserError(f"{flag(name)} is for ali alone, not for {self.model}")
        if not 0 < self.beginning < 1:
            raise UserError(f"--beginning must be between 0 and 1, not {self.beginning}")
        if not 0 <= self.beta1 < 1:
            raise UserError(f"--beta1 must be at least 0 and below 1, not {self.beta1}")
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, not {self.seed}")
        if self.train_points > NUM_TRAIN:
            raise UserError(f"--train-points must be at most {NUM_TRAIN}, not {self.train_points}")
        if self.train_points % self.batch_size:
            raise UserError(f"--train-points {self.train_points} is not a multiple of the batch size {self.batch_size}")

    @property
    def steps(self) -> int:
        """Updates in an epoch."""
        return self.train_points // self.batch_size

    def shared(self) -> dict[str, Any]:
        """What all runs of a stack must have in common."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in OWN}

    def near_energy_at(self, epoch: float) -> float:
        """Weight of the term after `epoch` epochs: rises in a line, to the end."""
        return self.near_energy * epoch / self.epochs

    def nearest_at(self, epoch: float) -> float:
        """Weight of the term after `epoch` epochs: rises in a line, over the beginning."""
        return self.nearest * min(1.0, epoch / (self.beginning * self.epochs))

    def lr_at(self, epoch: float) -> float:
        start = self.beginning * self.epochs
        done = max(0.0, (epoch - start) / (self.epochs - start))
        return self.lr * (self.lr_final + (1 - self.lr_final) * (1 + math.cos(math.pi * done)) / 2)


def check_stack(runs: Sequence[ToyRun]) -> None:
    """ValueError unless the runs can be trained as one stack."""
    if not runs or any(run.shared() != runs[0].shared() for run in runs):
        raise ValueError(f"the runs of a stack may differ in {', '.join(OWN)} only, and there must be some")
