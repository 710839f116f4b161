"""What a training pass keeps for its backward pass."""

import pytest
import torch
from support import SMALL, batch
from torch import nn

from ali_dist.layers import Chain, Wiring
from ali_dist.tables import plane_shapes
from kernels import bias_leaky_relu_dropout, bn_leaky_relu


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Inside it, collects the memory of all tensors that autograd saves: address -> bytes."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []  # also keeps their addresses from being given out again
        super().__init__(self.keep, lambda tensor: tensor)

    def __enter__(self) -> "Kept":
        super().__enter__()
        return self

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors.append(tensor)
        return tensor

    def storages(self, at_least: int = 0) -> dict[int, int]:
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return {address: size for address, size in found.items() if size >= at_least}


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


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
    parameters = {address(parameter) for parameter in encoder.parameters()}
    planes = [8 * 4 * c * h * w for c, h, w in plane_shapes(shape, rows[:-1])]
    smallest = min(planes)
    bytes_kept = sum(size for at, size in kept.storages(smallest).items() if at not in parameters)
    assert all(row.bn for row in rows[:-1])
    assert bytes_kept == x.nbytes + 2 * sum(planes)
