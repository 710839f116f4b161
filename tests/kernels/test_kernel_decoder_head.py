import pytest
import torch
from kernel_checks import assert_as_exact, error, run

from kernels import head_kernels, tiles
from kernels.decoder_head import decoder_head, decoder_head_ref
from kernels.ops import OPS

OP = OPS["decoder_head"]
QUICK = ((2, 64, 6, 6, 3), (3, 13, 5, 7, 1), (6, 1, 1, 1, 3), (9, 16, 3, 3, 4))  # N, C, H, W, Cout
NETWORKS = ((2, 64, 64, 64, 3), (2, 32, 32, 32, 3), (4, 16, 32, 32, 1))
LONG = (*((n, c, h, h + 1, out) for n in (2, 7) for c in (2, 24, 65) for h in (3, 10) for out in (1, 2, 3)), *NETWORKS)


def inputs_of(shape, dtype=torch.float32, device="cpu"):
    n, c, h, w, outputs = shape
    inputs = OP.inputs((n, c, h, w), dtype, device)
    exact = inputs["weight"].dtype
    inputs["head_weight"] = torch.randn(outputs, c, 1, 1, device=device).to(exact).requires_grad_()
    inputs["head_bias"] = torch.randn(outputs, h, w, device=device).to(exact).requires_grad_()
    return inputs


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles as small as on a GPU, so that a plane takes several."""
    monkeypatch.setattr(tiles, "INTERPRETER_SCALE", 1)
    for name, value in {"INTERPRETER_SCALE": 1, "TILE_BYTES": 1024, "COLUMNS": 16, "COLUMN_ROWS": 2}.items():
        monkeypatch.setattr(head_kernels, name, value)


@pytest.mark.parametrize("shape", [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in LONG)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_shapes(shape, dtype, device, poisoned):
    assert_as_exact(OP, inputs_of(shape, dtype, device), {"slope": 0.02})


@pytest.mark.parametrize("layout", (torch.channels_last, torch.contiguous_format), ids=str)
@pytest.mark.parametrize("training", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_many_small_tiles(training, layout, device, small_tiles, poisoned):
    inputs = inputs_of((5, 20, 4, 7, 3), torch.float32, device)
    inputs["h"] = inputs["h"].detach().contiguous(memory_format=layout).requires_grad_()
    assert_as_exact(OP, inputs, {"training": training})
    y = decoder_head(**inputs, training=training, impl="triton")
    assert y.is_contiguous(memory_format=layout) and y.dtype == torch.float32


def test_without_affine_parameters(device, poisoned):
    assert_as_exact(OP, inputs_of((3, 8, 4, 4, 3), device=device) | {"weight": None, "bias": None}, {})


@pytest.mark.parametrize("impl", ("ref", "triton"))
def test_as_the_layers_it_stands_for(impl, device):
    inputs = inputs_of((4, 16, 6, 6, 3), device=device)
    norm, conv = torch.nn.BatchNorm2d(16, momentum=0.3).to(device), torch.nn.Conv2d(16, 3, 1, bias=False).to(device)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).copy_(inputs[name])
        conv.weight.copy_(inputs["head_weight"])
    batches = torch.tensor(4, device=device)
    y = decoder_head(**inputs, num_batches_tracked=batches, momentum=0.3, slope=0.02, impl=impl)
    a = torch.nn.functional.leaky_relu(norm(inputs["h"]), 0.02)
    torch.testing.assert_close(y, torch.sigmoid(conv(a) + inputs["head_bias"]))
    torch.testing.assert_close(inputs["running_mean"], norm.running_mean)
    torch.testing.assert_close(inputs["running_var"], norm.running_var)
    assert batches == 5


@pytest.mark.parametrize("training", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_gradcheck(training, device):
    if device == "cuda":
        pytest.skip("float64 only in the interpreter")
    inputs = inputs_of((3, 2, 2, 1, 1), torch.float64)
    names = [name for name, value in inputs.items() if value.requires_grad]

    def function(*values):
        fixed = {name: v.clone() for name, v in inputs.items() if name.startswith("running")}
        return decoder_head(**inputs | dict(zip(names, values, strict=True)) | fixed, training=training, impl="triton")

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names])


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("training", (True, False))
def test_non_finite_values_as_torch(value, training, device, poisoned):
    inputs = inputs_of((3, 8, 3, 3, 3), device=device)
    inputs["h"].data[1, 2, 0, 1] = value
    seeds, options = [], {"training": training}
    mine = run(decoder_head, inputs, seeds, **options, impl="triton")
    theirs = run(decoder_head_ref, inputs, seeds, **options)
    for name, got in mine.items():
        assert torch.equal(got.isnan(), theirs[name].isnan()), name
        torch.testing.assert_close(got, theirs[name], equal_nan=True)
    assert mine["out0"].isnan().all() == training


def test_saturated_outputs(device):
    """Logits of +-200: outputs of 0 and 1 and no gradient, rather than NaN."""
    inputs = inputs_of((2, 8, 2, 2, 1), device=device)
    inputs["head_bias"].data.copy_(torch.tensor([[[200.0, -200.0], [0.0, 200.0]]]))
    mine = run(decoder_head, inputs, [], impl="triton")
    assert mine["out0"][:, 0, 0, 0].eq(1).all() and mine["out0"][:, 0, 0, 1].eq(0).all()
    assert mine["dhead_bias"][0].eq(0).tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("impl", ("ref", "triton"))
@pytest.mark.parametrize("images", ((3, 2), (5, 0)), ids=str)
def test_statistics_of_two_ranks_equal_one_process(images, impl, device):
    """Each round plays both ranks with what they sent in the round before; two exchanges, so the third is exact."""
    inputs = inputs_of((5, 8, 3, 4, 3), device=device)
    plain = {name: v for name, v in inputs.items() if not name.startswith("running")}
    seeds, whole = [], {name: inputs[name].clone() for name in ("running_mean", "running_var")}
    expected = run(decoder_head_ref, plain | whole, seeds, momentum=0.2)
    shares, sent = [slice(0, images[0]), slice(images[0], 5)], [[], []]
    for _ in range(3):
        results = []
        for rank in (0, 1):
            mine = []

            def reduce(value, rank=rank, mine=mine):
                i = len(mine)
                mine.append(value)
                both = [sent[r][i] if len(sent[r]) > i else value for r in (0, 1)]
                both[rank] = value
                return torch.stack(both)

            part = plain | {"h": plain["h"].detach()[shares[rank]].requires_grad_()}
            running = {name: inputs[name].clone() for name in whole}
            seed = [seeds[0][shares[rank]]]
            results.append((run(decoder_head, part | running, seed, momentum=0.2, reduce=reduce, impl=impl), running))
            sent[rank] = mine
    (first, running), (second, _) = results
    for name, value in expected.items():
        joined = torch.cat([first[name], second[name]]) if name in ("out0", "dh") else first[name] + second[name]
        assert error(joined, value) <= (1e-6 if name == "out0" else 1e-5), name
    for name, value in running.items():
        torch.testing.assert_close(value, whole[name])


def test_refuses(device):
    inputs = inputs_of((2, 8, 3, 3, 3), device=device)
    for change, message in (
        ({"h": inputs["h"][:, :, 0]}, r"expected \[N, C, H, W\]"),
        ({"head_weight": inputs["head_weight"][:, :7]}, "head_weight must have shape"),
        ({"head_bias": inputs["head_bias"][:, :2]}, "head_bias must have shape"),
        ({"weight": None}, "in pairs"),
        ({"running_mean": None, "running_var": None, "training": False}, "needs running statistics"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder_head(**inputs | change)
    for shape in ((2, 257, 1, 1, 1), (2, 8, 1, 1, 5)):
        with pytest.raises(ValueError, match="at most 256 channels and 4 outputs"):
            decoder_head(**inputs_of(shape, device=device), impl="triton")
    with pytest.raises(ValueError, match="more than 1 value"):
        decoder_head(**inputs_of((1, 8, 1, 1, 3), device=device))
