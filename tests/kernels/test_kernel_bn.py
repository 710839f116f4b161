"""bn_leaky_relu: its numbers, both strategies, running statistics, refusals."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_as_exact, double, error, run

from ali_dist.tables import NETWORKS, plane_shapes
from kernels import bn_backward, bn_forward, tiles
from kernels.bn_leaky_relu import bn_leaky_relu, bn_leaky_relu_ref
from kernels.ops import OPS

OP = OPS["bn_leaky_relu"]
LAYERS = sorted(
    {
        shape
        for networks in NETWORKS.values()
        for start, rows in networks.parts().values()
        for row, shape in zip(rows, plane_shapes(start, rows), strict=True)
        if row.bn
    }
)
RAGGED = [
    *((2, 8), (9, 1), (3, 5), (2, 2048), (129, 33), (257, 16), (1000, 7)),
    *((5, 1, 1, 1), (1, 1, 3, 3), (2, 3, 1, 1), (1, 64, 4, 4), (3, 24, 31, 31), (7, 13, 13, 13), (2, 100, 9, 11)),
]


@pytest.fixture(params=("local", "two phases"))
def strategy(request, monkeypatch):
    for module in (bn_forward, bn_backward):
        monkeypatch.setattr(module, "is_local", lambda *_: request.param == "local")


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that every loop runs more than once and every last tile is ragged."""
    monkeypatch.setattr(tiles, "INTERPRETER_SCALE", 1)
    for name in ("MAP_ELEMENTS", "SUM_ELEMENTS"):
        monkeypatch.setattr(tiles, name, 128)
    for name in ("MAP_CHANNELS", "SUM_CHANNELS"):
        monkeypatch.setattr(tiles, name, 8)
    monkeypatch.setattr(bn_forward, "SUM_CHANNELS", 8)
    monkeypatch.setattr(bn_forward, "LOCAL_ELEMENTS", 128)
    monkeypatch.setattr(bn_backward, "LOCAL_BACKWARD_ELEMENTS", 128)
    for module in (bn_forward, bn_backward):
        monkeypatch.setattr(module, "LOCAL_CHANNELS", 8)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_networks_layers(layer, device, poisoned):
    assert_as_exact(OP, OP.inputs((2, *layer), torch.float32, device), {"slope": 0.02})


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.soak)), ids=str
)
def test_the_networks_layers_with_dropout(layer, dtype, device, strategy, poisoned):
    inputs = OP.inputs((2, *layer), dtype, device)
    assert_as_exact(OP, inputs, {"slope": 0.1, "dropout": 0.5, "offset": 3})


@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_ragged_shapes(shape, device, strategy, poisoned):
    inputs = OP.inputs(shape, torch.float32, device)
    assert_as_exact(OP, inputs, {"slope": 0.02, "dropout": 0.2})


@pytest.mark.parametrize("shape", ((2, 1), (3, 1), (2, 1, 1, 1), (1, 1, 3, 1)), ids=str)
def test_two_or_three_values_in_all(shape, device, strategy, poisoned):
    """Here the terms of dx cancel but for the last digits: the error is held against the terms."""
    inputs, seeds = OP.inputs(shape, torch.float32, device), []
    actual = run(bn_leaky_relu, inputs, seeds, impl="triton")
    exact = run(bn_leaky_relu_ref, {name: double(value) for name, value in inputs.items()}, seeds)
    terms = (seeds[0].abs().max() * inputs["weight"].abs() / inputs["x"].std(unbiased=False)).item()
    assert (actual.pop("dx") - exact["dx"]).abs().max() <= 4 * 2**-23 * terms
    for name, value in actual.items():
        assert error(value, exact[name]) <= 1e-6, name


@pytest.mark.parametrize(("shape", "channels_last"), (((37, 19), True), ((2, 11, 5, 7), True), ((2, 11, 5, 7), False)))
@pytest.mark.parametrize("training", (True, False))
def test_many_small_tiles(shape, training, channels_last, device, strategy, small_tiles, poisoned):
    inputs = OP.inputs(shape, torch.float32, device)
    if not channels_last:
        inputs["x"] = inputs["x"].detach().contiguous().requires_grad_()
    assert_as_exact(OP, inputs, {"slope": 0.02, "dropout": 0.2, "training": training})


@pytest.mark.parametrize(("impl", "limit"), (("triton", 1e-6), ("ref with a hook", 2e-6)))
@pytest.mark.parametrize("moments", ((0, 1), (1e2, 1), (1e4, 1), (1e4, 1e-2), (1e6, 10)), ids=str)
def test_a_large_mean(moments, impl, limit, device, strategy):
    """No digit is lost: plain torch is wrong by 2e-2 at mean 1e4, standard deviation 1e-2."""
    inputs = OP.inputs((512, 8, 2, 2), torch.float32, device)
    x = inputs["x"].detach() * moments[1] + moments[0]
    inputs["x"], seeds = x.requires_grad_(), []
    how = {"impl": "triton"} if impl == "triton" else {"impl": "ref", "reduce": lambda sums: sums[None]}
    actual = run(bn_leaky_relu, inputs, seeds, **how)
    exact = run(bn_leaky_relu_ref, {name: double(value) for name, value in inputs.items()}, seeds)
    for name, value in actual.items():
        assert error(value, exact[name]) <= limit, (name, error(value, exact[name]))


def test_constant_channels_and_any_weight(device, strategy):
    """A constant channel gives its bias exactly; zero and negative weights are as good as others."""
    inputs = OP.inputs((16, 6, 3, 3), torch.float32, device)
    x = inputs["x"].detach()
    x[:, 0], x[:, 1] = 3.7, 1e4
    weight = inputs["weight"].detach()
    weight[2], weight[3] = 0.0, -1.5
    inputs |= {"x": x.requires_grad_(), "weight": weight.requires_grad_()}
    y = bn_leaky_relu(**inputs, slope=1.0, impl="triton")
    assert torch.equal(y[:, :2], inputs["bias"][:2].view(1, 2, 1, 1).expand(16, 2, 3, 3))
    inputs["x"] = x.detach()[:, 2:].contiguous(memory_format=torch.channels_last).requires_grad_()
    for name in ("weight", "bias", "running_mean", "running_var"):
        inputs[name] = inputs[name].detach()[2:].clone().requires_grad_(inputs[name].requires_grad)
    assert_as_exact(OP, inputs, {"slope": 0.02})


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_non_finite_values_come_through_in_their_channel_alone(value, device, strategy):
    inputs, seeds = OP.inputs((8, 4, 3, 3), torch.float32, device), []
    clean = run(bn_leaky_relu, inputs, seeds, impl="triton")
    x = inputs["x"].detach().clone()
    x[3, 1, 2, 0] = value
    inputs["x"] = x.requires_grad_()
    inputs["running_mean"].zero_()
    actual = run(bn_leaky_relu, inputs, seeds, impl="triton")
    plain = run(bn_leaky_relu_ref, inputs, seeds)
    for name, values in actual.items():
        assert torch.equal(values.isnan(), plain[name].isnan()) and torch.equal(values.isinf(), plain[name].isinf())
        channel = 1 if values.dim() == 4 else 0
        others = torch.tensor([0, 2, 3], device=device)
        assert torch.equal(values.index_select(channel, others), clean[name].index_select(channel, others)), name
    y = bn_leaky_relu(
        **inputs | {"running_mean": torch.full((4,), value, device=device)}, training=False, impl="triton"
    )
    plain = bn_leaky_relu_ref(**inputs | {"running_mean": torch.full((4,), value, device=device)}, training=False)
    assert torch.equal(y.isnan(), plain.isnan())
    actual = run(bn_leaky_relu, inputs, seeds, training=False, impl="triton")
    for name, values in run(bn_leaky_relu_ref, inputs, seeds, training=False).items():
        assert torch.equal(actual[name].isnan(), values.isnan()), name


@pytest.mark.parametrize("training", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_gradcheck(training, device, strategy):
    if device == "cuda":
        pytest.skip("float64 only in the interpreter")
    inputs = OP.inputs((3, 2, 2, 1), torch.float64)
    names = ("x", "weight", "bias")
    constant = {name: value for name, value in inputs.items() if name not in names}
    options = {"training": training, "slope": 0.1, "dropout": 0.3, "impl": "triton"}

    def function(*tensors):
        return bn_leaky_relu(**dict(zip(names, tensors, strict=True)), **constant, **options)

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 9),
    channels=st.integers(1, 20),
    plane=st.none() | st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    channels_last=st.booleans(),
    slope=st.sampled_from((0.0, 0.01, 0.3, 1.0)),
    dropout=st.sampled_from((0.0, 0.2, 0.5)),
    training=st.booleans(),
)
def test_any_shape(batch, channels, plane, dtype, channels_last, slope, dropout, training):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shape = (batch, channels, *(plane or ()))
    inputs = OP.inputs(shape, dtype, device)
    if not channels_last:
        inputs["x"] = inputs["x"].detach().contiguous().requires_grad_()
    options = {"slope": slope, "dropout": dropout, "training": training}
    if training and inputs["x"].numel() == channels:
        with pytest.raises(ValueError, match="more than 1 value"):
            bn_leaky_relu(**inputs, **options, impl="triton")
    else:
        assert_as_exact(OP, inputs, options)


@pytest.mark.parametrize("impl", ("ref", "triton"))
def test_running_statistics(impl, device, strategy):
    inputs = OP.inputs((5, 24, 3, 3), torch.float32, device)
    mean, var = inputs["running_mean"].clone(), inputs["running_var"].clone()
    count = torch.tensor(3, device=device)
    bn_leaky_relu(**inputs, num_batches_tracked=count, momentum=0.05, impl=impl)
    F.batch_norm(inputs["x"].detach(), mean, var, training=True, momentum=0.05)
    assert count == 4
    assert error(inputs["running_mean"], mean) <= 1e-6 and error(inputs["running_var"], var) <= 1e-6
    before = mean.clone()
    bn_leaky_relu(inputs["x"], None, None, mean, var, count, training=False, impl=impl)
    assert count == 4 and torch.equal(mean, before)


def test_mutated_statistics_are_noticed_by_autograd(device):
    x, (mean, var) = torch.randn(6, 4, device=device), torch.ones(2, 4, device=device).unbind()
    weight = torch.ones(4, device=device, requires_grad=True)
    product = (weight * mean).sum()
    bn_leaky_relu(x, None, None, mean, var, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("impl", ("ref", "triton"))
def test_refuses(impl, device):
    x, vector = torch.zeros(4, 3, device=device), torch.ones(3, device=device)
    for arguments, message in (
        ((x[:1], None, None), "more than 1 value per channel"),
        ((x[:1, :, None, None], None, None), "more than 1 value per channel"),
        ((x, vector, None), "in pairs"),
        ((x, None, None, vector, None), "in pairs"),
        ((x, vector, vector[:2]), "bias must have shape"),
        ((x[:, :, None], None, None), r"expected \[N, C\]"),
    ):
        with pytest.raises(ValueError, match=message):
            bn_leaky_relu(*arguments, impl=impl)
    with pytest.raises(ValueError, match="needs running statistics"):
        bn_leaky_relu(x, None, None, training=False, impl=impl)
