"""A trained run for use, and its numbers."""

from typing import Any

import torch
from torch import Tensor

from ali_dist.state import derived_seed
from ali_dist.toy.data import held_out_points, train_points
from ali_dist.toy.metrics import energy_distance_to_prior, holes, reconstruction_metrics, sample_metrics
from ali_dist.toy.models import VAE_STD, Networks
from ali_dist.toy.nets import Weights, with_population
from ali_dist.toy.tables import MODELS, Z_DIM

POPULATION = 10_000  # training points and prior draws that batch norm's population statistics are taken over
SAMPLES = 10_000  # the paper's count
PACGAN_SAMPLES = 2_500  # that of the published comparison, arXiv:1712.04086


def normal(count: int, *key: int | str) -> Tensor:
    """N(0, 1) float32 [1, count, 2] for all runs alike."""
    return torch.randn(1, count, Z_DIM, generator=torch.Generator().manual_seed(derived_seed("judge", *key)))


def population() -> tuple[Tensor, Tensor, Tensor]:
    """x, z and eps that batch norm's population statistics are taken over, [1, POPULATION, 2] each."""
    return train_points()[None, :POPULATION], normal(POPULATION, "z"), normal(POPULATION, "eps")


def networks(model: str, weights: Weights) -> Networks:
    """A finished run's networks in float32, batch norm with the statistics of what each network was trained on.

    `weights` is a stack of one; a decoder that was not trained has its statistics already.
    """
    x, z, eps = population()
    nets = Networks(model, weights)
    if model in ("ali", "gan"):
        nets = nets._replace(weights=with_population("decoder", MODELS[model]["decoder"], nets.weights, z))
    if "encoder" in MODELS[model]:
        if model == "inverse":
            x = nets.decode(z)
        inputs = x if model == "vae" else torch.cat([x, eps], -1)
        nets = nets._replace(weights=with_population("encoder", MODELS[model]["encoder"], nets.weights, inputs))
    if model == "vae":
        z_hat = nets.encode(x, eps)
        nets = nets._replace(weights=with_population("decoder", MODELS[model]["decoder"], nets.weights, z_hat))
    return nets


@torch.no_grad()
def samples(nets: Networks, count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """z ~ p(z) and x_tilde ~ p(x|z), [count, 2] each; of the VAE with its likelihood's noise."""
    z = normal(count, "samples")
    x_tilde = nets.decode(z)
    if nets.model == "vae":
        x_tilde = x_tilde + VAE_STD * normal(count, "likelihood")
    return z[0], x_tilde[0]


@torch.no_grad()
def reconstructions(nets: Networks, x: Tensor) -> tuple[Tensor, Tensor]:
    """z_hat ~ q(z|x) and G_x(z_hat) of x [N, 2], [N, 2] each."""
    z_hat = nets.encode(x[None], normal(len(x), "reconstructions"))
    return z_hat[0], nets.decode(z_hat)[0]


def code_metrics(z_hat: Tensor) -> dict[str, float]:
    """How well q(z) matches p(z), from codes [N, 2]; codes that are not finite match nothing."""
    distance = energy_distance_to_prior(z_hat)
    return {"energy_distance": distance, "holes": holes(z_hat) if z_hat.isfinite().all() else 1.0}


def measures(nets: Networks) -> dict[str, Any]:
    """All numbers of a finished run: of its samples, and if it has an encoder of its codes and reconstructions."""
    out: dict[str, Any] = {}
    for count in (SAMPLES, PACGAN_SAMPLES):
        out[f"samples_{count}"] = sample_metrics(samples(nets, count)[1])
    if "encoder" in MODELS[nets.model]:
        x, component = held_out_points()
        z_hat, reconstruction = reconstructions(nets, x)
        out["codes"] = code_metrics(z_hat) | {"std": z_hat.std(0).tolist()}
        out["reconstructions"] = reconstruction_metrics(x, component, reconstruction)
    return out


def floors() -> dict[str, Any]:
    """The same numbers of true samples: what no model can be told from."""
    held_out = held_out_points()[0]
    return {
        **{f"samples_{n}": sample_metrics(held_out[:n]) for n in (SAMPLES, PACGAN_SAMPLES)},
        "codes": code_metrics(normal(SAMPLES, "floor")[0]),
    }
