"""The ways to make one update of ALI that `bench step` times, each as a class with a `step` method.

All start from a uint8 batch, draw their own noise, and end with both of Adam's updates.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from ali_dist.bench.plain import PlainALI
from ali_dist.data.stream import Batch
from ali_dist.fast import updates_of
from ali_dist.levers import FAST, PLAIN, Levers
from ali_dist.losses import per_image_losses
from ali_dist.meter import Meter
from ali_dist.recipe import Recipe
from ali_dist.state import TrainState
from ali_dist.step import to_unit_range
from ali_dist.tables import NETWORKS, Networks


def without_dropout(nets: Networks) -> Networks:
    """The same networks, so that all ways can be held against each other."""
    parts = ("discriminator_x", "discriminator_z", "discriminator_joint")
    return replace(nets, **{name: tuple(replace(row, dropout=0.0) for row in getattr(nets, name)) for name in parts})


class Ours:
    """ali_dist's own updates, with their averaged weights, measures and checks."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.update = updates_of(state, Meter(state.device))

    def step(self, batch: Batch) -> None:
        self.update([batch])

    def loss(self) -> float:
        """Mean L_D of the updates so far; NonFinite when one was not finite."""
        self.update.settle()
        self.state.finite.check(range(self.state.num_images))
        return self.update.meter.collect()["loss/d"]

    @property
    def failure(self) -> str:
        """Why there is no CUDA graph though one was asked for."""
        return getattr(self.update, "failure", "")


class Plain:
    """What the ways in plain PyTorch share: networks with the weights of `state`, and two Adams."""

    def __init__(self, state: TrainState, nets: Networks, bf16: bool, compiled: str | None = None) -> None:
        self.model, self.device, self.bf16 = PlainALI(nets).load(state.model.state_dict()), state.device, bf16
        layout = torch.channels_last if bf16 else torch.contiguous_format
        self.model.to(device=self.device, memory_format=layout).train()
        self.discriminator = list(self.model.discriminator.parameters())
        self.generator = [*self.model.encoder.parameters(), *self.model.decoder.parameters()]
        optim = state.recipe.optim
        adam = partial(torch.optim.Adam, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.adam_eps)
        self.optimizers = adam(self.discriminator), adam(self.generator)
        self.run = self.losses if compiled is None else torch.compile(self.losses, mode=compiled)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x in [0, 1], z and eps."""
        x = to_unit_range(batch.x, self.device)
        return x if self.bf16 else x.contiguous(), *torch.randn(
            2, len(x), self.model.nets.latent, device=self.device
        ).unbind()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def losses(self, x: Tensor, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def step(self, batch: Batch) -> None:
        raise NotImplementedError


class Joint(Plain):
    """The paper's step: one pass of D over both joints, both gradients, both updates together."""

    def losses(self, x: Tensor, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """L_D and L_G, means over the batch."""
        with self.autocast():
            z_hat, x_tilde = self.model.generate(x, z, eps)
            logits = self.model.score(torch.cat([x, x_tilde]), torch.cat([z_hat, z]))
        loss_d, loss_g = per_image_losses(*logits.chunk(2))
        return loss_d.mean(), loss_g.mean()

    def backward(self, loss_d: Tensor, loss_g: Tensor) -> None:
        self.model.zero_grad(set_to_none=True)
        loss_d.backward(inputs=self.discriminator, retain_graph=True)
        loss_g.backward(inputs=self.generator)

    def step(self, batch: Batch) -> None:
        torch.compiler.cudagraph_mark_step_begin()  # of what torch.compile may have made graphs of
        self.backward(*self.run(*self.draw(batch)))
        for optimizer in self.optimizers:
            optimizer.step()


class Separate(Plain):
    """The usual public way: an update of D with detached codes and images, then D again for G's update.

    D sees data and samples in separate passes, so with batch norm in D its losses are another function.
    """

    def losses(self, x: Tensor, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """L_D and L_G of D as it is, means over the batch."""
        with self.autocast():
            z_hat, x_tilde = self.model.generate(x, z, eps)
            loss_d, _ = per_image_losses(self.model.score(x, z_hat.detach()), self.model.score(x_tilde.detach(), z))
            _, loss_g = per_image_losses(self.model.score(x, z_hat), self.model.score(x_tilde, z))
        return loss_d.mean(), loss_g.mean()

    def step(self, batch: Batch) -> None:
        x, z, eps = self.draw(batch)
        update_d, update_g = self.optimizers
        with self.autocast():
            z_hat, x_tilde = self.model.generate(x, z, eps)
            loss_d, _ = per_image_losses(self.model.score(x, z_hat.detach()), self.model.score(x_tilde.detach(), z))
        update_d.zero_grad()
        loss_d.mean().backward()
        update_d.step()
        with self.autocast():
            _, loss_g = per_image_losses(self.model.score(x, z_hat), self.model.score(x_tilde, z))
        update_g.zero_grad()
        loss_g.mean().backward()
        update_g.step()


def lever_sets(device: torch.device) -> dict[str, Levers]:
    """Name -> levers: none, each by itself (on a GPU also in a graph, without which some do nothing), all of them."""
    names, gpu = [field.name for field in fields(Levers)], device.type == "cuda"
    alone = names if gpu else ["one_sweep", "stacked_seeds"]
    sets = {"none": PLAIN} | {name: replace(PLAIN, **{name: True}) for name in alone}
    if gpu:
        others = [name for name in names if name != "graph"]
        sets |= {f"graph, {name}": replace(PLAIN, graph=True, **{name: True}) for name in others}
        sets["all"] = Levers(**dict.fromkeys(names, True))
    return sets


def ways(recipe: Recipe, device: torch.device, compiled: bool, levers: bool) -> dict[str, Callable[[], Ours | Plain]]:
    """Name -> maker of each way, the usual one first and ours last.

    `compiled`: also what torch.compile makes; `levers`: also ours with none, each and all of its levers.
    """
    nets = NETWORKS[recipe.networks]

    def state(chosen: Levers = FAST) -> TrainState:
        bf16 = replace(recipe, precision="bf16")
        return TrainState(bf16, torch.full(nets.image, 0.5, dtype=torch.float64), device, levers=chosen)

    rows = {
        "separate fp32": lambda: Separate(state(), nets, bf16=False),
        "separate bf16": lambda: Separate(state(), nets, bf16=True),
        "joint bf16": lambda: Joint(state(), nets, bf16=True),
    }
    if compiled:
        tuned = "max-autotune" if device.type == "cuda" else "max-autotune-no-cudagraphs"
        rows["joint bf16 compiled"] = lambda: Joint(state(), nets, bf16=True, compiled="default")
        rows["joint bf16 compiled, tuned"] = lambda: Joint(state(), nets, bf16=True, compiled=tuned)
        if device.type == "cuda":  # whose graphs may not take two backward passes or batch norm's buffers
            plain = "max-autotune-no-cudagraphs"
            rows["joint bf16 compiled, tuned, no graphs"] = lambda: Joint(state(), nets, bf16=True, compiled=plain)
    if levers:
        rows |= {f"ours: {name}": lambda chosen=each: Ours(state(chosen)) for name, each in lever_sets(device).items()}
    return rows | {"ours": lambda: Ours(state())}
