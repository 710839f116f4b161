import pytest
import torch
from kernel_checks import assert_as_exact, error, run

from kernels.image_pair import image_pair, image_pair_ref
from kernels.latent_pair import latent_pair, latent_pair_ref
from kernels.ops import OPS
from kernels.random import keep_mask

IMAGE, LATENT = OPS["image_pair"], OPS["latent_pair"]
DROPOUT = {"dropout": 0.2, "offset": 3}
LAYOUTS = (torch.channels_last, torch.contiguous_format)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def slow(shapes):
    return [pytest.param(shape, marks=pytest.mark.slow) for shape in shapes]


IMAGE_LONG = [(n, c, hw, hw) for n in (2, 5) for c in (1, 2, 3, 8) for hw in (1, 5, 13, 32)]
LATENT_LONG = [(n, c) for n in (2, 3, 130) for c in (2, 6, 128, 514)] + list(LATENT.shapes.values())


@pytest.mark.parametrize(
    "shape", [(3, 3, 5, 5), (1, 1, 7, 3), (2, 3, 31, 31), (5, 3), *slow(IMAGE_LONG), *slow([(16, 3, 64, 64)])], ids=str
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@layouts
def test_image_shapes(shape, dtype, layout, device, poisoned):
    inputs = IMAGE.inputs(shape, dtype, device)
    if len(shape) == 4:
        inputs["x_tilde"] = inputs["x_tilde"].detach().contiguous(memory_format=layout).requires_grad_()
    assert_as_exact(IMAGE, inputs, DROPOUT)


@pytest.mark.parametrize("x_layout", LAYOUTS, ids=str)
@layouts
def test_image_layouts_may_differ(layout, x_layout, device, poisoned):
    inputs, seeds = IMAGE.inputs((3, 3, 5, 7), torch.float32, device), []
    expected = run(image_pair_ref, inputs, seeds, **DROPOUT)
    inputs["x"] = inputs["x"].contiguous(memory_format=x_layout)
    inputs["x_tilde"] = inputs["x_tilde"].detach().contiguous(memory_format=layout).requires_grad_()
    actual = run(image_pair, inputs, seeds, **DROPOUT, impl="triton")
    assert actual["out0"].is_contiguous(memory_format=layout)
    for name, value in actual.items():
        assert error(value, expected[name]) <= 1e-6, name


@pytest.mark.parametrize("x_type", (torch.uint8, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("types", ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)), ids=str)
def test_image_types(x_type, types, device, poisoned):
    """Whatever goes in, the output has the type asked for, and the gradient the type of x_tilde."""
    inputs, seeds = IMAGE.inputs((2, 3, 4, 4), types[0], device), []
    inputs["x"] = torch.arange(96, device=device).view(2, 3, 4, 4).to(x_type)
    actual, plain = (
        run(function, inputs, seeds, dtype=types[1], **DROPOUT, **kind)
        for function, kind in ((image_pair, {"impl": "triton"}), (image_pair_ref, {}))
    )
    assert (actual["out0"].dtype, actual["dx_tilde"].dtype) == types[::-1]
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype
        assert error(value, plain[name]) <= 8e-3, name
    whole = image_pair(inputs["x"], inputs["x_tilde"], types[1], impl="triton")
    scale = 255 if x_type == torch.uint8 else 1
    assert torch.equal(whole[:2], (inputs["x"].float() / scale).to(types[1]))


def test_image_bytes_scale_to_the_unit_range(device):
    x = torch.arange(256, dtype=torch.uint8, device=device).view(4, 64)
    y = image_pair(x, torch.zeros(4, 64, device=device), impl="triton")[:4]
    assert y.min() == 0 and y.max() == 1
    assert torch.equal((y * 255).round().to(torch.uint8), x)


def test_image_gradient_goes_to_samples_only(device):
    x = torch.rand(2, 3, 4, 4, device=device, requires_grad=True)
    x_tilde = torch.rand(2, 3, 4, 4, device=device, requires_grad=True)
    for impl in ("ref", "triton"):
        image_pair(x, x_tilde, impl=impl).sum().backward()
    assert x.grad is None
    assert torch.equal(x_tilde.grad, torch.full_like(x_tilde, 2))


@pytest.mark.parametrize("shape", [(2, 2), (3, 10, 1, 1), (5, 130), (7, 24), *slow(LATENT_LONG)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_latent_shapes(shape, dtype, device, poisoned):
    assert_as_exact(LATENT, LATENT.inputs(shape, dtype, device), DROPOUT)


@pytest.mark.parametrize("types", ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)), ids=str)
def test_latent_types_and_shapes(types, device, poisoned):
    inputs, seeds = LATENT.inputs((4, 16, 1, 1), types[0], device), []
    inputs["z"] = inputs["z"][:, :, None, None]
    actual, plain = (
        run(function, inputs, seeds, dtype=types[1], **DROPOUT, **kind)
        for function, kind in ((latent_pair, {"impl": "triton"}), (latent_pair_ref, {}))
    )
    assert actual["out0"].shape == (8, 8, 1, 1) and actual["out0"].dtype == types[1]
    assert actual["out1"].shape == (4, 8) and actual["out1"].dtype == torch.float32
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype
        assert error(value, plain[name]) <= 8e-3, name


@pytest.mark.parametrize("impl", ("ref", "triton"))
def test_latent_gradient_goes_through_the_reparameterisation_only(impl, device):
    inputs = LATENT.inputs((4, 16), torch.float32, device)
    inputs["eps"].requires_grad_()
    y, z_hat = latent_pair(**inputs, impl=impl)
    assert not z_hat.requires_grad
    seed = torch.randn_like(y)
    y.backward(seed)
    mu, log_sigma = inputs["encoded"].detach().chunk(2, dim=1)
    torch.testing.assert_close(z_hat, mu + log_sigma.exp() * inputs["eps"])
    torch.testing.assert_close(inputs["encoded"].grad[:, :8], seed[:4])
    torch.testing.assert_close(inputs["encoded"].grad[:, 8:], seed[:4] * log_sigma.exp() * inputs["eps"])
    assert inputs["eps"].grad is None


@pytest.mark.parametrize("case", ("image", "latent"))
def test_mask_is_that_of_plain_torch_and_of_backward(case, device):
    """Inputs without zeros: what is zero was dropped, over both halves, and gets no gradient."""
    rng = torch.tensor([7, 2**33], device=device)
    if case == "image":
        x = torch.full((3, 3, 5, 5), 255, dtype=torch.uint8, device=device)
        inputs = {"x": x, "x_tilde": torch.ones(3, 3, 5, 5, device=device, requires_grad=True)}
        function, given = image_pair, "x_tilde"
    else:
        ones = torch.ones(5, 6, device=device)
        inputs = {"encoded": torch.zeros(5, 12, device=device, requires_grad=True), "eps": ones, "z": ones}
        function, given = latent_pair, "encoded"
    outputs = function(**inputs, rng=rng, dropout=0.4, offset=5, impl="triton")
    y = outputs if case == "image" else outputs[0]
    keep = keep_mask(y, 0.4, rng, 5)
    assert torch.equal(y != 0, keep)
    y.backward(torch.ones_like(y))
    grad = inputs[given].grad
    expected = keep[3:] if case == "image" else keep[:5].repeat(1, 2)
    assert torch.equal(grad != 0, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_non_finite_numbers_come_through(device):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], device=device).repeat(4, 1)
    rng = torch.tensor([1, 2], device=device)
    y, plain = (
        image_pair(values, values, **DROPOUT, rng=rng, impl="triton"),
        image_pair_ref(values, values, **DROPOUT, rng=rng),
    )
    torch.testing.assert_close(y, plain, equal_nan=True)
    inputs = {
        "encoded": torch.cat([values, values.flip(1)], 1).requires_grad_(),
        "eps": values.t().contiguous(),
        "z": values,
    }
    seeds = []
    mine, theirs = run(latent_pair, inputs, seeds, impl="triton"), run(latent_pair_ref, inputs, seeds)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], equal_nan=True, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradcheck(layout, device):
    if device == "cuda":
        pytest.skip("float64 only in the interpreter")
    rng = torch.tensor([3, 4])
    x = torch.randint(256, (2, 2, 2, 1), dtype=torch.uint8)
    x_tilde = torch.rand(2, 2, 2, 1).double().contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: image_pair(x, t, None, 0.4, rng, impl="triton"), x_tilde)
    encoded, (eps, z) = torch.randn(3, 4).double().requires_grad_(), torch.randn(2, 3, 2).double()
    assert torch.autograd.gradcheck(lambda e: latent_pair(e, eps, z, None, 0.4, rng, impl="triton")[0], encoded)


def test_refuses(device):
    x, codes = torch.zeros(2, 3, 4, 4, device=device), torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="x_tilde"):
        image_pair(x, x[:1])
    with pytest.raises(TypeError, match="no kernel for torch.int64"):
        image_pair(x.long(), x)
    with pytest.raises(TypeError, match="to torch.int32"):
        image_pair(x, x, torch.int32)
    with pytest.raises(ValueError, match=r"\[N, 2L, 1, 1\]"):
        latent_pair(torch.zeros(2, 7, device=device), codes, codes)
    with pytest.raises(ValueError, match=r"\[N, 2L, 1, 1\]"):
        latent_pair(torch.zeros(2, 16, 2, 2, device=device), codes, codes)
    with pytest.raises(ValueError, match=r"z: expected \[2, 8\]"):
        latent_pair(torch.zeros(2, 16, device=device), codes, codes[:1])
    with pytest.raises(TypeError, match="must be floating"):
        latent_pair(torch.zeros(2, 16, device=device), codes, codes.int())
    with pytest.raises(ValueError, match="dropout needs rng"):
        latent_pair(torch.zeros(2, 16, device=device), codes, codes, dropout=0.2)
