import pytest
import torch
from kernel_checks import assert_as_exact, error, run

from kernels import bn_forward, tiles
from kernels.bias_leaky_relu_dropout import bias_leaky_relu_dropout_ref
from kernels.bn_leaky_relu import bn_leaky_relu_ref
from kernels.dispatch import record_launches
from kernels.joint_input import joint_input, joint_input_ref
from kernels.ops import OPS
from kernels.random import dropout_ref

OP = OPS["joint_input"]
QUICK = ((37, 16, 24, 8), (5, 3, 5, 0), (6, 1, 1, 1), (300, 8, 16, 0))  # rows, Cx, Cz, Cc
NETWORKS = ((256, 256, 2048, 0), (256, 512, 1024, 0), (256, 512, 512, 0), (256, 256, 256, 64))
LONG = (*((n, cx, 24, cc) for n in (7, 129) for cx in (1, 13, 64) for cc in (0, 5, 40)), (1000, 40, 8, 8), *NETWORKS)


def inputs_of(widths, dtype=torch.float32, device="cpu", biased=True):
    """Rows, Cx, Cz, Cc -> inputs; not `biased` is z without a bias, as in CelebA."""
    n, cx, cz, cc = widths
    inputs = OP.inputs((n, 4 * cx), torch.float32, device)
    draw = lambda width: torch.randn(n, width, device=device).to(dtype).requires_grad_()  # noqa: E731
    inputs |= {"x": draw(cx), "z": draw(cz), "c": draw(cc) if cc else None}
    for name in ("weight", "bias", "running_mean", "running_var"):
        inputs[name] = inputs[name].detach()[:1].expand(cx).clone().abs().requires_grad_(inputs[name].requires_grad)
    inputs["z_bias"] = torch.randn(cz, device=device).requires_grad_() if biased else None
    if dtype == torch.float64:
        for name, value in inputs.items():
            if value is not None and value.is_floating_point():
                inputs[name] = value.detach().double().requires_grad_(value.requires_grad)
    return inputs


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles as small as on a GPU, so that rows and channels take several."""
    monkeypatch.setattr(tiles, "INTERPRETER_SCALE", 1)


@pytest.mark.parametrize("widths", [*QUICK, *(pytest.param(w, marks=pytest.mark.slow) for w in LONG)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("biased", (True, False))
def test_shapes(widths, dtype, biased, device, poisoned):
    assert_as_exact(OP, inputs_of(widths, dtype, device, biased), {"dropout": 0.2, "offset": 1})


@pytest.mark.parametrize("training", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_many_small_tiles(training, device, small_tiles, poisoned):
    options = {"dropout": 0.2, "offset": 1, "training": training}
    assert_as_exact(OP, inputs_of((300, 40, 33, 20), torch.float32, device), options)


@pytest.mark.parametrize("training", (True, False))
def test_more_rows_than_a_block_walks(training, device, monkeypatch):
    """The composition: the same numbers as the fused kernels, to rounding, and the same mask."""
    inputs, seeds, options = (
        inputs_of((64, 8, 16, 8), torch.float32, device),
        [],
        {"dropout": 0.5, "training": training},
    )
    fused = run(joint_input, inputs, seeds, **options, impl="triton")
    monkeypatch.setattr(bn_forward, "is_local", lambda *_: False)
    with record_launches() as launches:
        composed = run(joint_input, inputs, seeds, **options, impl="triton")
    assert len(launches) > 2
    for name, value in composed.items():
        assert error(value, fused[name]) <= 1e-6, name
    assert torch.equal(composed["out0"] == 0, fused["out0"] == 0)


@pytest.mark.parametrize("impl", ("ref", "triton"))
@pytest.mark.parametrize("plane", ((), (1, 1)), ids=str)
def test_mask_and_values_of_the_plain_composition(impl, plane, device):
    inputs = {name: v.detach() if name != "rng" else v for name, v in inputs_of((33, 16, 24, 5), device=device).items()}
    x, z, c = (inputs[name].view(33, -1, *plane) for name in "xzc")
    y = joint_input(**inputs | {"x": x, "z": z, "c": c}, dropout=0.2, offset=7, impl=impl)
    parts = [bn_leaky_relu_ref(inputs["x"], inputs["weight"], inputs["bias"])]
    parts += [bias_leaky_relu_dropout_ref(inputs["z"], inputs["z_bias"]), inputs["c"]]
    exact = dropout_ref(torch.cat(parts, 1), 0.2, inputs["rng"], 7)
    assert y.shape == (33, 45, *plane)
    torch.testing.assert_close(y.flatten(1), exact)
    assert torch.equal(y.flatten(1) == 0, exact == 0)


@pytest.mark.parametrize("impl", ("ref", "triton"))
def test_running_statistics(impl, device):
    inputs, norm = inputs_of((50, 16, 8, 0), device=device), torch.nn.BatchNorm1d(16, momentum=0.3).to(device)
    norm.running_mean.copy_(inputs["running_mean"])
    norm.running_var.copy_(inputs["running_var"])
    batches = torch.tensor(4, device=device)
    joint_input(**inputs, num_batches_tracked=batches, momentum=0.3, impl=impl)
    norm(inputs["x"])
    torch.testing.assert_close(inputs["running_mean"], norm.running_mean)
    torch.testing.assert_close(inputs["running_var"], norm.running_var)
    assert batches == 5


@pytest.mark.parametrize("training", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_gradcheck(training, device):
    if device == "cuda":
        pytest.skip("float64 only in the interpreter")
    inputs = inputs_of((3, 2, 1, 1), torch.float64)
    names = [name for name, value in inputs.items() if value.requires_grad]

    def function(*values):
        fixed = {name: v.clone() for name, v in inputs.items() if name.startswith("running")}
        options = {"dropout": 0.3, "training": training, "impl": "triton"}
        return joint_input(**inputs | dict(zip(names, values, strict=True)) | fixed, **options)

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names])


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("training", (True, False))
def test_non_finite_values_as_torch(value, training, device, poisoned):
    inputs = inputs_of((20, 8, 8, 8), device=device)
    for name in "xzc":
        inputs[name].data[3, 2] = value
    seeds, options = [], {"training": training}
    mine = run(joint_input, inputs, seeds, **options, impl="triton")
    theirs = run(joint_input_ref, inputs, seeds, **options)
    for name, got in mine.items():
        assert torch.equal(got.isfinite(), theirs[name].isfinite()), name
    assert mine["out0"][:, 2].isfinite().any() != training and mine["out0"][:, 3].isfinite().all()


@pytest.mark.parametrize("impl", ("ref", "triton"))
@pytest.mark.parametrize("rows", ((17, 6), (22, 1), (23, 0)), ids=str)
def test_statistics_of_two_ranks_equal_one_process(rows, impl, device):
    """Each round plays both ranks with what they sent in the round before; two exchanges, so the third is exact."""
    inputs = inputs_of((23, 8, 16, 8), device=device)
    plain = {name: v for name, v in inputs.items() if not name.startswith("running")}
    seeds, whole = [], {name: inputs[name].clone() for name in ("running_mean", "running_var")}
    expected = run(joint_input_ref, plain | whole, seeds, momentum=0.2)
    shares, sent = ([slice(0, rows[0]), slice(rows[0], 23)]), [[], []]
    for _ in range(3):  # each run knows one exchange more
        results = []
        for rank in (0, 1):
            mine, calls = [], iter(range(2))

            def reduce(value, rank=rank, mine=mine, calls=calls):
                i = next(calls)
                mine.append(value)
                both = [sent[r][i] if len(sent[r]) > i else torch.zeros_like(value) + value for r in (0, 1)]
                both[rank] = value
                return torch.stack(both)

            part = {n: v.detach()[shares[rank]].requires_grad_() if n in "xzc" else v for n, v in plain.items()}
            running = {name: inputs[name].clone() for name in whole}
            seed = [seeds[0][shares[rank]]]
            results.append((run(joint_input, part | running, seed, momentum=0.2, reduce=reduce, impl=impl), running))
            sent[rank] = mine
    (first, running), (second, _) = results
    for name, value in expected.items():
        joined = torch.cat([first[name], second[name]]) if value.dim() == 2 else first[name] + second[name]
        assert error(joined, value) <= (1e-6 if name == "out0" else 1e-5), name
    for name, value in running.items():
        torch.testing.assert_close(value, whole[name])


def test_refuses(device):
    inputs = inputs_of((4, 8, 8, 8), device=device)
    for change, message in (
        ({"z": inputs["z"][:3]}, "alike, got z"),
        ({"c": inputs["c"][:, :, None]}, "alike, got c"),
        ({"z_bias": torch.zeros(9, device=device)}, "z_bias must have shape"),
        ({"weight": None}, "in pairs"),
        ({"rng": None, "dropout": 0.5}, "dropout needs rng"),
        ({name: inputs[name][:1] for name in "xzc"}, "more than 1 value"),
        ({"x": inputs["x"][:, :, None, None].expand(-1, -1, 2, 2)}, r"expected \[N, C\]"),
    ):
        with pytest.raises(ValueError, match=message):
            joint_input(**inputs | change)
    with pytest.raises(TypeError, match="z must have the dtype of x"):
        joint_input(**inputs | {"z": inputs["z"].double()})
