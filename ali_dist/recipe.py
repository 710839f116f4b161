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
    save_images: int | None = None
    """Images between checkpoints; default: what loses least time at the measured speed and time to save (Daly's
    interval), an hour at most."""
    keep: int = 3
    """Checkpoints kept; older ones are deleted."""
    sample_images: int = 100_000
    """Images between sample and reconstruction grids."""
    validate_images: int = 100_000
    """Images between passes over the validation sample."""
    validate_count: int = 5_000
    """Validation images a pass reads (the authors' 5,000)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Semi:
    """Semi-supervised training: D tells K classes of data and "generated" apart (arXiv:1606.00704, section 4.4)."""

    labels: int = 0
    """Training images whose class is known, as many of each class, drawn by the seed; 0: none, D has one logit."""
    labelled_batch: int = 50
    """Images of each batch that come with their class; the others are drawn from all training images."""
    feature_matching: bool = False
    """Train encoder and decoder to match D's mean features (Salimans et al., 2016) instead of to win the game."""
    supervised_only: bool = False
    """Train D alone as a classifier of the labelled images: what the semi-supervised result is compared with."""

    @property
    def name(self) -> str:
        """What distinguishes the runs of a data set, for their names."""
        kind = {self.feature_matching: "-matching", self.supervised_only: "-supervised"}.get(True, "")
        return f"{self.labels}-labels{kind}"


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
    flips: bool = False
    """Mirror each training image left to right with probability 1/2 (the paper does not)."""
    lanes: int = 24
    """Independent data streams, dealt over the workers; the order of images depends on it, not on the workers."""
    seed: int = 0
    """Seed of the weights, the data order, noise and dropout."""
    train_split: str = "train"
    """Split of the data set to train on."""
    semi: Semi = field(default_factory=Semi)
    embedding_std: float = 0.01
    """Standard deviation of the weights that embed y in conditional networks (the authors' 0.01)."""
    train_embedding: bool = False
    """Train the embedding of y in conditional networks with L_G; the authors' is a fixed random projection."""
    max_sigma: float | None = None
    """Bound of q(z|x)'s standard deviations; default: none, as the authors'. It keeps them from overflowing D."""

    def __post_init__(self) -> None:
        optim, schedule = self.optim, self.schedule
        positive = {
            **{name: getattr(optim, name) for name in ("lr", "adam_eps", "batch_size", "accumulate", "ema_half_life")},
            **{name: value for name, value in dataclasses.asdict(schedule).items() if value is not None},
            "lanes": self.lanes,
            "embedding_std": self.embedding_std,
            **({} if self.max_sigma is None else {"max_sigma": self.max_sigma}),
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

        self._check_semi()

    def _check_semi(self) -> None:
        semi, optim = self.semi, self.optim
        if semi.labels < 0:
            raise UserError(f"--labels must not be negative, not {semi.labels}")
        if not semi.labels and (semi.feature_matching or semi.supervised_only):
            raise UserError("--feature-matching and --supervised-only are for semi-supervised training: give --labels")
        if semi.feature_matching and semi.supervised_only:
            raise UserError("--feature-matching and --supervised-only exclude each other")
        labelled = 0 if semi.supervised_only or not semi.labels else semi.labelled_batch
        if semi.labels and not semi.supervised_only and not 0 < labelled < optim.batch_size:
            raise UserError(f"--labelled-batch must be positive and below --batch-size, not {labelled}")
        if labelled % optim.accumulate:
            raise UserError(f"--labelled-batch {labelled} is not a multiple of --accumulate {optim.accumulate}")

    @property
    def valid_split(self) -> str:
        """Split that validation and figures take images from: one that is not trained on."""
        return "train" if self.train_split == "valid" else "valid"

    @property
    def labelled_share(self) -> float:
        """Share of each batch that comes with its class."""
        if not self.semi.labels:
            return 0.0
        return 1.0 if self.semi.supervised_only else self.semi.labelled_batch / self.optim.batch_size

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass, over all workers."""
        return self.optim.batch_size // self.optim.accumulate

    @property
    def streamed(self) -> int:
        """Those of them that come from the stream: all but the labelled ones."""
        return self.micro_batch - round(self.micro_batch * self.labelled_share)

    def why_not_static(self, workers: int) -> str:
        """Why updates of so many workers can't go through buffers of fixed shape; empty when they can."""
        if self.semi.supervised_only:
            return "--supervised-only has none"
        if self.streamed % workers or self.lanes % workers:
            return (
                f"{self.streamed} streamed images a batch and --lanes {self.lanes} are no multiples of "
                f"{workers} workers"
            )
        return ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Recipe":
        """The inverse of `to_json`; UserError when fields are missing or unknown."""
        try:
            parts = {"optim": Optim(**tree["optim"]), "schedule": Schedule(**tree["schedule"])}
            parts["semi"] = Semi(**tree.get("semi", {}))  # runs of earlier versions have none
            return cls(**{**tree, **parts})
        except (KeyError, TypeError, OverflowError) as error:
            raise UserError(f"not a recipe of this version: {error}") from error

    def differences(self, other: "Recipe") -> list[str]:
        """Lines 'flag: mine -> theirs' for all that changes the trajectory, the schedule left out."""

        def flat(recipe: Recipe) -> dict[str, Any]:
            tree = recipe.to_json()
            del tree["schedule"]
            return {**{k: v for k, v in tree.items() if k not in ("optim", "semi")}, **tree["optim"], **tree["semi"]}

        mine, theirs = flat(self), flat(other)
        return [f"{flag(k)}: {mine[k]} -> {theirs[k]}" for k in mine if mine[k] != theirs[k]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Where and on what a recipe runs: none of it changes the result beyond rounding."""

    name: str | None = None
    """Name of the run, and of its folder below --storage; default: the data set's, with -conditional or the labels."""
    data: str = field(default="")
    """Folder of prepared shards, or its http, https, s3 or gs address; default: $ALI_DIST_DATA or ~/.cache/ali_dist."""
    cache: str = ""
    """Folder on each host that keeps what its workers read from an address; default: nothing is kept."""
    cache_gb: float = 100.0
    """Bound of --cache in 10^9 bytes; what does not fit is read from the address each time."""
    on_bad_shard: Literal["error", "skip"] = "error"
    """What a damaged or missing shard does: stop, or be replaced by images of other shards, counted and named."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """What a NaN or infinite loss or gradient does: stop, or go back to the last checkpoint and, there on, leave out
    the batch that did it (at most 10 times a run)."""
    storage: str = "runs"
    """Folder of runs, on a cluster one that every node sees; or an s3 or gs address, of which hosts have copies."""
    resume: Literal["auto", "never"] = "auto"
    """auto: a run of this name continues; never: it is an error if one exists."""
    num_workers: int = 1
    """Workers (Ray actors), one process each; 2:8 stands for --min-workers 2 --num-workers 8."""
    min_workers: int = 0
    """Workers that are enough to begin or go on with, while there is no room for --num-workers; default: all."""
    repeats: int = 1
    """Repeats of a semi-supervised run with the next seeds, in parallel, one worker each; then their mean error."""
    gpu: bool | None = None
    """One GPU a worker; default: when the cluster has any."""
    cpus_per_worker: int = 0
    """CPU cores a worker; default: what all workers find on the nodes, with a GPU at most its share of the node's."""
    impl: Literal["auto", "ref", "triton"] = "auto"
    """Fused kernels: auto (Triton on GPUs, plain PyTorch on CPUs), ref (plain PyTorch) or triton."""
    fast: bool = True
    """All that speeds an update up and changes rounding alone, above all one CUDA graph an update on a GPU."""
    bf16_gradients: bool = False
    """Workers exchange gradients rounded to bfloat16: half the bytes, for slow networks."""
    max_failures: int = 3
    """Failures of workers to recover from, without a new checkpoint between them, before giving up."""
    wait_seconds: int = 60
    """Seconds to wait for the cluster to have room for all workers."""


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")
