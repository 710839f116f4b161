"""Logistic regression in parts is the usual one."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ali_dist.evaluate import linear_layers, logistic
from ali_dist.evaluate.logistic import Rows, fit, standardise
from ali_dist.evaluate.table import METRICS
from ali_dist.evaluate.work import ALONE
from ali_dist.model import untrained
from ali_dist.recipes import RECIPES


def drawn(n=150, features=12, classes=4, seed=0):
    """Rows of overlapping classes, float32, on unlike scales; a column is constant."""
    generator = np.random.default_rng(seed)
    y = generator.integers(classes, size=n)
    x = generator.normal(size=(n, features)) + generator.normal(size=(classes, features))[y]
    x = x * np.logspace(-2, 3, features) + 5
    x[:, 3] = 7
    return x.astype(np.float32), y


def test_features_of_a_file_are_standardised_in_place_and_in_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(logistic, "ROWS", 40)
    (x, _), (other, _) = drawn(), drawn(n=50, seed=1)
    scaler = StandardScaler().fit(x.astype(np.float64))
    expected, expected_other = scaler.transform(x.astype(np.float64)), scaler.transform(other.astype(np.float64))
    stored = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, x.shape)
    stored[:] = x
    standardise(stored, other)
    np.testing.assert_allclose(stored, expected, atol=1e-5)
    np.testing.assert_allclose(other, expected_other, atol=1e-5)
    assert stored[:, 3].tolist() == [0] * 150


@pytest.mark.parametrize("decay", (1.0, 0.01))
@pytest.mark.parametrize("classes", (2, 4))
def test_a_fit_in_parts_is_scikit_learns(monkeypatch, decay, classes):
    """To a thousandth of its largest weight."""
    monkeypatch.setattr(logistic, "ROWS", 40)
    x, y = drawn(classes=classes)
    standardise(x)
    found = fit(Rows(x, y), classes, decay, slope=1e-5, gain=1e-8)
    # The weights of two classes are opposite: each is half of the one weight that scikit-learn has there.
    c = (2 if classes == 2 else 1) / (len(y) * decay)
    expected = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x.astype(np.float64), y)
    weights = found.weights[1:] - found.weights[:1] if classes == 2 else found.weights
    largest = np.abs(expected.coef_).max()
    np.testing.assert_allclose(weights[:, :-1], expected.coef_, atol=1e-3 * largest)
    if classes == 2:
        np.testing.assert_allclose(weights[:, -1], expected.intercept_, atol=1e-3 * largest)
    assert found.converged and found.iterations < 100
    assert found.error(Rows(x, y)) == pytest.approx(1 - expected.score(x, y), abs=1e-12) and found.error(Rows(x, y)) > 0


def test_a_fit_that_is_cut_short_says_so():
    x, y = drawn()
    standardise(x)
    done = []
    found = fit(Rows(x, y), 4, 1e-3, iterations=3, progress=done.append)
    assert (found.iterations, found.converged, done) == (3, False, [1, 2, 3])
    whole = fit(Rows(x, y), 4, 1e-3, gain=1e-8)
    assert whole.converged and fit(Rows(x, y), 4, 1e-3, whole.weights).iterations <= 1


def test_the_layers_of_real_digits(digits, monkeypatch):
    """Weight decay is that of the least error on held-out images alone, and the last fit is to all of them."""
    tried, sizes = [], []

    def counted(rows, classes, decay, *more, **options):
        tried.append(decay)
        sizes.append(rows.count)
        return fit(rows, classes, decay, *more, **options)

    monkeypatch.setattr(linear_layers, "fit", counted)
    model = untrained(RECIPES["digits"], digits.mean_image)
    few = dataclasses.replace(digits, splits={"train": digits.splits["valid"], "valid": digits.splits["valid"]})
    found = METRICS["linear-layers"](model, few, ALONE)
    half = len(tried) // 2
    assert sizes[:half] == [288] * (half - 1) + [360] and tried[:half] == tried[half:]
    assert tried[: half - 1] == list(linear_layers.DECAYS[: half - 1]) and tried[half - 1] == found["weight_decay"]
    assert found["accuracy"] == found["accuracy_untrained"] > 0.95 and found["held_out_error"] < 0.2
    assert (found["train_images"], found["held_out_images"], found["test_images"]) == (360, 72, 360)
    assert found["converged"] and found["feature_count"] == 128 * 16 + 256 + 256 + 64
    assert found["published_accuracy_percent"] == []
