"""What reconstructions keep of images."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from fakes import Fake
from pixels import pixels
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from ali_dist.evaluate.data import read
from ali_dist.evaluate.features import FEATURES
from ali_dist.evaluate.reconstruction import betas, reconstruction
from ali_dist.evaluate.seen import quantised
from ali_dist.evaluate.work import Chunk


@pytest.fixture(autouse=True)
def no_large_network(monkeypatch):
    monkeypatch.setitem(FEATURES, "efficientnet-lite0", lambda work: pixels())


def test_reconstruction_is_zero_for_copies_and_has_ratio_one_for_one_image_for_all(digits):
    copies = reconstruction(Fake(lambda x, y, generator: x.float() / 255), digits)
    assert copies["mse"] == copies["ratio"] == 0 and copies["mse_of_another"] > 0.05
    assert copies["ssim"] == pytest.approx(1, abs=1e-5)
    blank = reconstruction(Fake(lambda x, y, generator: torch.zeros(x.shape)), digits)
    assert blank["ratio"] == pytest.approx(1, abs=1e-12) and blank["images"] == 360


def test_reconstruction_is_compared_with_every_other_image(digits, monkeypatch):
    few = dataclasses.replace(digits, splits={"valid": digits.splits["valid"]})

    def shifted(x, y, generator):
        return (x.float() / 255 + torch.rand(x.shape, generator=generator)) / 2

    found = reconstruction(Fake(shifted), few)
    batches = [read(digits, "valid", Chunk(0, 256)).x, read(digits, "valid", Chunk(256, 360)).x]
    x = torch.cat(batches).double().flatten(1) / 255
    noise = (torch.Generator().manual_seed(start) for start in (0, 256))
    tilde = torch.cat([shifted(b, None, g) for b, g in zip(batches, noise, strict=True)])
    errors = torch.cdist(x, tilde.double().flatten(1)).square() / x.shape[1]  # [image, reconstruction]
    own, n = errors.diag(), len(x)
    assert found["mse"] == pytest.approx(own.mean().item(), rel=1e-6)
    other = (errors.sum() - own.sum()) / (n * (n - 1))
    assert found["mse_of_another"] == pytest.approx(other.item(), rel=1e-6)
    assert found["ratio"] == pytest.approx((own.mean() / other).item(), rel=1e-6) and found["split"] == "valid"
    expected = [ssim(a, b) for a, b in zip(x.view(n, 32, 32).numpy(), tilde[:, 0].numpy(), strict=True)]
    assert found["ssim"] == pytest.approx(np.mean(expected), abs=1e-4) and 0.1 < found["ssim"] < 0.9
    ms = [ms_ssim(a, b) for a, b in zip(x.view(n, 32, 32).numpy(), tilde[:, 0].numpy(), strict=True)]
    assert found["ms_ssim"] == pytest.approx(np.mean(ms), abs=1e-4) and found["ms_ssim_scales"] == 2

    network = pixels()
    f, f_tilde = (network(torch.cat(v)) for v in (batches, [quantised(part) for part in tilde.split(256)]))
    f, f_tilde = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (f, f_tilde))
    errors = torch.cdist(f, f_tilde).square()
    other = (errors.sum() - errors.trace()) / (n * (n - 1))
    assert found["efficientnet_lite0_distance"] == pytest.approx(errors.diag().mean().item(), rel=1e-6)
    assert found["efficientnet_lite0_ratio"] == pytest.approx((errors.diag().mean() / other).item(), rel=1e-6)
    assert found["weights_sha256"] == network.weights
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    without = reconstruction(Fake(shifted), few)
    assert without == {name: found[name] for name in without}
    assert found.keys() - without.keys() >= {"efficientnet_lite0_distance", "weights_sha256"}


@pytest.mark.parametrize("size, scales", ((32, 2), (64, 3), (128, 4), (176, 5), (218, 5)))
def test_ms_ssim_has_as_many_scales_as_the_images_allow(size, scales):
    exponents = betas((3, size, size + 10))
    assert len(exponents) == scales and sum(exponents) == pytest.approx(1)
    assert exponents[1] / exponents[0] == pytest.approx(0.2856 / 0.0448)
    x = torch.rand(1, 3, size, size + 10)
    assert multiscale_structural_similarity_index_measure(x, x, betas=exponents, data_range=1.0) == 1
    if scales < 5:
        more = (0.1,) * (scales + 1)
        with pytest.raises(ValueError, match="must be larger than"):
            multiscale_structural_similarity_index_measure(x, x, betas=more, data_range=1.0)


def ms_ssim(a, b):
    """Wang et al. (2003), equation 7, two scales: contrast and structure of the finer, all of the coarser one."""
    fine, coarse = 0.0448 / (0.0448 + 0.2856), 0.2856 / (0.0448 + 0.2856)
    smaller = (image.astype(np.float64).reshape(16, 2, 16, 2).mean((1, 3)) for image in (a, b))
    return max(ssim(a, b, whole=False), 0) ** fine * max(ssim(*smaller), 0) ** coarse


def ssim(a, b, whole=True):
    """Wang et al. (2004), equations 13 to 15, at all places of an image that goes on mirrored beyond its edges.

    Not whole: without the term of luminance, and only where the window lies inside the image.
    """
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def mean(image):
        return np.einsum("ijkl,kl->ij", np.lib.stride_tricks.sliding_window_view(image, (11, 11)), window)

    a, b = (np.pad(image.astype(np.float64), 5 if whole else 0, mode="reflect") for image in (a, b))
    m_a, m_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - m_a**2, mean(b * b) - m_b**2, mean(a * b) - m_a * m_b
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * m_a * m_b + c1) / (m_a**2 + m_b**2 + c1) if whole else 1
    return (alike * (2 * cov + c2) / (var_a + var_b + c2)).mean()
