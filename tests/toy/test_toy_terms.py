"""The terms of `--recipe best` against the same sums written out point by point, in float64."""

import pytest
import torch

from ali_dist.toy.terms import BEND, FINE, cycle, energy_distance, joint_energy_distance, near_energy, nearest


def test_cycle_is_the_mean_squared_error():
    x, x_hat = torch.zeros(2, 3, 2), torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]]).repeat(2, 1, 1)
    x_hat[1] *= 2
    torch.testing.assert_close(cycle(x, x_hat), torch.tensor([26 / 3, 4 * 26 / 3]))


def test_energy_distance_is_unbiased_and_a_runs_own():
    q, p = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 4).double() + 1
    for r in range(2):
        between = [(a - b).norm() for a in q[r] for b in p[r]]
        within = [(s[i] - s[j]).norm() for s in (q[r], p[r]) for i in range(5) for j in range(5) if i != j]
        expected = 2 * sum(between) / 25 - sum(within) / 20
        assert energy_distance(q, p)[r].item() == pytest.approx(expected.item(), abs=1e-12)
    draws = torch.randn(2, 400, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = energy_distance(draws[0], draws[1])
    assert values.mean().abs() < 4 * values.std() / 20 and values.min() < 0


def test_joint_energy_distance_sees_the_pairing():
    x = torch.randn(1, 500, 2, generator=torch.Generator().manual_seed(0))
    same, shuffled = (joint_energy_distance(x, x, x.flip(1), other).item() for other in (x.flip(1), x))
    assert same < 0.01 < 0.05 < shuffled
    x.requires_grad_()
    joint_energy_distance(x, x, x, x).sum().backward()  # points that coincide
    assert x.grad.isfinite().all()


def test_near_energy_is_the_energy_distance_with_exponent_a_half_but_for_a_constant():
    x_tilde, points = torch.randn(2, 5, 2).double(), torch.randn(2, 4, 2).double()
    found = near_energy(x_tilde, points)

    def root(a, b):
        return ((a - b).square().sum() + FINE) ** 0.25

    for r in range(2):
        between = sum(root(a, b) for a in x_tilde[r] for b in points[r]) / 20
        within = sum(root(x_tilde[r, i], x_tilde[r, j]) for i in range(5) for j in range(5) if i != j) / 20
        torch.testing.assert_close(found[r], 2 * between - within, rtol=1e-12, atol=0)
    same = torch.zeros(1, 3, 2, requires_grad=True)
    near_energy(same, same.detach()).sum().backward()  # points that coincide
    assert same.grad.isfinite().all()


def test_near_energy_is_least_for_modes_of_the_right_width_and_shares():
    g = torch.Generator().manual_seed(0)
    noise, points = (0.05 * torch.randn(1, n, 2, generator=g) for n in (4_000, 4_000))
    mode = torch.arange(4_000) % 2

    def value(width, shares=mode):
        return near_energy(width * noise + 2.0 * shares[:, None], points + 2.0 * mode[:, None]).item()

    uneven = (torch.arange(4_000) % 4 == 0).long()
    assert value(1.0) < min(value(0.7), value(1.4), value(1.0, uneven))


def bent(distance):
    return (distance**2 + BEND**2) ** 0.5 - BEND


def test_nearest_draws_each_sample_to_one_point():
    points = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], [[9.0, 9.0], [8.0, 9.0], [7.0, 9.0]]])
    x_tilde = torch.tensor([[[0.9, 0.0], [1.1, 0.0]], [[7.0, 9.5], [7.0, 8.0]]], requires_grad=True)
    found = nearest(x_tilde, points)
    torch.testing.assert_close(found, torch.tensor([bent(0.85), (bent(0.45) + bent(0.95)) / 2]), rtol=1e-4, atol=0)
    found.sum().backward()
    slope = 0.85 / (0.85**2 + BEND**2) ** 0.5 / 2
    torch.testing.assert_close(x_tilde.grad[0], torch.tensor([[slope, 0.0], [-slope, 0.0]]), rtol=1e-4, atol=0)


def test_nearest_leaves_alone_what_is_within_reach():
    x_tilde = torch.tensor([[[0.0, 0.0], [0.03, 0.03]]], requires_grad=True)
    found = nearest(x_tilde, torch.zeros(1, 4, 2))
    found.sum().backward()
    assert found.item() == pytest.approx(0, abs=1e-7) and x_tilde.grad.abs().max() == 0
