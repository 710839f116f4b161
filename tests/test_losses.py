import pytest
import torch
from support import in_float64

from ali_dist.losses import (
    accuracies,
    class_losses,
    evidence,
    feature_gaps,
    feature_matching_losses,
    per_image_losses,
    semi_supervised_losses,
)


def test_losses_are_the_papers_formulas():
    a, b = torch.randn(2, 1000, dtype=torch.float64) * 2
    sigma = torch.sigmoid
    loss_d, loss_g = per_image_losses(a, b)
    torch.testing.assert_close(loss_d, -torch.log(sigma(a)) - torch.log(1 - sigma(b)), rtol=0, atol=1e-11)
    torch.testing.assert_close(loss_g, -torch.log(1 - sigma(a)) - torch.log(sigma(b)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_finite_and_exact(dtype):
    a = torch.tensor([1e4, -1e4, 1e4, -1e4, 0], dtype=dtype, requires_grad=True)
    b = torch.tensor([1e4, 1e4, -1e4, -1e4, 0], dtype=dtype, requires_grad=True)
    loss_d, loss_g = per_image_losses(a, b)
    two_bits = 2 * torch.log(torch.tensor(2, dtype=torch.float64)).to(dtype)
    assert loss_d.tolist() == [1e4, 2e4, 0, 1e4, two_bits]
    assert loss_g.tolist() == [1e4, 0, 2e4, 1e4, two_bits]
    of_d = torch.autograd.grad(loss_d.sum(), (a, b), retain_graph=True)
    of_g = torch.autograd.grad(loss_g.sum(), (a, b))
    assert [g.tolist() for g in of_d] == [[0, -1, 0, -1, -0.5], [1, 1, 0, 0, 0.5]]
    assert [g.tolist() for g in of_g] == [[1, 0, 1, 0, 0.5], [0, 0, -1, -1, -0.5]]


def test_gradients():
    a, b = torch.randn(2, 50, dtype=torch.float64).mul(4).requires_grad_(True)
    loss_d, loss_g = per_image_losses(a, b)
    for loss, sign in ((loss_d, 1), (loss_g, -1)):
        grad_a, grad_b = torch.autograd.grad(loss.sum(), (a, b), retain_graph=True)
        torch.testing.assert_close(grad_a, -sign * torch.sigmoid(-sign * a), rtol=0, atol=1e-12)
        torch.testing.assert_close(grad_b, sign * torch.sigmoid(sign * b), rtol=0, atol=1e-12)


def test_accuracies_are_the_probability_of_the_truth():
    data, sample = accuracies(torch.tensor([1e4, 0, -1e4]), torch.tensor([1e4, 0, -1e4]))
    assert data.tolist() == [1, 0.5, 0] and sample.tolist() == [0, 0.5, 1]


def explicit(logits: torch.Tensor) -> torch.Tensor:
    """log p of K + 1 classes, [N, K + 1], the last of them "generated" with the logit 0."""
    return torch.log_softmax(torch.cat([logits, logits.new_zeros(len(logits), 1)], dim=1), dim=1)


def test_semi_supervised_losses_are_those_of_the_softmax_over_all_classes():
    q, p = (torch.randn(2, 40, 7, dtype=torch.float64) * 3).requires_grad_(True)
    y = torch.randint(0, 7, (40,)).index_fill(0, torch.arange(28), -1)  # 12 of 40 are labelled
    loss_d, loss_g = semi_supervised_losses(q, p, y, 12 / 40)
    log_q, log_p = explicit(q), explicit(p)
    labelled, unlabelled = log_q[28:], log_q[:28]
    any_class, any_p = unlabelled[:, :7].exp().sum(1), log_p[:, :7].exp().sum(1)
    expected_d = -labelled[range(12), y[28:]].mean() - any_class.log().mean() - log_p[:, 7].mean()
    expected_g = -unlabelled[:, 7].mean() - any_p.log().mean()
    for mine, expected in ((loss_d.mean(), expected_d), (loss_g.mean(), expected_g)):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad(loss, (q, p), retain_graph=True) for loss in (mine, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert not torch.autograd.grad(loss_g.sum(), q)[0][28:].any()  # labelled images take no part in the game


def test_one_class_is_plain_ali():
    a, b = torch.randn(2, 30, dtype=torch.float64)
    y = torch.full((30,), -1)
    for mine, theirs in zip(
        semi_supervised_losses(a[:, None], b[:, None], y, 1e-300), per_image_losses(a, b), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(evidence(a), a)


def test_class_losses_and_evidence():
    logits, y = torch.randn(50, 5, dtype=torch.float64) * 4, torch.randint(0, 5, (50,))
    torch.testing.assert_close(class_losses(logits, y), -explicit(logits)[range(50), y], rtol=0, atol=1e-12)
    real = explicit(logits)[:, :5].exp().sum(1)
    torch.testing.assert_close(torch.sigmoid(evidence(logits)), real, rtol=0, atol=1e-12)
    extreme = torch.tensor([[1e4, -1e4], [-1e4, -1e4]])
    assert torch.isfinite(class_losses(extreme, torch.tensor([1, 0]))).all()


def test_feature_matching_has_the_value_and_gradient_of_the_squared_gap():
    q, p = torch.randn(2, 20, 6, 1, 1, dtype=torch.float64).requires_grad_(True)
    y = torch.arange(20) % 5 - 1
    y[:12], y[12:] = -1, y[12:].clamp(min=0)
    with in_float64():
        gaps = feature_gaps(q, p, y, 8 / 20)
    gap = gaps.detach().mean(0)
    expected = (q[:12].mean(0) - p.mean(0)).square().sum()
    mine = feature_matching_losses(gaps, gap).mean()
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(mine, (q, p)), torch.autograd.grad(expected, (q, p)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
