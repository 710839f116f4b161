import pytest
import torch

from ali_dist.losses import accuracies, per_image_losses


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
