"""Checks that hold for every row of OPS."""

import pytest
import torch
from kernel_checks import OpCalls, assert_as_exact, differentiable, error, run

from kernels.dispatch import record_launches
from kernels.ops import OPS

SMALL = {2: (6, 16), 4: (3, 8, 5, 5)}
CASES = [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS.values() for name in op.options]
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
cases = pytest.mark.parametrize(("op", "option"), CASES)


@pytest.mark.parametrize("shape", SMALL.values(), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@cases
def test_as_exact(op, option, dtype, shape, device, poisoned):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 only in the interpreter")
    assert_as_exact(op, op.inputs(shape, dtype, device), op.options[option])


@cases
def test_non_contiguous(op, option, device, poisoned):
    """A transposed slice, and contiguous NCHW: the same numbers as channels last."""
    options, inputs, seeds = op.options[option], op.inputs((4, 8, 6, 6), torch.float32, device), []
    expected = run(op.function, inputs, seeds, **options, impl="triton")
    for relayout in (
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.contiguous(),
    ):
        others = {
            name: relayout(x.detach()).requires_grad_(x.requires_grad) if x is not None and x.dim() == 4 else x
            for name, x in inputs.items()
        }
        for name, value in run(op.function, others, seeds, **options, impl="triton").items():
            assert error(value, expected[name]) <= 1e-6, name


@cases
def test_repeatable(op, option, device):
    inputs, seeds = op.inputs((5, 24, 9, 9), torch.float32, device), []
    first, second = (run(op.function, inputs, seeds, **op.options[option], impl="triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@cases
def test_opcheck(op, option, device):
    inputs = op.inputs((3, 8, 2, 2), torch.float32, device)
    with OpCalls() as seen:
        run(op.function, inputs, [], **op.options[option], impl="triton")
    assert seen.calls
    for func, args in seen.calls:
        torch.library.opcheck(func, args)
        plain = [False if name.name == "triton" else a for name, a in zip(func._schema.arguments, args, strict=True)]
        torch.library.opcheck(func, plain)


@pytest.mark.parametrize("impl", ("ref", "triton"))
@cases
def test_compiles_as_one_graph(op, option, impl, device):
    torch.compiler.reset()
    inputs, seeds = op.inputs((3, 8, 2, 2), torch.float32, device), []
    compiled = torch.compile(op.function, backend="aot_eager", fullgraph=True)
    expected = run(op.function, inputs, seeds, **op.options[option], impl=impl)
    for name, value in run(compiled, inputs, seeds, **op.options[option], impl=impl).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@cases
def test_launches_as_stated(op, option, device):
    shape = next(iter(op.shapes.values()))
    shape = (4, *shape[1:])
    inputs = op.inputs(shape, torch.bfloat16, device)
    cost = op.cost(shape, torch.bfloat16, **op.options[option])
    with record_launches(run=False) as launches:
        y = op.function(**inputs, **op.options[option], impl="triton")
        forward = len(launches)
        for out in differentiable(y):
            out.backward(torch.ones_like(out))
    assert (forward, len(launches) - forward) == (cost.forward_launches, cost.backward_launches)


@ops
def test_refuses(op, device):
    options = next(iter(op.options.values()))
    inputs = op.inputs((3, 8, 2, 2), torch.float32, device)
    name = next(iter(inputs))
    with pytest.raises(ValueError, match="impl must be one of"):
        op.function(**inputs, **options, impl="cuda")
    with pytest.raises(TypeError, match="no kernel for torch.int32"):
        op.function(**{**inputs, name: inputs[name].detach().int()}, **options, impl="triton")
    with pytest.raises(ValueError, match=r"expected \["):
        op.function(**{**inputs, name: inputs[name].detach()[0]}, **options)
    if "bias" in inputs:
        with pytest.raises(ValueError, match="must have shape"):
            op.function(**{**inputs, "bias": torch.zeros(9, device=device)}, **options)


@ops
def test_auto_is_plain_torch_on_a_cpu(op):
    with record_launches() as launches:
        op.function(**op.inputs((3, 8, 2, 2), torch.float32), **next(iter(op.options.values())))
    assert not launches
