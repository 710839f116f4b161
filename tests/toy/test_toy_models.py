"""Each model's training step against the same sums written out with autograd alone, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence

from ali_dist.bench.toy_plain import PlainALI
from ali_dist.losses import per_image_losses
from ali_dist.tables import BN_EPS
from ali_dist.toy.models import STEPS, VAE_STD, Batch, Networks, Terms, vae_losses
from ali_dist.toy.nets import chain, one_run, with_population
from ali_dist.toy.ops import batch_norm_relu, maxout
from ali_dist.toy.recipe import ToyRun
from ali_dist.toy.stack import initial_weights
from ali_dist.toy.tables import DECODER, MODELS, PIECES
from ali_dist.toy.terms import joint_energy_distance, near_energy, nearest

R, B = 2, 6


def weights_of(model, std=0.1):
    """R runs' float64 weights; wide by default, so that no gradient is tiny."""
    singles = [initial_weights(ToyRun(model=model, seed=seed, init_std=std)) for seed in range(R)]
    return {name: torch.stack([w[name] for w in singles]).double().requires_grad_() for name in singles[0]}


def batch():
    return Batch(*torch.randn(3, R, B, 2).double())


def frozen_decoder():
    weights = {name: t.detach() for name, t in weights_of("gan").items() if name.startswith("decoder")}
    return with_population("decoder", DECODER, weights, torch.randn(R, 50, 2).double())


def run_alone(weights, name, table, x):
    """One run's network [N, in] -> [N, out], by torch.nn.functional."""
    for i, row in enumerate(table.rows):
        part = {key.split(".")[2]: t[0] for key, t in weights.items() if key.startswith(f"{name}.{i}.")}
        x = x @ part["weight"]
        if row.act == "bn_relu":
            mean, var = (part[key][0] if key in part else None for key in ("mean", "var"))
            x = F.relu(F.batch_norm(x, mean, var, part["scale"][0], part["shift"][0], mean is None, 0.0, BN_EPS))
        else:
            x = x + part["bias"]
            x = x.unflatten(-1, (PIECES, -1)).amax(-2) if row.act == "maxout" else x
    return x


def expected_gradients(model, weights, b, r):
    """Gradients of run r, by two whole backward passes."""
    mine = one_run(weights, r)
    x, z, eps = b.x[r], b.z[r], b.eps[r]
    tables = MODELS[model] | {"decoder": DECODER}
    decode = lambda z: run_alone(mine, "decoder", tables["decoder"], z)  # noqa: E731
    encode = lambda x: run_alone(mine, "encoder", tables["encoder"], x)  # noqa: E731

    def discriminate(pairs):
        return run_alone(mine, "discriminator", tables["discriminator"], pairs).squeeze(-1)

    if model in ("ali", "posthoc"):
        z_hat, x_tilde = encode(torch.cat([x, eps], -1)), decode(z)
        logits = discriminate(torch.cat([x, z_hat], -1)), discriminate(torch.cat([x_tilde, z], -1))
    elif model == "gan":
        logits = discriminate(x), discriminate(decode(z))
    elif model == "inverse":
        loss = (z - encode(torch.cat([decode(z), eps], -1))).square().sum(-1).mean()
    else:
        mu, log_sigma = encode(x).chunk(2, -1)
        q = Normal(mu, log_sigma.exp())
        likelihood = Independent(Normal(decode(mu + log_sigma.exp() * eps), VAE_STD), 1)
        loss = (kl_divergence(q, Normal(0.0, 1.0)).sum(-1) - likelihood.log_prob(x)).mean()
    trained = [name for name, t in weights.items() if t.requires_grad]
    if model in ("inverse", "vae"):
        losses = dict.fromkeys(trained, loss)
    else:
        loss_d, loss_g = (loss.mean() for loss in per_image_losses(*logits))
        losses = {name: loss_d if name.startswith("discriminator") else loss_g for name in trained}
    return {name: torch.autograd.grad(losses[name], weights[name], retain_graph=True)[0][r] for name in trained}


@pytest.mark.parametrize("model", STEPS)
def test_a_step_has_the_gradients_of_its_losses(model):
    weights, b = weights_of(model), batch()
    if model in ("inverse", "posthoc"):
        weights |= frozen_decoder()
    gradients = STEPS[model](Networks(model, weights), b)
    for r in range(R):
        expected = expected_gradients(model, weights, b, r)
        assert gradients.of.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max()
            assert scale > 0, name
            assert (gradients.of[name][r] - gradient).abs().max() < 1e-9 * scale, name


def test_a_step_with_terms_has_the_gradients_of_their_sum():
    weights, b = weights_of("ali"), batch()
    points = torch.randn(R, 9, 2).double()
    added = STEPS["ali"](Networks("ali", weights), b._replace(terms=Terms(0.5, 0.7, 1.3, 0.9, 2.1, points)))
    plain = STEPS["ali"](Networks("ali", weights), b)
    for r in range(R):
        mine, x, z = one_run(weights, r), b.x[r], b.z[r]
        z_hat = run_alone(mine, "encoder", MODELS["ali"]["encoder"], torch.cat([x, b.eps[r]], -1))
        x_tilde, x_hat = (run_alone(mine, "decoder", DECODER, code) for code in (z, z_hat))
        loss = 0.7 * (x - x_hat).square().sum(-1).mean()
        loss = loss + 1.3 * joint_energy_distance(*(t[None] for t in (x, z_hat, x_tilde, z)))[0]
        loss = loss + 0.9 * near_energy(x_tilde[None], points[r : r + 1])[0]
        loss = loss + 2.1 * nearest(x_tilde[None], points[r : r + 1])[0]
        trained = [name for name in weights if not name.startswith("discriminator")]
        expected = torch.autograd.grad(loss, [weights[name] for name in trained])
        for name, gradient in zip(trained, expected, strict=True):
            difference = added.of[name][r] - 0.5 * plain.of[name][r] - gradient[r]
            assert difference.abs().max() < 1e-9 * added.of[name][r].abs().max(), name
    assert all(torch.equal(added.of[name], plain.of[name]) for name in weights if name.startswith("discriminator"))


def test_a_sure_discriminator_leaves_finite_gradients():
    weights = {name: t.float().detach().requires_grad_() for name, t in weights_of("gan").items()}
    with torch.no_grad():
        weights["discriminator.3.weight"].mul_(1e4)
    gradients = STEPS["gan"](Networks("gan", weights), Batch(*torch.randn(3, R, B, 2)))
    assert all(g.isfinite().all() for g in gradients.of.values())
    assert gradients.of["decoder.4.weight"].abs().max() > 0


def test_vae_losses_are_those_of_torch_distributions():
    x, mean, mu, log_sigma = torch.randn(4, 100, 2, dtype=torch.float64)
    nll, kl = vae_losses(x, mean, mu, log_sigma)
    torch.testing.assert_close(nll, -Independent(Normal(mean, VAE_STD), 1).log_prob(x), rtol=1e-12, atol=0)
    expected = kl_divergence(Independent(Normal(mu, log_sigma.exp()), 1), Independent(Normal(mu * 0, 1.0), 1))
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-12)


def test_batch_norm_relu():
    x, scale, shift = torch.randn(3, 7, 4).double(), torch.randn(3, 1, 4).double(), torch.randn(3, 1, 4).double()
    inputs = [t.requires_grad_() for t in (x, scale, shift)]
    y = batch_norm_relu(*inputs, 1e-4)
    for r in range(3):
        torch.testing.assert_close(
            y[r], F.relu(F.batch_norm(x[r], None, None, scale[r, 0], shift[r, 0], True, 0, 1e-4))
        )
    assert torch.autograd.gradcheck(lambda *t: batch_norm_relu(*t, 1e-4), inputs)


def test_maxout():
    x = torch.randn(2, 3, 20).double().requires_grad_()
    assert torch.equal(maxout(x, 5), x.unflatten(-1, (5, 4)).amax(-2))
    assert torch.autograd.gradcheck(lambda t: maxout(t, 5), x)
    tied = torch.tensor([[[1.0, 1.0, 0.0]]], requires_grad=True)
    maxout(tied, 3).sum().backward()
    assert tied.grad.tolist() == [[[0.5, 0.5, 0.0]]]


def test_bfloat16_products_stay_near_float32():
    weights = {name: t.float().detach() for name, t in weights_of("ali").items()}
    z = torch.randn(R, 100, 2)
    exact, rounded = (chain("decoder", DECODER, weights, z, precision) for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.02 * exact.abs().max()


def test_population_statistics_make_batch_norm_independent_of_the_batch():
    weights = {name: t.detach() for name, t in weights_of("gan").items()}
    z = torch.randn(R, 2000, 2).double()
    known = with_population("decoder", DECODER, weights, z)
    whole = chain("decoder", DECODER, known, z)
    torch.testing.assert_close(chain("decoder", DECODER, known, z[:, :1]), whole[:, :1])
    torch.testing.assert_close(chain("decoder", DECODER, weights, z), whole, rtol=0.01, atol=0.01)


def test_the_stack_equals_the_plain_loop():
    runs = [ToyRun(model="ali", seed=seed) for seed in range(R)]
    weights = weights_of("ali", std=0.02)
    b = batch()
    losses = STEPS["ali"](Networks("ali", weights), b).losses
    for r, run in enumerate(runs):
        model = PlainALI(run, initial_weights(run))
        for net in model.nets.values():
            net.double()
        loss_d, loss_g = model.step(Batch(b.x[r], b.z[r], b.eps[r]))
        torch.testing.assert_close(
            torch.stack([losses["loss_d"][r], losses["loss_g"][r]]), torch.stack([loss_d, loss_g])
        )
