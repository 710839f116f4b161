"""The module beside nn.BatchNorm2d + nn.LeakyReLU."""

import copy

import pytest
import torch
from kernel_checks import error
from torch import nn

from kernels.batch_norm import BatchNormLeakyReLU

SETTINGS = (
    {},
    {"eps": 1e-4, "momentum": 0.05},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
)
impls = pytest.mark.parametrize("impl", ("ref", "triton"))


def plain(settings):
    return nn.Sequential(nn.BatchNorm2d(8, **settings), nn.LeakyReLU(0.02))


@impls
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_trains_and_evaluates_as_the_plain_layers(settings, impl, device):
    expected = plain(settings).to(device)
    actual = BatchNormLeakyReLU(8, **settings, slope=0.02, impl=impl).to(device)
    assert actual.state_dict().keys() == expected[0].state_dict().keys()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.normal_()
    actual.load_state_dict(expected[0].state_dict())
    for _ in range(3):
        x = torch.randn(4, 8, 3, 3, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
        seed = torch.randn_like(x)
        for model in (expected, actual):
            model.zero_grad()
            model(x).backward(seed)
        assert error(actual(x), expected(x)) <= 1e-6
        for one, other in zip(actual.parameters(), expected.parameters(), strict=True):
            assert error(one.grad, other.grad) <= 1e-5
    for name, value in expected[0].state_dict().items():
        assert error(actual.state_dict()[name], value) <= 1e-6, name
    assert error(actual.eval()(x), expected.eval()(x)) <= 1e-6


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_state_dicts_go_both_ways(settings):
    first = plain(settings)[0]
    first(torch.randn(6, 8, 2, 2))
    fused = BatchNormLeakyReLU(8, **settings)
    fused.load_state_dict(first.state_dict())
    back = nn.BatchNorm2d(8, **settings)
    back.load_state_dict(fused.state_dict())
    for name, value in first.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@impls
def test_dropout_acts_in_training_only_and_needs_rng(impl, device):
    layer = BatchNormLeakyReLU(8, dropout=0.5, offset=2, impl=impl).to(device)
    x, rng = torch.randn(64, 8, device=device), torch.tensor([1, 2], device=device)
    with pytest.raises(ValueError, match="dropout needs rng"):
        layer(x)
    assert 0.3 < (layer(x, rng) == 0).float().mean() < 0.7
    assert (layer.eval()(x) != 0).all()


@impls
def test_trains_in_low_precision_with_float32_parameters(impl, device):
    layer = BatchNormLeakyReLU(8, impl=impl).to(device)
    x = torch.randn(4, 8, 5, 5, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    assert y.dtype == x.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32


def test_is_not_taken_for_plain_batch_norm():
    layer = BatchNormLeakyReLU(8, slope=0.2)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(layer)))
    assert isinstance(converted[0], BatchNormLeakyReLU)
    assert "slope=0.2" in repr(layer)
