"""What the study trains: its jobs, each a stack of runs of one model."""

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ali_dist.recipe import UserError, flag
from ali_dist.state import derived_seed
from ali_dist.toy.nets import Precision
from ali_dist.toy.recipe import ToyRun

BETAS = (0.2, 0.8)  # what the authors' 0.8 meant, and what others who repeated it most likely ran
SEARCH = {  # name -> range and scale it is drawn from: the paper says that they were drawn, not from what
    "lr": (1e-5, 1e-3, "log"),
    "beta1": (0.0, 0.9, "linear"),
    "init_std": (0.005, 0.1, "log"),
}
# A decoder is sent to all modes by what it must reconstruct, made steep between them by the pull to the nearest point,
# and given their shares and their shapes by the energy distances; docs/toy.md says how that was found.
BEST = ToyRun(
    model="ali",
    lr=4e-3,
    discriminator_lr=0.25,
    beta1=0.5,
    beginning=0.3,
    lr_final=0.01,
    batch_size=500,
    average_steps=100,
    game=0.2,
    cycle=2.0,
    energy=4.0,
    near_energy=80.0,
    nearest=45.0,
    epochs=40,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How large a study is."""

    recipe: Literal["authors", "best"] = "authors"
    """authors: the whole comparison; best: our own way to train ALI, alone."""
    runs: int = 10
    """Runs of each random search."""
    seeds: int = 10
    """Seeds of each fixed setting and of each learned inference."""
    epochs: int | None = None
    """Epochs of every run; default: 400 of the fixed settings, as in the published comparison, 200 of all others."""
    stack: int = 5
    """Runs trained as one stack, on one CPU core or GPU."""
    train_points: int = 100_000
    """Training points."""
    precision: Precision = "bf16"
    """Arithmetic of the products between hidden layers."""
    seed: int = 0
    """Seed of the study: its random search and the first of its runs' seeds."""

    def __post_init__(self) -> None:
        for name in ("runs", "seeds", "stack", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{flag(name)} must be at least 1, not {value}")
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, not {self.seed}")
        if self.recipe not in ("authors", "best"):
            raise UserError(f"--recipe must be authors or best, not {self.recipe}")
        self.run("ali")  # checks the rest

    def run(self, model: str, seed: int = 0, epochs: int = 200, **changes: Any) -> ToyRun:
        """The authors' run of a model with the plan's sizes."""
        return ToyRun(
            model=model,
            seed=self.seed + seed,
            epochs=self.epochs or epochs,
            train_points=self.train_points,
            precision=self.precision,
            **changes,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A stack's name and its runs by name; `decoder_of` is the run whose decoder they learn an encoder for."""

    name: str
    runs: dict[str, ToyRun]
    decoder_of: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Job":
        return cls(tree["name"], {name: ToyRun(**run) for name, run in tree["runs"].items()}, tree["decoder_of"])


def first_jobs(plan: Plan) -> list[Job]:
    """All that can be trained at once: everything but what needs the search's best runs."""
    if plan.recipe == "best":
        runs = [
            replace(
                BEST,
                seed=plan.seed + seed,
                epochs=plan.epochs or BEST.epochs,
                train_points=plan.train_points,
                precision=plan.precision,
            )
            for seed in range(plan.seeds)
        ]
        return list(stacks("best-ali", runs, plan.stack))
    jobs = [
        job for model in ("ali", "gan") for job in stacks(f"search-{model}", list(searched(plan, model)), plan.stack)
    ]
    for beta1 in BETAS:
        runs = [plan.run("ali", seed, 400, beta1=beta1) for seed in range(plan.seeds)]
        jobs += stacks(f"fixed-{beta1}", runs, plan.stack)
    return jobs + list(stacks("vae", [plan.run("vae", seed) for seed in range(plan.seeds)], plan.stack))


def second_jobs(plan: Plan, best_gan: str) -> list[Job]:
    """Inference learned for the decoder of the run `best_gan`."""
    return [
        job
        for model in ("inverse", "posthoc")
        for job in stacks(model, [plan.run(model, seed) for seed in range(plan.seeds)], plan.stack, best_gan)
    ]


def searched(plan: Plan, model: str) -> Iterator[ToyRun]:
    """The runs of a random search; the n-th does not depend on how many there are."""
    for number in range(plan.runs):
        chance = random.Random(derived_seed(plan.seed, "search", model, number))
        drawn = {}
        for name, (low, high, scale) in SEARCH.items():
            if scale == "log":
                drawn[name] = math.exp(chance.uniform(math.log(low), math.log(high)))
            else:
                drawn[name] = chance.uniform(low, high)
        yield plan.run(model, number, **drawn)


def stacks(name: str, runs: list[ToyRun], size: int, decoder_of: str | None = None) -> Iterator[Job]:
    for start in range(0, len(runs), size):
        named = {f"{name}-{start + i:02d}": run for i, run in enumerate(runs[start : start + size])}
        yield Job(f"{name}-{start:02d}", named, decoder_of)
