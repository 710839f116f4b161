"""Stacked networks: R independent models as tensors with a leading dimension R, run by batched matrix products.

Weights are a flat dict, "decoder.0.weight" and so on: products [R, in, out], everything else [R, 1, units]. Many small
models are the worst case for a framework's overhead; one batched product for all of them is nearly free of it.
"""

from typing import Literal

import torch
from torch import Tensor

from ali_dist.tables import BN_EPS
from ali_dist.toy.ops import batch_norm_relu, maxout
from ali_dist.toy.tables import PIECES, Network

Weights = dict[str, Tensor]
Precision = Literal["fp32", "bf16"]

BF16_FROM = 64  # both sides of a weight matrix: the layers next to x, z and the logit stay in float32


def initial(name: str, network: Network, std: float, generator: torch.Generator) -> Weights:
    """One model's weights, without the leading R: products ~ N(0, std^2), biases and shifts 0, scales 1."""
    weights = {}
    for i, (size, row) in enumerate(network.sizes()):
        weights[f"{name}.{i}.weight"] = torch.randn(size, row.columns, generator=generator) * std
        bias = torch.zeros(1, row.columns)
        if row.act == "bn_relu":
            weights |= {f"{name}.{i}.scale": torch.ones(1, row.units), f"{name}.{i}.shift": bias}
        else:
            weights[f"{name}.{i}.bias"] = bias
    return weights


def product(x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
    """[R, N, in] @ [R, in, out] -> float32 [R, N, out] (float64 from float64)."""
    if precision == "bf16" and min(weight.shape[1:]) >= BF16_FROM:
        return torch.bmm(x.bfloat16(), weight.bfloat16()).float()
    return torch.bmm(x, weight)


def chain(name: str, network: Network, weights: Weights, x: Tensor, precision: Precision = "fp32") -> Tensor:
    """The network `name` on x [R, N, inputs] -> [R, N, units of the last row].

    Batch norm uses the statistics of x, or those of the population where `weights` holds them; see `with_population`.
    """
    for i, row in enumerate(network.rows):
        x = activate(f"{name}.{i}", row.act, weights, product(x, weights[f"{name}.{i}.weight"], precision))
    return x


def activate(layer: str, act: str, weights: Weights, x: Tensor) -> Tensor:
    if act != "bn_relu":
        x = x + weights[f"{layer}.bias"]
        return maxout(x, PIECES) if act == "maxout" else x
    scale, shift = weights[f"{layer}.scale"], weights[f"{layer}.shift"]
    if f"{layer}.mean" not in weights:
        return batch_norm_relu(x, scale, shift, BN_EPS)
    scale = scale * (weights[f"{layer}.var"] + BN_EPS).rsqrt()
    return torch.addcmul(shift, x - weights[f"{layer}.mean"], scale).relu_()


@torch.no_grad()
def with_population(name: str, network: Network, weights: Weights, x: Tensor) -> Weights:
    """`weights` with the population's mean and (unbiased) variance of each batch-norm layer, taken over x [R, N, in].

    Layer by layer with the layers before it already normalised so (Ioffe and Szegedy, arXiv:1502.03167, algorithm 2),
    for averages kept during training lag behind the weights.
    """
    weights = dict(weights)
    for i, row in enumerate(network.rows):
        layer = f"{name}.{i}"
        x = product(x, weights[f"{layer}.weight"], "fp32")
        if row.act == "bn_relu":
            var, mean = torch.var_mean(x, dim=1, keepdim=True)
            weights |= {f"{layer}.mean": mean, f"{layer}.var": var}
        x = activate(layer, row.act, weights, x)
    return weights


def one_run(weights: Weights, index: int) -> Weights:
    """A stack of the one model `index`."""
    return {name: tensor[index : index + 1] for name, tensor in weights.items()}
