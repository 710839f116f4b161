import pytest
import torch
from kernel_checks import assert_as_exact, run

from kernels.maxout import maxout, maxout_ref
from kernels.ops import OPS
from kernels.random import keep_mask

OP = OPS["maxout"]
QUICK = ((2, 2, 1, 1), (2, 6, 13, 13), (5, 14), (3, 18, 31, 31), (7, 130))
LONG = (
    *((n, c, hw, hw) for n in (2, 5) for c in (2, 10, 16, 66) for hw in (1, 4, 7, 28)),
    *((n, c) for n in (2, 3, 129) for c in (2, 12, 258, 1024)),
    *OP.shapes.values(),
)


@pytest.mark.parametrize("shape", [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in LONG)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("biased", (True, False))
def test_shapes(shape, dtype, biased, device, poisoned):
    shape = (min(shape[0], 16), *shape[1:])
    inputs = OP.inputs(shape, dtype, device)
    if not biased:
        inputs["bias"] = None
    assert_as_exact(OP, inputs, {"dropout": 0.5, "offset": 1})


@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format), ids=str)
def test_ties_and_non_finite_pieces_as_torch(layout, device, poisoned):
    """Every pair of NaN, both infinities, both zeros and two numbers, with the gradients that torch.maximum gives."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -2.0], device=device)
    x = torch.cartesian_prod(values, values).repeat(2, 4, 1).permute(0, 2, 1).reshape(2, 14, 7, 4)
    inputs = {"x": x.contiguous(memory_format=layout).requires_grad_(), "bias": None}
    seeds = []
    mine, theirs = run(maxout, inputs, seeds, impl="triton"), run(maxout_ref, inputs, seeds)
    for name, value in mine.items():
        assert torch.equal(value.nan_to_num(7.0), theirs[name].nan_to_num(7.0)), name
        assert torch.equal(value.isnan(), theirs[name].isnan()), name
    assert mine["out0"].isnan().any() and mine["dx"].abs().min() == 0


@pytest.mark.parametrize("shape", ((3, 16, 5, 5), (5, 6)), ids=str)
def test_without_bias_equal_to_the_last_bit(shape, device, poisoned):
    x = torch.randint(-3, 3, shape, device=device).float().requires_grad_()
    inputs = {"x": x, "bias": None, "rng": torch.tensor([3, 4], device=device)}
    seeds = []
    mine, theirs = (
        run(f, inputs, seeds, dropout=0.5, **kind) for f, kind in ((maxout, {"impl": "triton"}), (maxout_ref, {}))
    )
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("shape", ((3, 16, 5, 5), (5, 6)), ids=str)
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_on_a_cpu_equal_to_autograd_of_the_reference(shape, dropout):
    x = torch.randint(-3, 3, shape).double().requires_grad_()
    bias = torch.randint(-2, 2, shape[1:2]).double().requires_grad_()
    inputs = {"x": x, "bias": bias, "rng": torch.tensor([3, 4])}
    seeds = []
    mine, theirs = (run(f, inputs, seeds, dropout=dropout) for f in (maxout, maxout_ref))
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name], rtol=1e-12, atol=1e-12), name
    assert torch.equal(mine["dx"], theirs["dx"])


def test_gradcheck(device):
    if device == "cuda":
        pytest.skip("float64 only in the interpreter")
    rng = torch.tensor([3, 4])
    x, bias = torch.randn(3, 4).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: maxout(x, bias, 0.5, rng, 1, impl="triton"), (x, bias))


def test_dropped_outputs_get_no_gradient(device):
    x = torch.randn(64, 32, device=device, requires_grad=True)
    rng = torch.tensor([1, 2], device=device)
    both = run(
        maxout, {"x": x, "bias": None, "rng": rng}, [torch.ones(64, 16, device=device)], dropout=0.5, impl="triton"
    )
    keep = keep_mask(torch.empty(64, 16, device=device), 0.5, rng, 0)
    assert torch.equal(both["out0"] != 0, keep)
    assert torch.equal(both["dx"].view(64, 16, 2).sum(2), keep * 2.0)


def test_refuses_odd_channels(device):
    with pytest.raises(ValueError, match="channels in pairs, got 5"):
        maxout(torch.zeros(2, 5, device=device), None)
