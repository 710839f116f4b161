import math

import pytest
import torch

from ali_dist.toy.data import MEANS, STD, draw
from ali_dist.toy.metrics import (
    covered_modes,
    energy_distance_to_prior,
    high_quality_counts,
    holes,
    mode_stds,
    reconstruction_metrics,
    reverse_kl,
    sample_metrics,
)


def test_a_mode_counts_from_one_sample_however_far():
    x = torch.tensor([[4.9, 4.9], [4.0, 4.0], [-0.9, 0.0]])
    assert covered_modes(x) == 2
    assert covered_modes(MEANS.float()) == 25
    assert covered_modes(MEANS[:1].float().repeat(100, 1)) == 1


def test_high_quality_ends_at_three_standard_deviations():
    inside, outside = 2.99 * STD, 3.01 * STD
    x = torch.tensor([[inside, 0.0], [0.0, -inside], [outside, 0.0], [4.0, 4.0 + inside], [1.1, 1.1]])
    counts = high_quality_counts(x)
    assert counts.sum() == 3
    assert {tuple(MEANS[i].tolist()): int(counts[i]) for i in counts.nonzero()[:, 0]} == {(0.0, 0.0): 2, (4.0, 4.0): 1}
    metrics = sample_metrics(x)
    assert (metrics["modes"], metrics["modes_hq"], metrics["hq"]) == (3, 2, 0.6)


def test_reverse_kl_of_known_counts():
    uniform = torch.full((25,), 8)
    assert reverse_kl(uniform) == pytest.approx(0, abs=1e-12)
    one = torch.zeros(25, dtype=torch.int64)
    one[3] = 7
    assert reverse_kl(one) == pytest.approx(math.log(25))
    two = torch.zeros(25, dtype=torch.int64)
    two[:2] = torch.tensor([1, 3])
    assert reverse_kl(two) == pytest.approx(0.25 * math.log(0.25 * 25) + 0.75 * math.log(0.75 * 25))
    assert math.isnan(reverse_kl(torch.zeros(25, dtype=torch.int64)))


def test_true_samples_reach_the_floors():
    metrics = sample_metrics(draw(50_000, 3)[0])
    assert metrics["modes"] == metrics["modes_hq"] == metrics["modes_std_ok"] == 25
    assert metrics["hq"] == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    assert metrics["reverse_kl"] == pytest.approx(24 / 2 / 50_000, rel=1)
    assert 0.93 < metrics["std_min"] < 1 < metrics["std_max"] < 1.07


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_collapsed_modes_show_in_their_standard_deviation(factor):
    _, component = draw(20_000, 3)
    x = MEANS[component] + factor * STD * torch.randn(20_000, 2, dtype=torch.float64)
    stds = mode_stds(x)
    assert stds.sub(factor / 0.974).abs().max() < 0.06
    assert sample_metrics(x)["modes_std_ok"] == 0


def test_samples_that_are_not_finite_count_as_none():
    x = torch.cat([MEANS.float(), torch.full((25, 2), torch.nan)])
    metrics = sample_metrics(x)
    assert (metrics["modes"], metrics["hq"]) == (25, 0.5)
    nothing = sample_metrics(torch.full((5, 2), torch.inf))
    assert (nothing["modes"], nothing["modes_hq"], nothing["hq"]) == (0, 0, 0)
    assert math.isnan(nothing["reverse_kl"]) and math.isnan(nothing["std_min"])


def test_energy_distance_to_the_prior():
    one = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    y = torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    to_prior = sum((point - y).norm(dim=-1).mean().item() for point in one.double()) / 2
    assert energy_distance_to_prior(one) == pytest.approx(2 * to_prior - 5 - math.sqrt(math.pi), abs=0.01)
    z = torch.randn(4000, 2)
    assert abs(energy_distance_to_prior(z)) < 0.002
    assert abs(energy_distance_to_prior(torch.randn(10_000, 2))) < 0.002
    assert energy_distance_to_prior(z + 1) > 0.3 and energy_distance_to_prior(z / 2) > 0.1
    assert energy_distance_to_prior(z, block=7) == pytest.approx(energy_distance_to_prior(z))
    assert math.isnan(energy_distance_to_prior(z * torch.nan))


def test_holes_are_the_priors_mass_without_codes():
    z = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    assert holes(z) == 0
    assert holes(z[z[:, 0] > 0]) == 0.5
    quarter = z.clone()
    quarter[(z > 0).all(-1)] = -1.0
    assert holes(quarter) == 0.25
    assert holes(torch.full((10, 2), 50.0)) == 1 - 1 / 400


def test_reconstructions():
    x, component = draw(100, 0)
    same = reconstruction_metrics(x, component, x)
    assert same["rmse"] == 0 and same["same_mode"] == 1
    moved = reconstruction_metrics(x, component, x + torch.tensor([2.0, 0.0]))
    assert [moved["rmse"], moved["median_error"]] == pytest.approx([2, 2], rel=1e-6)
    assert moved["same_mode"] == pytest.approx((MEANS[component][:, 0] == 4).double().mean().item())
