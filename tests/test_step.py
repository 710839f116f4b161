"""The update against a second derivation in float64: plain functions, two losses, two calls of autograd.grad."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support import assert_same, batch, copies, recipe
from torch.utils._python_dispatch import TorchDispatchMode

from ali_dist import dist, objective
from ali_dist import step as steps
from ali_dist.finite import NonFinite
from ali_dist.levers import PLAIN, Levers
from ali_dist.state import TrainState
from ali_dist.step import draw_noise, step, training_images
from ali_dist.supervised import supervised_step
from kernels.random import dropout_scale, keep_mask

MEAN = torch.full((1, 32, 32), 0.3, dtype=torch.float64)
SEMI = {"labels": 10, "labelled_batch": 3}


def start(mean=MEAN, **changes) -> TrainState:
    return TrainState(recipe(**changes), mean, torch.device("cpu"))


def drop(x, p, rng, offset):
    return x * keep_mask(x, p, rng, offset) * dropout_scale(p) if p else x


def apply(rows, slope, weights, prefix, x, rng=None, offsets=(), c=None):
    """`offsets` of the dropout on each row's input; None where it has been done. `c`: the label's embedding."""
    for i, row in enumerate(rows):
        at = f"{prefix}.{i}."
        if row.embedding and c is not None:
            x = torch.cat([x, c], dim=1)
        if offsets and offsets[i] is not None:
            x = drop(x, row.dropout, rng, offsets[i])
        x = (F.conv_transpose2d if row.transposed else F.conv2d)(x, weights[at + "weight"], stride=row.stride)
        if row.bn:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            x = (x - mean) / torch.sqrt(var + 1e-4)
            x = x * weights[at + "bn.weight"].view(-1, 1, 1) + weights[at + "bn.bias"].view(-1, 1, 1)
        elif row.bias == "channel":
            x = x + weights[at + "bias"].view(-1, 1, 1)
        elif row.bias == "pixel":
            x = x + weights[at + "bias"]
        if row.act == "lrelu":
            x = torch.where(x > 0, x, slope * x)
        elif row.act == "maxout":
            x = torch.maximum(x[:, 0::2], x[:, 1::2])
        elif row.act == "sigmoid":
            x = 1 / (1 + torch.exp(-x))
    return x


def judge(nets, weights, x, z, eps, rng, c=None):
    """D's last features and logits, q's first; `c` [N, E, 1, 1] is the embedding of y in conditional networks."""
    x, z = x.double() / 255, z[:, :, None, None]
    mu, log_sigma = apply(nets.encoder, nets.slope, weights, "encoder", x, c=c).chunk(2, dim=1)
    z_hat = mu + torch.exp(log_sigma) * eps[:, :, None, None]
    x_tilde = apply(nets.decoder, nets.slope, weights, "decoder", z, c=c)
    rows_x, rows_z, rows_joint = nets.discriminator_x, nets.discriminator_z, nets.discriminator_joint
    first_z, first_joint = 2 + len(rows_x), 2 + len(rows_x) + len(rows_z)
    offsets = [0, *range(2, first_z - 1)], [1, *range(first_z, first_joint - 1)], [None, *range(first_joint, 99)]
    of_x = apply(rows_x, nets.slope, weights, "discriminator.x", torch.cat([x, x_tilde]), rng, offsets[0])
    of_z = apply(rows_z, nets.slope, weights, "discriminator.z", torch.cat([z_hat, z]), rng, offsets[1])
    p = rows_joint[0].dropout
    labels = [] if c is None else [torch.cat([c.detach(), c.detach()])]
    if rows_x[-1].bn:  # one mask over all, drawn where they are put side by side
        joint = drop(torch.cat([of_x, of_z, *labels], dim=1), p, rng, first_z - 1)
    else:
        parts = [drop(of_x, p, rng, first_z - 1), drop(of_z, p, rng, first_joint - 1)]
        joint = torch.cat([*parts, *(drop(label, p, rng, first_joint + len(rows_joint)) for label in labels)], dim=1)
    *hidden, head = rows_joint
    features = apply(hidden, nets.slope, weights, "discriminator.joint", joint, rng, offsets[2])
    features = drop(features, head.dropout, rng, offsets[2][len(hidden)])
    weight, bias = (weights[f"discriminator.joint.{len(hidden)}.{name}"] for name in ("weight", "bias"))
    return features.flatten(1), features.flatten(1) @ weight.flatten(1).T + bias


def losses(nets, weights, x, z, eps, rng, c=None):
    """L_D and L_G, as the paper writes them."""
    d = torch.sigmoid(judge(nets, weights, x, z, eps, rng, c)[1]).flatten()
    q, p = d.chunk(2)
    loss_d = -torch.log(q).mean() - torch.log(1 - p).mean()
    loss_g = -torch.log(1 - q).mean() - torch.log(p).mean()
    return loss_d, loss_g


def semi_losses(nets, weights, x, z, eps, rng, y, matching):
    """L_D and L_G with K + 1 classes, from their softmax; or G's squared distance of mean features."""
    features, logits = judge(nets, weights, x, z, eps, rng)
    q, p = torch.cat([logits, logits.new_zeros(len(logits), 1)], dim=1).softmax(1).chunk(2)
    labelled = y >= 0
    own, others = q[labelled].gather(1, y[labelled][:, None]), q[~labelled]
    loss_d = -own.log().mean() - (1 - others[:, -1]).log().mean() - p[:, -1].log().mean()
    loss_g = -others[:, -1].log().mean() - (1 - p[:, -1]).log().mean()
    of_q, of_p = features.chunk(2)
    return loss_d, (of_q[~labelled].mean(0) - of_p.mean(0)).square().sum() if matching else loss_g


def parameters(state) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in state.model.named_parameters()}


def embedded(state, weights, y):
    """W onehot(y) + b."""
    if state.model.embedding is None:
        return None
    fixed = {f"embedding.{name}": tensor for name, tensor in state.model.embedding.state_dict().items()}
    weight, bias = ({**fixed, **weights}[f"embedding.{name}"] for name in ("weight", "bias"))
    return (weight[:, y] + bias[:, None]).T[:, :, None, None]


def expected_gradients(state, weights, batches) -> dict[str, torch.Tensor]:
    """Of L_D for the discriminator and of L_G for encoder and decoder, each a mean over the micro-batches."""
    of_d = [name for name in weights if name.startswith("discriminator.")]
    of_g = [name for name in weights if name not in of_d]
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for micro, one in enumerate(batches):
        noise, semi = draw_noise(state, one, micro), state.recipe.semi
        if semi.labels:
            found = semi_losses(state.model.nets, weights, one.x, *noise, one.y, semi.feature_matching)
        else:
            found = losses(state.model.nets, weights, one.x, *noise, embedded(state, weights, one.y))
        loss_d, loss_g = found
        for names, loss in ((of_d, loss_d), (of_g, loss_g)):
            gradients = torch.autograd.grad(loss, [weights[name] for name in names], retain_graph=True)
            for name, gradient in zip(names, gradients, strict=True):
                total[name] += gradient / len(batches)
    return total


def gradients(state) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in state.model.named_parameters()}


def assert_close(mine, theirs, tolerance=1e-10):
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert (mine[name] - theirs[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize(
    "networks, size, changes",
    [
        *[("small-dry", 8, {}), ("small", 8, {}), ("digits", 4, {}), ("cifar10", 2, {})],
        *[("small-conditional", 8, {}), ("cifar10-conditional", 2, {})],
        *[("small-classes", 8, SEMI), ("cifar10-classes", 4, {**SEMI, "labelled_batch": 1})],
        *[("small-classes", 8, {**SEMI, "feature_matching": True})],
        *[("small-conditional", 8, {"train_embedding": True}), ("cifar10-conditional", 2, {"train_embedding": True})],
    ],
)
def test_gradients_in_float64(float64, networks, size, changes):
    shape = (3, 32, 32) if networks.startswith("cifar10") else (1, 32, 32)
    state = start(MEAN.expand(shape), networks=networks, batch_size=size, **changes)
    one = batch(size, shape=shape, labelled=round(size * state.recipe.labelled_share))
    for parameter in state.model.parameters():  # away from zero biases and tiny weights, where little could go wrong
        parameter.data.add_(torch.randn_like(parameter), alpha=0.03)
    expected = expected_gradients(state, parameters(state), [one])
    assert min(gradient.abs().max() for gradient in expected.values()) > 1e-9
    reports = step(state, [one])
    assert_close(gradients(state), expected)
    for part in {name.split(".")[0] for name in expected}:
        squares = sum(g.square().sum() for name, g in expected.items() if name.startswith(part))
        assert reports[-1][f"grad_norm/{part}"].item() == pytest.approx(math.sqrt(squares), rel=1e-10)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_add_up(float64, accumulate):
    state = start(networks="small", batch_size=16, accumulate=accumulate)
    micro = [batch(16 // accumulate, seed=i) for i in range(accumulate)]
    expected = expected_gradients(state, parameters(state), micro)
    reports = step(state, micro)
    assert_close(gradients(state), expected)
    assert state.num_images == 16
    assert len(reports) == accumulate + 1
    assert [len(report["loss/d"]) for report in reports[:-1]] == [16 // accumulate] * accumulate


def test_reported_measures(float64):
    state = start(networks="small-dry")
    one, weights = batch(8), parameters(state)
    loss_d, loss_g = losses(state.model.nets, weights, one.x, *draw_noise(state, one, 0))
    report, norms = step(state, [one])
    assert report["loss/d"].mean().item() == pytest.approx(loss_d.item(), abs=1e-12)
    assert report["loss/g"].mean().item() == pytest.approx(loss_g.item(), abs=1e-12)
    assert set(report) == {"loss/d", "loss/g", "accuracy/data", "accuracy/sample", "mu", "sigma", "z_hat", "x_tilde"}
    assert set(norms) == {"grad_norm/encoder", "grad_norm/decoder", "grad_norm/discriminator"}
    assert report["mu"].shape == report["sigma"].shape == report["z_hat"].shape == (8, 4)
    assert (report["sigma"] > 0).all()
    assert not any(value.requires_grad for value in report.values())


@pytest.mark.parametrize("matching", [False, True])
def test_semi_supervised_measures(float64, matching):
    state = start(networks="small-classes-dry", feature_matching=matching, **SEMI)
    one, weights = batch(8, labelled=3), parameters(state)
    noise = draw_noise(state, one, 0)
    _, logits = judge(state.model.nets, weights, one.x, *noise)
    minimised = semi_losses(state.model.nets, weights, one.x, *noise, one.y, matching)
    report, _ = step(state, [one])
    assert set(report) >= {"loss/d", "loss/g", "loss/labelled", "error/labelled", "accuracy/data"}
    for name, theirs in zip(("loss/d", "loss/g"), minimised, strict=True):
        assert report[name].mean().item() == pytest.approx(theirs.item(), rel=1e-9, abs=1e-15) and theirs > 0
    log_p = torch.cat([logits, logits.new_zeros(16, 1)], dim=1).log_softmax(1)
    wrong = (logits[5:8].argmax(1) != one.y[5:]).double()
    for name, theirs in {"error/labelled": wrong, "loss/labelled": -log_p[[5, 6, 7], one.y[5:]]}.items():
        assert report[name].shape == (8,) and not report[name][:5].any()
        torch.testing.assert_close(report[name].mean(), theirs.mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(report["accuracy/data"], 1 - log_p[:8, 10].exp(), rtol=0, atol=1e-10)
    torch.testing.assert_close(report["accuracy/sample"], log_p[8:, 10].exp(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("networks", ["small-classes", "cifar10-classes"])
def test_the_supervised_baseline_is_cross_entropy_of_d_alone(float64, networks):
    shape = (3, 32, 32) if networks.startswith("cifar10") else (1, 32, 32)
    state = start(MEAN.expand(shape), networks=networks, labels=10, supervised_only=True)
    one, nets, generator = batch(8, shape=shape), state.model.nets, copies(state.model.encoder.state_dict())
    for parameter in state.model.discriminator.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.03)
    weights, seen = parameters(state), []
    state.model.discriminator.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    report, norms = supervised_step(state, [one])
    ((x, z, rng), (logits, _)), *more = seen
    assert not more and len(x) == 8 and not z.any()
    dropped = drop(one.x.double() / 255, nets.discriminator_x[0].dropout, draw_noise(start(), one, 0).rng, 0)
    torch.testing.assert_close(x, dropped)
    names = [name for name in weights if name.startswith("discriminator.")]
    expected = -logits.log_softmax(1)[range(8), one.y].mean()
    state.model.zero_grad()
    by_hand = torch.autograd.functional.jacobian(
        lambda *values: (
            -torch.func.functional_call(
                state.model.discriminator, dict(zip((n[14:] for n in names), values, strict=True)), (x, z, rng)
            )[0]
            .log_softmax(1)[range(8), one.y]
            .mean()
        ),
        tuple(weights[name].detach() for name in names),
    )
    assert set(norms) == {"grad_norm/discriminator"}
    norm = math.sqrt(sum(g.square().sum() for g in by_hand))
    assert norms["grad_norm/discriminator"].item() == pytest.approx(norm, rel=1e-9) and norm > 0
    assert report["error/labelled"].tolist() == (logits.argmax(1) != one.y).tolist()
    assert report["loss/labelled"].mean().item() == pytest.approx(expected.item(), rel=1e-12) and expected > 0
    assert state.num_images == 8 and set(state.optimizers) == {"discriminator"}
    assert_same(generator, state.model.encoder.state_dict())
    assert not torch.equal(weights[names[0]], dict(state.model.named_parameters())[names[0]])


@pytest.mark.parametrize("scaled", ["d", "g"])
def test_each_gradient_is_free_of_the_other_loss(float64, monkeypatch, scaled):
    plain, changed = start(), start()
    step(plain, [batch(8)])
    original = objective.per_image_losses

    def with_one_loss_scaled(a, b):
        loss_d, loss_g = original(a, b)
        return (loss_d * 1000, loss_g) if scaled == "d" else (loss_d, loss_g * 1000)

    monkeypatch.setattr(objective, "per_image_losses", with_one_loss_scaled)
    step(changed, [batch(8)])
    mine, theirs = gradients(changed), gradients(plain)
    for name in mine:
        if name.startswith("discriminator.") == (scaled == "d"):
            torch.testing.assert_close(mine[name], 1000 * theirs[name], rtol=1e-6, atol=1e-10)
            assert not torch.equal(mine[name], theirs[name])
        else:
            assert torch.equal(mine[name], theirs[name]), name


class HandAdam:
    """Kingma and Ba's algorithm 1."""

    def __init__(self, optim):
        self.optim, self.t, self.m, self.v = optim, 0, {}, {}

    def update(self, weights, gradients):
        o = self.optim
        self.t += 1
        out = {}
        for name, g in gradients.items():
            self.m[name] = o.beta1 * self.m.get(name, 0) + (1 - o.beta1) * g
            self.v[name] = o.beta2 * self.v.get(name, 0) + (1 - o.beta2) * g * g
            m_hat, v_hat = self.m[name] / (1 - o.beta1**self.t), self.v[name] / (1 - o.beta2**self.t)
            moved = weights[name].detach() - o.lr * m_hat / (torch.sqrt(v_hat) + o.adam_eps)
            out[name] = moved.requires_grad_()
        return out


def test_both_updates_use_the_weights_from_before_either(float64):
    state = start(networks="small-dry", lr=1e-2)
    weights, adam = parameters(state), HandAdam(state.recipe.optim)
    sequential = None
    for i in range(2):
        one = batch(8, seed=i)
        expected = expected_gradients(state, weights, [one])
        moved = adam.update(weights, expected)
        if i == 0:  # what a step that moved the discriminator first would give
            half = {name: (moved if name.startswith("discriminator.") else weights)[name] for name in weights}
            sequential = expected_gradients(state, half, [one])
        step(state, [one])
        assert_close(gradients(state), expected, 1e-9)
        if i == 0:
            name = "decoder.6.weight"
            assert (gradients(state)[name] - sequential[name]).abs().max() > 1e-6
        weights = moved
        assert_close(dict(state.model.named_parameters()), weights, 1e-9)
    assert state.num_images == 16


def test_batch_norm_of_d_sees_both_halves_once(float64):
    state = start(networks="small-dry")
    seen = []
    bn = state.model.discriminator.x[1].bn
    bn.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    step(state, [batch(8)])
    (both,) = seen
    assert len(both) == 16
    torch.testing.assert_close(bn.running_mean, 0.05 * both.mean((0, 2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(bn.running_var, 0.95 + 0.05 * both.var((0, 2, 3)), rtol=0, atol=1e-12)
    assert all(n == 1 for name, n in state.model.named_buffers() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    "network, value, named",
    [("encoder", math.nan, ("grad_norm/encoder", "loss/d", "loss/g")), ("decoder", math.inf, ("grad_norm/decoder",))],
)
def test_a_bad_weight_stops_before_the_optimizers_move(network, value, named):
    state = start()
    step(state, [batch(8)])
    with torch.no_grad():
        getattr(state.model, network)[0].weight[0, 0, 0, 0] = value
    before = copies(dict(state.model.named_parameters()))
    averaged = copies(state.averaged.state_dict())
    moments = copies({name: t for name, t in state.tensors().items() if name.startswith("adam.")})
    with pytest.raises(NonFinite) as error:
        step(state, [batch(8, seed=1)])
    assert str(error.value).endswith(" not finite in the update after 8 images")
    assert set(named) <= set(error.value.names) and error.value.num_images == 8
    after = dict(state.model.named_parameters())
    for name in before:
        assert torch.equal(before[name].view(torch.int32), after[name].detach().view(torch.int32)), name
    assert_same(moments, {name: t for name, t in state.tensors().items() if name.startswith("adam.")})
    assert_same(averaged, state.averaged.state_dict())
    assert state.num_images == 8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_alone_is_named_and_stops(bad):
    state = start()
    state.model.discriminator.joint[0].bias.register_hook(lambda gradient: gradient * bad)
    before = copies(dict(state.model.named_parameters()))
    with pytest.raises(NonFinite, match="^grad_norm/discriminator not finite in the update after 0 images$"):
        step(state, [batch(8)])
    assert_same(before, dict(state.model.named_parameters()))
    assert state.num_images == 0


def test_a_bad_loss_of_an_earlier_micro_batch_stops_too(monkeypatch):
    state, original, calls = start(batch_size=16, accumulate=2), steps.report, []

    def first_is_infinite(*args):
        calls.append(1)
        values = original(*args)
        return values | {"loss/d": values["loss/d"] + (math.inf if len(calls) == 1 else 0)}

    monkeypatch.setattr(steps, "report", first_is_infinite)
    with pytest.raises(NonFinite, match="loss/d"):
        step(state, [batch(8), batch(8, seed=1)])


def test_averaged_weights():
    state = start(ema_half_life=2)
    expected = {name: t.double() for name, t in state.model.state_dict().items()}
    for i, half_life in enumerate((0.4, 0.8, 1.2, 1.6, 2.0, 2.0)):  # 5 % of the images seen, at most 2
        step(state, [batch(8, seed=i)])
        kept = 0.5 ** (8 / half_life)
        for name, t in state.model.state_dict().items():
            expected[name] = kept * expected[name] + (1 - kept) * t.double()
    averaged = state.averaged.state_dict()
    assert averaged["decoder.0.bn.num_batches_tracked"] == 6
    for name, t in averaged.items():
        if t.is_floating_point():
            torch.testing.assert_close(t.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(averaged["decoder.0.weight"], state.model.decoder[0].weight)
    assert not state.averaged.training and not any(p.requires_grad for p in state.averaged.parameters())


def test_averaged_weights_of_a_long_half_life_lag():
    state = start(ema_half_life=10**9)
    state.num_images = 10**6
    before = state.model.encoder[0].weight.detach().clone()
    step(state, [batch(8)])
    kept = 0.5 ** (8 / (0.05 * (10**6 + 8)))
    expected = before.double() * kept + state.model.encoder[0].weight.detach().double() * (1 - kept)
    assert (state.averaged.encoder[0].weight - expected).abs().max() < 1e-8


def test_noise_does_not_depend_on_the_workers(monkeypatch):
    state = start(batch_size=9)
    whole = draw_noise(state, batch(9), 0)
    assert whole.z.shape == whole.eps.shape == (9, 4) and not torch.equal(whole.z, whole.eps)
    dropout = {}
    for rank, rows in enumerate(([0, 3, 6], [1, 4, 7, 8], [2, 5])):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        part = draw_noise(state, batch(9, rows), 0)
        assert torch.equal(part.z, whole.z[rows]) and torch.equal(part.eps, whole.eps[rows])
        dropout[rank] = part.rng.tolist()
    assert dropout[0] != dropout[1] != dropout[2] != dropout[0]


def test_flips_mirror_half_of_the_images_the_same_ones_for_any_worker():
    size = 400
    plain, flips = (start(batch_size=size, flips=on) for on in (False, True))
    whole = batch(size)
    assert torch.equal(training_images(plain, whole, 0), whole.x)
    x = training_images(flips, whole, 0)
    mirrored = (x == whole.x.flip(3)).flatten(1).all(1)
    assert torch.equal(x[~mirrored], whole.x[~mirrored]) and 160 < mirrored.sum() < 240
    rows = list(range(1, size, 3))
    assert torch.equal(training_images(flips, batch(size, rows), 0), x[rows])
    assert not torch.equal(training_images(flips, whole, 1), x)
    flips.num_images += size
    assert not torch.equal(training_images(flips, whole, 0), x)


def test_flips_reach_the_update():
    losses = [step(start(flips=on), [batch(8)])[0]["loss/d"] for on in (False, True)]
    assert not torch.equal(*losses)


def test_noise_is_new_for_each_update_and_micro_batch_and_the_same_again():
    state = start()
    draws = [draw_noise(state, batch(8), micro) for micro in (0, 1)]
    state.num_images = 8
    draws.append(draw_noise(state, batch(8), 0))
    other = start(seed=1)
    draws.append(draw_noise(other, batch(8), 0))
    for i, one in enumerate(draws):
        assert all(not torch.equal(one.z, another.z) for another in draws[:i])
        assert all(not torch.equal(one.rng, another.rng) for another in draws[:i])
    assert torch.equal(draw_noise(start(), batch(8), 0).z, draws[0].z)
    moments = torch.stack([*draws[0][:2], *draws[1][:2]])
    assert abs(moments.mean()) < 0.3 and 0.7 < moments.std() < 1.3


def test_the_same_seed_gives_the_same_weights():
    one, two, other = start(), start(), start(seed=1)
    assert_same(one.model.state_dict(), two.model.state_dict())
    assert not torch.equal(one.model.encoder[0].weight, other.model.encoder[0].weight)
    assert_same(one.model.state_dict(), one.averaged.state_dict())


def test_bf16_keeps_weights_and_losses_in_float32():
    plain, low = start(), start(precision="bf16")
    for state in (plain, low):
        report, _ = step(state, [batch(8)])
        assert report["loss/d"].dtype == report["z_hat"].dtype == torch.float32
    kinds = []
    low.model.encoder[1].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    step(low, [batch(8)])
    assert kinds == [torch.bfloat16]
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}
    mine, theirs = gradients(low)["decoder.6.weight"], gradients(plain)["decoder.6.weight"]
    assert not torch.equal(mine, theirs)


class Convolutions(TorchDispatchMode):
    """Of each convolution's backward pass: rows, in and out channels, and whether input and weight get a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            (rows, out), channels, wanted = args[0].shape[:2], args[1].shape[1], args[-1][:2]
            self.made.append((rows, channels, out, *wanted))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "networks, channels, out, sweeps", [("small-dry", 1, 2, 2), ("small-alone", 3, 2, 1)], ids=["batch norm", "alone"]
)
def test_no_gradient_is_made_that_nobody_needs(networks, channels, out, sweeps):
    """D's first layer: its weights' gradient once, from all pairs, and its input's once, for the samples alone."""
    state = start(MEAN.expand(channels, 32, 32), networks=networks)
    layers = state.model.discriminator.x
    assert layers[0].weight.shape[:2] == (out, channels) and state.one_sweep == (sweeps == 1)
    with Convolutions() as mode:
        step(state, [batch(8, shape=(channels, 32, 32))])
    first = [made[3:] for made in mode.made if made[1:3] == (channels, out) and made[0] == 16]
    assert first == [(False, True)]
    assert [made for made in mode.made if made[1] == channels and made[3]] == [(8, channels, out, True, False)]
    second = [made[3:] for made in mode.made if made[:3] == (16, layers[1].weight.shape[1], layers[1].weight.shape[0])]
    assert sum(weight for _, weight in second) * sweeps == sum(x for x, _ in second) > 0


@pytest.mark.parametrize("scale", [1, 30, 200])
def test_one_sweep_gives_both_gradients_however_sure_d_is(float64, scale):
    """Logits of tens, where one loss's gradient is next to nothing beside the other's; hundreds stay finite."""
    states = [
        TrainState(recipe(networks="small-alone"), MEAN.expand(3, 32, 32), torch.device("cpu"), levers=levers)
        for levers in (Levers(one_sweep=True), Levers(one_sweep=False))
    ]
    for state in states:
        head = state.model.discriminator.joint[-1]
        head.weight.data.fill_(0.1)
        head.bias.data.fill_(scale)
        step(state, [batch(8, shape=(3, 32, 32))])
    assert states[0].one_sweep and not states[1].one_sweep
    mine, theirs = (gradients(state) for state in states)
    assert all(gradient.isfinite().all() for gradient in mine.values())
    if scale < 60:
        for name, gradient in theirs.items():
            assert (mine[name] - gradient).norm() <= 1e-11 * gradient.norm(), name


STACKED = dataclasses.replace(PLAIN, stacked_seeds=True)


def start_with(levers, **changes) -> TrainState:
    settings = recipe(**changes)
    shape = (3, 32, 32) if "alone" in settings.networks else (1, 32, 32)
    return TrainState(settings, MEAN.expand(shape), torch.device("cpu"), levers=levers)


@pytest.mark.parametrize(
    "changes",
    [
        *[{"networks": name} for name in ("small", "small-alone", "small-conditional", "small-attributes")],
        {"networks": "small-conditional", "train_embedding": True},
        {"networks": "small-classes", **SEMI},
        {"networks": "small-classes", **SEMI, "feature_matching": True},
        {"networks": "small-alone-conditional"},
        {"networks": "small-alone-classes", **SEMI, "feature_matching": True},
    ],
    ids=str,
)
def test_stacked_seeds_give_the_gradients_of_two_sweeps(float64, changes):
    """With dropout, whose masks both losses' gradients go back through."""
    states, reports = [start_with(levers, **changes) for levers in (STACKED, PLAIN)], []
    assert states[0].stacked_seeds and not states[1].stacked_seeds
    shape = tuple(states[0].model.nets.image)
    one = batch(8, shape=shape, labelled=round(8 * states[0].recipe.labelled_share))
    if "attributes" in changes["networks"]:
        one = dataclasses.replace(one, y=torch.randint(0, 2, (8, 3)))
    for state in states:
        with torch.random.fork_rng():
            for parameter in state.model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.03)
        reports.append(step(state, [one])[0])
    mine, theirs = (gradients(state) for state in states)
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= 1e-10 * gradient.norm() > 0, name
    assert_same(*reports)
    assert_close(dict(states[0].model.named_buffers()), dict(states[1].model.named_buffers()), 0)


def test_stacked_seeds_in_bfloat16():
    """What is rounded is the same; the products of more rows may add up in another order."""
    states = [start_with(levers, precision="bf16") for levers in (STACKED, PLAIN)]
    reports = [step(state, [batch(8)])[0] for state in states]
    assert_same(*reports)
    mine, theirs = (gradients(state) for state in states)
    for name, gradient in theirs.items():
        assert mine[name].dtype == torch.float32
        assert (mine[name] - gradient).norm() <= 2e-2 * gradient.norm() > 0, name


class InputGradients(TorchDispatchMode):
    """How often a convolution or product makes its input's gradient: by its weight's shape, and the rows it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default and args[-1][0]:
            self.calls[tuple(args[2].shape), len(args[0])] += 1
        elif function is torch.ops.aten.mm.default:
            self.calls[tuple(args[1].shape), len(args[0])] += 1
        return function(*args, **(kwargs or {}))


def test_stacked_seeds_halve_the_calls_on_small_planes():
    """A batch of 10 makes D's rows 20: no other product has as many."""
    found = {}
    for levers in (STACKED, PLAIN):
        state = start_with(levers, networks="small-dry", batch_size=10)
        with InputGradients() as mode:
            step(state, [batch(10)])
        found[levers] = mode.calls
    first_z, (*_, wide, few, last), head = state.model.discriminator.z[0], state.model.discriminator.x, (1, 32)
    assert wide.weight.shape[2] == few.weight.shape[2] == 4 and not wide.few_pixels and few.few_pixels
    assert state.model.discriminator.joint[-1].weight.shape[:2] == head
    for shape in (tuple(few.weight.shape), (last.weight.shape[0], last.weight[0].numel()), head):
        assert [found[STACKED][shape, rows] for rows in (20, 40)] == [0, 1], shape
        assert [found[PLAIN][shape, rows] for rows in (20, 40)] == [2, 0], shape
    for levers in (STACKED, PLAIN):
        assert [found[levers][tuple(wide.weight.shape), rows] for rows in (20, 40)] == [2, 0]
        entering = tuple(first_z.weight.shape[:2])
        assert [found[levers][entering, rows] for rows in (20, 40)] == [1, 0]  # for L_G alone
