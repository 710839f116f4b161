"""The real training step of every recipe with the Triton kernels, against the same step in plain PyTorch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from support import batch, recipe

from ali_dist.levers import FAST
from ali_dist.recipe import Recipe, UserError
from ali_dist.recipes import CONDITIONAL, RECIPES, SEMI_SUPERVISED
from ali_dist.state import TrainState
from ali_dist.step import step
from ali_dist.tables import NETWORKS
from kernels import FlatAdam, dispatch

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or dispatch.INTERPRET), reason="triton was imported without its interpreter"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WITHOUT_BN_IN_D = {"adam", "image_pair", "latent_pair", "bn_leaky_relu", "maxout", "decoder_head"}
WITH_BN_IN_D = WITHOUT_BN_IN_D - {"maxout"} | {"bias_leaky_relu_dropout", "joint_input"}
FILES = {  # file of a kernel -> the op it belongs to
    "bn_forward": "bn_leaky_relu",
    "bn_backward": "bn_leaky_relu",
    "joint_kernels": "joint_input",
    "head_kernels": "decoder_head",
}


def start(name: str, impl: str, batch_size: int) -> TrainState:
    return start_recipe(fitted(RECIPES[name], batch_size), impl)


def fitted(base: Recipe, batch_size: int) -> Recipe:
    semi = dataclasses.replace(base.semi, labelled_batch=1)
    optim = dataclasses.replace(base.optim, batch_size=batch_size)
    return dataclasses.replace(base, precision="fp32", optim=optim, semi=semi)


def start_recipe(recipe: Recipe, impl: str) -> TrainState:
    shape = NETWORKS[recipe.networks].image
    return TrainState(recipe, torch.full(shape, 0.3, dtype=torch.float64), DEVICE, impl)


def gradients(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in state.model.named_parameters()}


@pytest.mark.parametrize(
    "name, size",
    [
        ("digits", 4),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("cifar10", "svhn")),
        *(pytest.param(name, 2, marks=pytest.mark.soak) for name in ("celeba", "tinyimagenet")),
    ],
)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 is the interpreter's")
def test_the_step_runs_on_the_kernels_and_gives_the_references_gradients(float64, name, size):
    """In float64: batch norm over two values cancels most of float32's digits."""
    one = batch(size, shape=NETWORKS[RECIPES[name].networks].image)
    mine, theirs = start(name, "triton", size), start(name, "ref", size)
    assert all(isinstance(optimizer, FlatAdam) for optimizer in mine.optimizers.values())
    with dispatch.record_launches() as launches:
        step(mine, [one])
    with dispatch.record_launches() as none:
        step(theirs, [one])
    files = {launch.kernel.fn.__module__.removeprefix("kernels.") for launch in launches}
    assert {FILES.get(file, file) for file in files} == (WITHOUT_BN_IN_D if name == "cifar10" else WITH_BN_IN_D)
    assert not none
    expected = gradients(theirs)
    for key, gradient in gradients(mine).items():
        assert (gradient - expected[key]).norm() <= 1e-9 * expected[key].norm() + 1e-15, key
    for key, buffer in mine.model.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.model.named_buffers())[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "recipe, size",
    [
        (CONDITIONAL["digits"], 4),
        (SEMI_SUPERVISED["digits"], 4),
        pytest.param(CONDITIONAL["cifar10"], 2, marks=pytest.mark.soak),
        pytest.param(SEMI_SUPERVISED["cifar10"], 2, marks=pytest.mark.soak),
    ],
    ids=lambda value: getattr(value, "networks", str(value)),
)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 is the interpreter's")
def test_labels_go_through_the_kernels_too(float64, recipe, size):
    nets, recipe = NETWORKS[recipe.networks], fitted(recipe, size)
    one = batch(size, shape=nets.image, labelled=round(size * recipe.labelled_share))
    mine, theirs = (start_recipe(recipe, impl) for impl in ("triton", "ref"))
    for state in (mine, theirs):
        step(state, [one])
    expected = gradients(theirs)
    for key, gradient in gradients(mine).items():
        assert (gradient - expected[key]).norm() <= 1e-9 * expected[key].norm() + 1e-15, key


@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 is the interpreter's")
def test_both_losses_go_back_through_the_kernels_in_one_sweep(float64):
    levers, found = dataclasses.replace(FAST, stacked_seeds=True), []
    for impl, chosen in (("triton", levers), ("ref", dataclasses.replace(FAST, stacked_seeds=False))):
        mean = torch.full((1, 32, 32), 0.3, dtype=torch.float64)
        state = TrainState(recipe(networks="small", batch_size=4), mean, DEVICE, impl, chosen)
        step(state, [batch(4)])
        found.append(gradients(state))
    for key, gradient in found[0].items():
        assert (gradient - found[1][key]).norm() <= 1e-9 * found[1][key].norm() + 1e-15, key


def test_the_first_updates_agree():
    """A short curve of the digits recipe: rounding alone tells the two apart, and grows from update to update."""
    curves = []
    for impl in ("triton", "ref"):
        state = start("digits", impl, 4)
        curves.append([step(state, [batch(4, seed=i)])[0]["loss/d"].mean().item() for i in range(3)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.soak
@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 is the interpreter's")
def test_curves_of_many_updates_agree(float64):
    """A tiny ALI on real digits. In float32 rounding grows to 1e-3 within 20 updates, which would hide a fault."""
    images = torch.from_numpy(load_digits().images).mul(255 / 16).round().to(torch.uint8)[:, None]
    images = F.interpolate(images, size=(32, 32))
    rng, curves = torch.Generator().manual_seed(0), {}
    picks = torch.randint(0, len(images), (25, 8), generator=rng)
    for impl in ("triton", "ref"):
        state = TrainState(recipe(lr=1e-3), torch.full((1, 32, 32), 0.3, dtype=torch.float64), DEVICE, impl)
        reports = [step(state, [dataclasses.replace(batch(8), x=images[rows])])[0] for rows in picks]
        curves[impl] = torch.stack([torch.stack([r["loss/d"].mean(), r["loss/g"].mean()]) for r in reports])
    mine, theirs = curves["triton"], curves["ref"]
    assert theirs[-1, 0] < theirs[0, 0] - 0.1  # D has learnt something to disagree about
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=0)


def test_on_a_cpu_auto_is_plain_pytorch():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    state = start("digits", "auto", 4)
    with dispatch.record_launches() as launches:
        step(state, [batch(4)])
    assert not launches and not any(isinstance(optimizer, FlatAdam) for optimizer in state.optimizers.values())


def test_kernels_asked_for_where_they_cannot_run_are_refused(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    with pytest.raises(UserError, match="--impl triton"):
        start("digits", "triton", 4)
