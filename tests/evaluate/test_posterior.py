"""Codes against the prior."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import Fake

from ali_dist.evaluate.data import read
from ali_dist.evaluate.posterior import mmd2, posterior
from ali_dist.evaluate.work import Chunk


def test_mmd2_is_the_sum_over_pairs():
    a, b = torch.randn(4, 3), torch.randn(5, 3) + 1

    def kernel(u, v):
        return math.exp(-float((u - v).square().sum()) / 6)

    within_a = sum(kernel(a[i], a[j]) for i in range(4) for j in range(4) if i != j) / 12
    within_b = sum(kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(kernel(u, v) for u in a for v in b) / 20
    assert mmd2(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-5)


def fake_codes(mu_scale, log_sigma, uses_z):
    """Codes around mu_scale times the image's mean; D multiplies code and mean, or looks at the mean alone."""
    fake = Fake(None)

    def encode(x, y):
        mu = mu_scale * (x.float().mean((1, 2, 3)) / 255 - 0.3)[:, None].expand(-1, 8)
        return mu, torch.full_like(mu, log_sigma)

    def score(x, z, y):
        mean = x.mean((1, 2, 3)) - 0.3
        return mean * z[:, 0] if uses_z else mean

    fake.posterior, fake.net = encode, SimpleNamespace(score=score)
    return fake


def test_posterior_tells_a_matching_code_from_a_collapsed_one(digits):
    matching = posterior(fake_codes(0.0, 0.0, uses_z=False), digits)
    assert abs(matching["mmd2"]) < 0.01 and matching["own_code_preferred"] == 0.5  # equal scores
    assert matching["sigma_smallest"] == matching["sigma_largest"] == 1
    assert 0.8 < matching["std_smallest"] <= matching["std_largest"] < 1.2
    collapsed = posterior(fake_codes(100.0, -5.0, uses_z=True), digits)
    assert collapsed["mmd2"] > 0.3 and collapsed["own_code_preferred"] > 0.6
    assert collapsed["sigma_mean"] == pytest.approx(math.exp(-5), rel=1e-3)


def test_posteriors_moments_and_preferred_codes_are_those_of_all_images(digits):
    """By hand, in float64: D likes a code that lies near the mean pixel, which the encoder's mu is."""
    fake = Fake(None)
    mean = lambda x: x.float().mean((1, 2, 3), keepdim=True).flatten(1)  # noqa: E731

    def encode(x, y):
        mu = torch.cat([mean(x) / 255, -mean(x) / 255], 1)
        return mu, 0.5 * mu - 2

    fake.posterior = encode
    fake.net = SimpleNamespace(score=lambda x, z, y: -(z[:, 0] - x.mean((1, 2, 3))).abs())
    found = posterior(fake, digits)
    x = read(digits, "valid", Chunk(0, 256)).x, read(digits, "valid", Chunk(256, 360)).x
    mu, log_sigma = encode(torch.cat(x), None)
    z = mu + log_sigma.exp() * torch.randn(mu.shape, generator=torch.Generator().manual_seed(0))
    values, sigma = z.double().numpy(), np.exp(log_sigma.double().numpy())
    assert found["mean_largest"] == pytest.approx(np.abs(values.mean(0)).max(), rel=1e-5)
    deviations = values.std(0, ddof=1)
    assert found["std_smallest"] == pytest.approx(deviations.min(), rel=1e-5)
    assert found["std_largest"] == pytest.approx(deviations.max(), rel=1e-5)
    assert (found["sigma_smallest"], found["sigma_largest"]) == pytest.approx((sigma.min(), sigma.max()), rel=1e-5)
    assert found["sigma_mean"] == pytest.approx(sigma.mean(), rel=1e-5)
    wanted = mu[:, 0].double().numpy()
    own = np.array([abs(values[i, 0] - wanted[i]) for i in range(360)])
    another = np.array([abs(values[i - 1, 0] - wanted[i]) for i in range(360)])
    assert found["own_code_preferred"] == pytest.approx((own < another).mean(), abs=1.5 / 360)
    assert 0.5 < found["own_code_preferred"] < 1
