"""The five models' training steps, each as (weights, batch) -> gradients and losses, on stacks of R runs.

Symbols as in the paper: x ~ q(x), z ~ p(z), z_hat the encoder's code of x, x_tilde the decoder's image of z; B points a
run and batch. Gradients are those of the losses' means over B, a run's own for each run.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ali_dist.losses import per_image_losses
from ali_dist.toy.nets import Precision, Weights, chain
from ali_dist.toy.tables import MODELS, Z_DIM
from ali_dist.toy.terms import cycle, joint_energy_distance, near_energy, nearest

VAE_STD = 0.05  # of the VAE's Gaussian likelihood: the data's own
TINY = 1e-20  # see adversarial_gradients


class Terms(NamedTuple):
    """Weights in the loss of encoder and decoder: of L_G and of what a recipe adds; see ali_dist.toy.terms."""

    game: float
    cycle: float
    energy: float
    near_energy: float
    nearest: float
    points: Tensor  # training points that samples are held against, [R, M, 2]


class Batch(NamedTuple):
    x: Tensor  # [R, B, 2]
    z: Tensor  # prior draws, [R, B, 2]
    eps: Tensor  # the encoder's noise, [R, B, 2]
    terms: Terms | None = None


class Gradients(NamedTuple):
    of: dict[str, Tensor]  # by the weights' names
    losses: dict[str, Tensor]  # [R] each


class Networks(NamedTuple):
    """A model's networks as functions of their inputs."""

    model: str
    weights: Weights
    precision: Precision = "fp32"

    def run(self, name: str, x: Tensor) -> Tensor:
        table = MODELS["ali"]["decoder"] if name == "decoder" else MODELS[self.model][name]
        return chain(name, table, self.weights, x, self.precision)

    def encode(self, x: Tensor, eps: Tensor) -> Tensor:
        """z_hat ~ q(z|x), [R, N, 2]."""
        if self.model == "vae":
            mu, log_sigma = self.run("encoder", x).chunk(2, -1)
            return mu + log_sigma.exp() * eps
        return self.run("encoder", torch.cat([x, eps], -1))

    def decode(self, z: Tensor) -> Tensor:
        """x_tilde, [R, N, 2]; of the VAE the mean of p(x|z)."""
        return self.run("decoder", z)

    def parameters(self, *networks: str) -> Weights:
        """The trained weights of some networks."""
        return {name: t for name, t in self.weights.items() if name.split(".")[0] in networks and t.requires_grad}


def adversarial_gradients(nets: Networks, q: Tensor, p: Tensor) -> tuple[Gradients, Tensor]:
    """L_D's gradient for the discriminator's weights, and L_G's for its inputs [q; p], [R, 2B, inputs].

    One backward pass serves both: without batch norm a point's logit depends on that point alone, so a point's two
    input gradients differ by one factor, the ratio of the losses' derivatives at its logit.
    """
    pairs = torch.cat([q, p], 1).detach().requires_grad_()
    logits = nets.run("discriminator", pairs).squeeze(-1)
    leaf = logits.detach().requires_grad_()
    losses = [loss.mean(1) for loss in per_image_losses(*leaf.chunk(2, 1))]
    d, g = (torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0] for loss in losses)
    d = torch.copysign(d.abs().clamp(min=TINY), d)  # a ratio exists even where D is so sure that d underflows
    weights = nets.parameters("discriminator")
    *of, of_pairs = torch.autograd.grad(logits, [*weights.values(), pairs], d)
    report = {"loss_d": losses[0].detach(), "loss_g": losses[1].detach()}
    return Gradients(dict(zip(weights, of, strict=True)), report), of_pairs * (g / d).unsqueeze(-1)


def ali(nets: Networks, batch: Batch) -> Gradients:
    """Encoder and decoder against D(x, z) (arXiv:1606.00704, algorithm 1); also post-hoc, with a decoder that stays."""
    z_hat, x_tilde = nets.encode(batch.x, batch.eps), nets.decode(batch.z)
    q, p = torch.cat([batch.x, z_hat], -1), torch.cat([x_tilde, batch.z], -1)
    discriminator, of_pairs = adversarial_gradients(nets, q, p)
    of_q, of_p = of_pairs.chunk(2, 1)
    outputs = [(z_hat, of_q[..., -Z_DIM:]), (x_tilde, of_p[..., :-Z_DIM])]
    if batch.terms is not None:
        added = added_terms(nets, batch, batch.terms, z_hat, x_tilde)
        outputs = [(out, batch.terms.game * of_out) for out, of_out in outputs]
        outputs.append((added, torch.ones_like(added)))
    return with_generator(discriminator, nets.parameters("encoder", "decoder"), outputs)


def added_terms(nets: Networks, batch: Batch, terms: Terms, z_hat: Tensor, x_tilde: Tensor) -> Tensor:
    """What the terms add to each run's L_G, [R]."""
    added = terms.cycle * cycle(batch.x, nets.decode(z_hat))
    added = added + terms.energy * joint_energy_distance(batch.x, z_hat, x_tilde, batch.z)
    if terms.near_energy:
        added = added + terms.near_energy * near_energy(x_tilde, terms.points)
    return added + terms.nearest * nearest(x_tilde, terms.points)


def gan(nets: Networks, batch: Batch) -> Gradients:
    """The decoder against D(x) (arXiv:1406.2661): the same losses, whose first half does not reach the decoder."""
    x_tilde = nets.decode(batch.z)
    discriminator, of_points = adversarial_gradients(nets, batch.x, x_tilde)
    return with_generator(discriminator, nets.parameters("decoder"), [(x_tilde, of_points.chunk(2, 1)[1])])


def with_generator(discriminator: Gradients, weights: Weights, outputs: list[tuple[Tensor, Tensor]]) -> Gradients:
    """Adds the generator's gradients, given its outputs and L_G's gradients for them."""
    outputs = [pair for pair in outputs if pair[0].requires_grad]
    of = torch.autograd.grad([out for out, _ in outputs], list(weights.values()), [of_out for _, of_out in outputs])
    return Gradients(discriminator.of | dict(zip(weights, of, strict=True)), discriminator.losses)


def inverse(nets: Networks, batch: Batch) -> Gradients:
    """An encoder that inverts a decoder that stays: E |z - G_z(G_x(z))|^2."""
    z_hat = nets.encode(nets.decode(batch.z), batch.eps)
    loss = (batch.z - z_hat).square().sum(-1).mean(1)
    return of_one_loss(loss, nets.parameters("encoder"))


def vae_losses(x: Tensor, mean: Tensor, mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """-log N(x; mean, VAE_STD^2) and KL(N(mu, sigma^2) || N(0, 1)), in nats, summed over the last dimension."""
    constant = math.log(VAE_STD) + math.log(2 * math.pi) / 2
    nll = ((x - mean).square() / (2 * VAE_STD**2) + constant).sum(-1)
    kl = ((mu.square() + (2 * log_sigma).exp() - 1) / 2 - log_sigma).sum(-1)
    return nll, kl


def vae(nets: Networks, batch: Batch) -> Gradients:
    """The negative evidence bound with one sample of z_hat a point (arXiv:1312.6114)."""
    mu, log_sigma = nets.run("encoder", batch.x).chunk(2, -1)
    mean = nets.decode(mu + log_sigma.exp() * batch.eps)
    nll, kl = vae_losses(batch.x, mean, mu, log_sigma)
    return of_one_loss((nll + kl).mean(1), nets.parameters("encoder", "decoder"))


def of_one_loss(loss: Tensor, weights: Weights) -> Gradients:
    of = torch.autograd.grad(loss.sum(), list(weights.values()))
    return Gradients(dict(zip(weights, of, strict=True)), {"loss": loss.detach()})


STEPS: dict[str, Callable[[Networks, Batch], Gradients]] = {
    "ali": ali,
    "gan": gan,
    "inverse": inverse,
    "posthoc": ali,
    "vae": vae,
}
