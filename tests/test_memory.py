"""What a training pass keeps for its backward pass."""

import pytest
import torch
from support import SMALL, batch
from torch import nn

from ali_dist.bench.memory import Kept, address
from ali_dist.layers import Chain, Wiring
from ali_dist.tables import plane_shapes
from kernels import bias_leaky_relu_dropout, bn_leaky_relu


def layer_input(dtype=torch.float32) -> torch.Tensor:
    """A convolution's output: no leaf, and kept by nobody yet."""
    return torch.randn(8, 6, 5, 5, dtype=dtype).requires_grad_() * 1.0


@pytest.mark.parametrize("impl", ("ref", "triton"))
def test_batch_norm_and_leaky_relu_keep_one_tensor_beside_the_next_layers_input(impl):
    x, weight, bias = layer_input(), *(nn.Parameter(torch.rand(6)) for _ in "wb")
    with Kept() as kept:
        y = bn_leaky_relu(x, weight, bias, slope=0.1, impl=impl)
    large = kept.storages(at_least=x.nbytes).keys()
    assert large == ({address(x)} if impl == "triton" else {address(x), address(y)})


def test_batch_norm_over_ranks_keeps_one_tensor_too():
    x, weight, bias = layer_input(), *(nn.Parameter(torch.rand(6)) for _ in "wb")
    with Kept() as kept:
        y = bn_leaky_relu(x, weight, bias, slope=0.1, impl="ref", reduce=lambda t: t[None])
    assert len(kept.storages(at_least=x.nbytes).keys() - {address(y)}) == 1


def test_bias_and_leaky_relu_keep_nothing_but_the_next_layers_input():
    x, bias = layer_input(), nn.Parameter(torch.rand(6))
    with Kept() as kept:
        y = bias_leaky_relu_dropout(x, bias, 0.1, impl="ref")
    assert kept.storages(at_least=x.nbytes).keys() == {address(y)}


@pytest.mark.parametrize("impl", ("ref", "triton"))
def test_an_encoder_keeps_two_tensors_a_layer_one_of_them_the_next_layers_input(impl):
    shape, rows = SMALL.parts()["encoder"]
    encoder = Chain((shape, rows), Wiring(slope=0.1, impl=impl)).to(memory_format=torch.channels_last)
    for layer in encoder:
        layer.reset_parameters()
    x = batch(8).x.float().div(255).contiguous(memory_format=torch.channels_last)
    with Kept() as kept:
        encoder(x)
    planes = [8 * 4 * c * h * w for c, h, w in plane_shapes(shape, rows[:-1])]
    own = {address(parameter) for parameter in encoder.parameters()}
    large = sum(size for place, size in kept.storages(min(planes)).items() if place not in own)
    assert all(row.bn for row in rows[:-1])
    assert large == x.nbytes + 2 * sum(planes) <= kept.bytes_beside(list(encoder.parameters()))
