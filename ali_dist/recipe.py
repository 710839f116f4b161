"""What a run is: one frozen, typed tree. Nothing below the command line reads argv or the environment."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(Exception):
    """A mistake in what the user gave: commands print its one line and exit with code 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    """Adam for the discriminator and for encoder + decoder alike (arXiv:1606.00704, appendix A)."""

    lr: float = 1e-4
    """Adam's learning rate."""
    beta1: float = 0.5
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment (the paper prints 1e-3: its framework's 1 - beta2)."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    batch_size: int = 100
    """Images per update, over all workers."""
    accumulate: int = 1
    """Micro-batches per update; batch norm sees one micro-batch at a time."""
    ema_half_life: int = 500_000
    """Images after which an old weight counts half in the averaged weights; at most 5 % of the images seen so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When things happen, all in images seen by the whole job. These may change when a run continues."""

    num_images: int
    """Images to train for."""
    tick_images: int = 10_000
    """Images between status lines."""
    save_images: int = 100_000
    """Images between checkpoints."""
    keep: int = 3
    """Checkpoints kept; older ones are deleted."""
    sample_images: int = 100_000
    """Images between sample and reconstruction grids."""
    validate_images: int = 100_000
    """Images between passes over the validation sample."""
    validate_count: int = 5_000
    """Validation images a pass reads (the authors' 5,000)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All that decides a run's trajectory, and its schedule."""

    dataset: str
    """Data set, as prepared by `python -m ali_dist.prepare`."""
    networks: str
    """Networks: a name in ali_dist.tables.NETWORKS."""
    optim: Optim
    schedule: Schedule
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of convolutions and products: float32, or bfloat16 by autocast."""
    lanes: int = 24
    """Independent data streams, dealt over the workers; the order of images depends on it, not on the workers."""
    seed: int = 0
    """Seed of the weights, the data order, noise and dropout."""
    train_embedding: bool = False
    """Train the embedding of y in conditional networks with L_G; the authors' is a fixed random projection."""

    def __post_init__(self) -> None:
        optim, schedule = self.optim, self.schedule
        positive = {
            **{name: getattr(optim, name) for name in ("lr", "adam_eps", "batch_size", "accumulate", "ema_half_life")},
            **{f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule)},
            "lanes": self.lanes,
        }
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{flag(name)} must be positive, not {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(optim, name) < 1:
                raise UserError(f"{flag(name)} must be at least 0 and below 1, not {getattr(optim, name)}")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"--precision must be fp32 or bf16, not {self.precision}")
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, not {self.seed}")
        if optim.batch_size % optim.accumulate:
            raise UserError(
                f"--batch-size {optim.batch_size} is not a multiple of --accumulate {optim.accumulate}: "
                "every micro-batch must have the same size"
            )

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass, over all workers."""
        return self.optim.batch_size // self.optim.accumulate

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Recipe":
        """The inverse of `to_json`; UserError when fields are missing or unknown."""
        try:
            parts = {"optim": Optim(**tree["optim"]), "schedule": Schedule(**tree["schedule"])}
            return cls(**{**tree, **parts})
        except (KeyError, TypeError) as error:
            raise UserError(f"not a recipe of this version: {error}") from error

    def differences(self, other: "Recipe") -> list[str]:
        """Lines 'flag: mine -> theirs' for all that changes the trajectory, the schedule left out."""

        def flat(recipe: Recipe) -> dict[str, Any]:
            tree = recipe.to_json()
            del tree["schedule"]
            return {**{k: v for k, v in tree.items() if k != "optim"}, **tree["optim"]}

        mine, theirs = flat(self), flat(other)
        return [f"{flag(k)}: {mine[k]} -> {theirs[k]}" for k in mine if mine[k] != theirs[k]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Where and on what a recipe runs: none of it changes the result beyond rounding."""

    name: str | None = None
    """Name of the run, and of its folder below --storage; default: the data set's, and -conditional."""
    data: str = field(default="")
    """Folder of prepared shards; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    storage: str = "runs"
    """Folder of runs; on a cluster, one that every node sees."""
    resume: Literal["auto", "never"] = "auto"
    """auto: a run of this name continues; never: it is an error if one exists."""
    num_workers: int = 1
    """Workers (Ray actors), one process each."""
    gpu: bool | None = None
    """One GPU a worker; default: when the cluster has any."""
    cpus_per_worker: int = 0
    """CPU cores a worker; default: the cluster's cores shared out evenly."""
    impl: Literal["auto", "ref", "triton"] = "auto"
    """Fused kernels: auto (Triton on GPUs, plain PyTorch on CPUs), ref (plain PyTorch) or triton."""
    max_failures: int = 3
    """Worker failures to recover from before giving up."""
    wait_seconds: int = 60
    """Seconds to wait for the cluster to have room for all workers."""


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")
