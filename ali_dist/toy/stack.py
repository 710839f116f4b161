"""A stack: several runs of one model trained as one, resumable, its randomness a function of (seed, epoch) alone."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ali_dist.recipe import UserError
from ali_dist.run import write_json
from ali_dist.state import derived_seed
from ali_dist.toy.data import train_points
from ali_dist.toy.models import STEPS, Batch, Networks, Terms
from ali_dist.toy.nets import Weights, initial
from ali_dist.toy.recipe import TERMS, ToyRun, check_stack
from ali_dist.toy.tables import MODELS, Z_DIM

AVERAGE_EVERY = 10  # updates
POINTS = 1_000  # training points, of those that come next, that samples are held against


class Stack:
    """The weights of R runs, their Adam moments and averages, after `epoch` epochs.

    A run's trajectory does not depend on the stack it is in, beyond rounding. `decoder` is a stack's decoder with its
    population statistics, for the models that learn an encoder for a decoder that stays.
    """

    def __init__(self, runs: Sequence[ToyRun], device: torch.device, decoder: Weights | None = None) -> None:
        check_stack(runs)
        self.runs, self.device, self.epoch, self.seconds = tuple(runs), device, 0, 0.0
        self.recipe = runs[0]
        singles = [initial_weights(run) for run in runs]
        self.weights = {name: torch.stack([w[name] for w in singles]).to(device) for name in singles[0]}
        self.averaged = {name: t.clone() for name, t in self.weights.items()} if self.recipe.average_steps else {}
        for tensor in self.weights.values():
            tensor.requires_grad_()
        frozen = {name: t.to(device) for name, t in (decoder or {}).items()}
        self.nets = Networks(self.recipe.model, frozen | self.weights, self.recipe.precision)
        self.views = [{name: t.detach()[r] for name, t in self.weights.items()} for r in range(len(runs))]
        # Fused Adam takes one learning rate a group, so a group is one run's views into the stacked weights.
        self.groups = [
            (run, adversary, group)
            for run, views in zip(runs, self.views, strict=True)
            for adversary in (True, False)
            if (group := [view for name, view in views.items() if name.startswith("discriminator.") == adversary])
        ]
        self.adam = torch.optim.Adam(
            [{"params": group, "betas": (run.beta1, 0.999)} for run, _, group in self.groups], eps=1e-8, fused=True
        )
        self.set_learning_rates()
        self.x = train_points()[: self.recipe.train_points].to(device)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of every run; the losses, [R] each."""
        gradients = STEPS[self.recipe.model](self.nets, batch)
        for r, views in enumerate(self.views):
            for name, view in views.items():
                view.grad = gradients.of[name][r]
        self.adam.step()
        return gradients.losses

    def set_learning_rates(self) -> None:
        for (run, adversary, _), group in zip(self.groups, self.adam.param_groups, strict=True):
            group["lr"] = run.lr_at(self.epoch) * (run.discriminator_lr if adversary else 1)

    def batches(self) -> Callable[[int], Batch]:
        """This epoch's batches by number, drawn at once: the same for a run in whatever stack, on whatever device."""
        recipe = self.recipe
        order, noise = [], []
        for run in self.runs:
            generator = torch.Generator().manual_seed(derived_seed(run.seed, run.model, "epoch", self.epoch))
            order.append(torch.randperm(recipe.train_points, generator=generator))
            noise.append(torch.randn(2, recipe.train_points, Z_DIM, generator=generator))
        x = self.x[torch.stack(order).to(self.device)]
        z, eps = torch.stack(noise, 1).to(self.device)

        def batch(number: int) -> Batch:
            rows = slice(number * recipe.batch_size, (number + 1) * recipe.batch_size)
            return Batch(x[:, rows], z[:, rows], eps[:, rows], self.terms(x, number))

        return batch

    def terms(self, x: Tensor, number: int) -> Terms | None:
        """What the recipe adds to L_G at this epoch's update `number`; x [R, N, 2] is the epoch's order of points."""
        recipe = self.recipe
        if not any(getattr(recipe, name) for name in TERMS):
            return None
        rows = torch.arange(POINTS, device=self.device) + number * recipe.batch_size
        epoch, points = self.epoch + number / recipe.steps, x[:, rows % recipe.train_points]
        rising = recipe.near_energy_at(epoch), recipe.nearest_at(epoch)
        return Terms(recipe.game, recipe.cycle, recipe.energy, *rising, points)

    def train_epoch(self) -> dict[str, Tensor]:
        """One pass over the training points; the mean losses, [R] each."""
        started = time.perf_counter()
        self.set_learning_rates()
        batch, sums = self.batches(), {}
        for number in range(self.recipe.steps):
            losses = self.step(batch(number))
            sums = {name: sums.get(name, 0) + loss for name, loss in losses.items()}
            if self.averaged and number % AVERAGE_EVERY == 0:
                self.average_weights(self.epoch * self.recipe.steps + number)
        means = {name: (total / self.recipe.steps).cpu() for name, total in sums.items()}
        self.epoch += 1
        self.seconds += time.perf_counter() - started
        return means

    @torch.no_grad()
    def average_weights(self, updates: int) -> None:
        """Moves the averages towards the weights; early on they reach back no further than a twentieth of the run."""
        half_life = min(self.recipe.average_steps, 0.05 * updates)
        share = 1 - 0.5 ** (AVERAGE_EVERY / half_life) if half_life else 1.0
        torch._foreach_lerp_(list(self.averaged.values()), list(self.weights.values()), share)

    def result(self) -> Weights:
        """The weights that count: averaged ones if the recipe averages, with statistics and the decoder that stay."""
        kept = {name: t for name, t in self.nets.weights.items() if name not in self.weights}
        return {name: t.detach() for name, t in (kept | (self.averaged or self.weights)).items()}

    def save(self, folder: Path) -> None:
        """Writes `folder`/state-EPOCH whole or not at all, then deletes older ones."""
        final = folder / f"state-{self.epoch:06d}"
        partial = folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {f"weights.{name}": t.detach() for name, t in self.weights.items()}
        tensors |= {f"averaged.{name}": t for name, t in self.averaged.items()}
        for name in self.weights:
            states = [self.adam.state[views[name]] for views in self.views]
            tensors |= {f"adam.{name}.{key}": torch.stack([s[key] for s in states]) for key in states[0]}
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial / "state.safetensors")
        meta = {"epoch": self.epoch, "seconds": self.seconds, "runs": [dataclasses.asdict(run) for run in self.runs]}
        write_json(partial / "state.json", meta)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        for old in saved(folder)[:-1]:
            shutil.rmtree(old)

    def load(self, folder: Path) -> bool:
        """Continues from the newest state in `folder`, if there is one; UserError when it is of other runs."""
        states = saved(folder)
        if not states:
            return False
        meta: dict[str, Any] = json.loads((states[-1] / "state.json").read_text())
        if [ToyRun(**run) for run in meta["runs"]] != list(self.runs):
            raise UserError(f"{states[-1]} is of other runs: choose another --out")
        tensors = load_file(states[-1] / "state.safetensors")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weights.{name}"])
            for name, average in self.averaged.items():
                average.copy_(tensors[f"averaged.{name}"])
        for r, views in enumerate(self.views):
            for name, view in views.items():
                moments = {key: tensors[f"adam.{name}.{key}"][r] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.adam.state[view] = {key: t.clone().to(self.device) for key, t in moments.items()}
        self.epoch, self.seconds = meta["epoch"], meta["seconds"]
        return True


def initial_weights(run: ToyRun) -> Weights:
    """One run's weights before the first update."""
    generator = torch.Generator().manual_seed(derived_seed(run.seed, run.model, "weights"))
    weights: Weights = {}
    for name, network in MODELS[run.model].items():
        weights |= initial(name, network, run.init_std, generator)
    return weights


def saved(folder: Path) -> list[Path]:
    """The states in a stack's folder, oldest first."""
    return sorted(folder.glob("state-[0-9]*"))
