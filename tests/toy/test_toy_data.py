import numpy as np
import torch
from scipy.stats import multivariate_normal

from ali_dist.toy.data import MEANS, STD, draw, responsibilities


def test_the_grid():
    assert sorted(map(tuple, MEANS.tolist())) == [(a, b) for a in range(-4, 5, 2) for b in range(-4, 5, 2)]


def test_draws_are_seeded_and_distributed_as_promised():
    x, component = draw(50_000, seed=7)
    assert x.dtype == torch.float32
    assert torch.equal(x, draw(50_000, seed=7)[0]) and not torch.equal(x, draw(50_000, seed=8)[0])
    noise = (x.double() - MEANS[component]) / STD
    assert noise.mean(0).abs().max() < 4 / 50_000**0.5
    torch.testing.assert_close(noise.T.cov(), torch.eye(2, dtype=torch.float64), rtol=0, atol=0.03)
    assert component.bincount().sub(2000).abs().max() < 5 * 2000**0.5


def test_responsibilities_are_scipys():
    generator = np.random.default_rng(0)
    x = generator.uniform(-1.3, 1.3, (200, 2))  # between nine modes, where more than one of them counts
    log_density = np.stack([multivariate_normal(mean, STD**2).logpdf(x) for mean in MEANS.numpy()], 1)
    shifted = np.exp(log_density - log_density.max(1, keepdims=True))
    expected = shifted / shifted.sum(1, keepdims=True)
    mine = responsibilities(torch.from_numpy(x))
    assert mine.dtype == torch.float64
    np.testing.assert_allclose(mine.numpy(), expected, rtol=1e-9, atol=1e-300)


def test_responsibilities_far_from_all_modes():
    far = responsibilities(torch.tensor([[100.0, 3.9], [1.0, 0.0]], dtype=torch.float64))
    assert MEANS[far[0].argmax()].tolist() == [4, 4] and far[0].sum() == 1
    assert far[1].sort().values[-2:].tolist() == [0.5, 0.5]  # halfway between two centres
