import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.svm import LinearSVC

from ali_dist.data.index import Notes
from ali_dist.data.labelled import balanced_draw
from ali_dist.evaluate.classes import check_classifier
from ali_dist.evaluate.data import read, unseen_split
from ali_dist.evaluate.knn import knn
from ali_dist.evaluate.posterior import mmd2, posterior
from ali_dist.evaluate.reconstruction import reconstruction
from ali_dist.evaluate.svm import Svm, error, folds, labelled_split, svm
from ali_dist.evaluate.table import METRICS
from ali_dist.evaluate.work import ALONE, Chunk, Work
from ali_dist.model import untrained
from ali_dist.recipe import UserError
from ali_dist.recipes import RECIPES


class Fake:
    """What the metrics need of a model."""

    batch_size, labels, recipe = 100, 0, RECIPES["digits"]

    def __init__(self, reconstruct):
        self.reconstruct = reconstruct

    def label_batches(self, y, n):
        return [None] * -(-n // self.batch_size)

    def batches(self, x):
        return iter(x.float().div(255).split(self.batch_size))


@pytest.mark.parametrize("classes", (2, 4))
def test_the_svm_in_the_span_of_its_rows_is_the_svm_on_the_features(classes):
    generator = np.random.default_rng(0)
    y = np.arange(60) % classes
    x = (generator.normal(size=(60, 500)) + 0.1 * y[:, None]).astype(np.float32)
    test = generator.normal(size=(200, 500)).astype(np.float32)
    plain = LinearSVC(C=0.01, dual=True, tol=1e-8, max_iter=100_000).fit(x, y)
    weights, intercepts, labels = Svm(x, y).fit(0.01)
    assert labels.tolist() == list(range(classes))
    np.testing.assert_allclose(weights.T, plain.coef_, atol=2e-3 * np.abs(plain.coef_).max())
    np.testing.assert_allclose(intercepts, plain.intercept_, atol=1e-2)
    found = error(test, plain.predict(test), (weights, intercepts, labels))
    assert found <= 0.01
    assert error(test, plain.predict(test) + 1, (weights, intercepts, labels)) >= 0.5


def test_balanced_draws_hold_each_class_alike_and_differ_by_seed():
    y = np.repeat(np.arange(5), (10, 20, 30, 40, 50))
    rows = balanced_draw(y, 10, seed=1)
    assert np.bincount(y[rows]).tolist() == [10] * 5 and len(set(rows.tolist())) == 50
    assert balanced_draw(y, 10, seed=1).tolist() == rows.tolist() != balanced_draw(y, 10, seed=2).tolist()
    with pytest.raises(UserError, match="class 0 has 10 training images, fewer than the 11"):
        balanced_draw(y, 11, seed=0)


def test_svm_features_are_those_of_the_authors_script_and_of_the_paper():
    model = untrained(RECIPES["svhn"], torch.full((3, 32, 32), 0.5))
    x = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    script, paper = model.features(x), model.features(x, "paper")
    assert script.shape == (3, 5376) and paper.shape == (3, 8960)
    h = x.float() / 255
    outputs = []
    with torch.no_grad():
        for layer in list(model.net.encoder)[:-1]:
            bn = layer.bn
            h = F.conv2d(h, layer.weight, stride=layer.row.stride)
            h = F.batch_norm(h, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
            outputs.append(h.flatten(1))
            h = F.leaky_relu(h, 0.01)
            outputs.append(h.flatten(1))
    mu = model.encode(x)
    before, after, middle, last = outputs[-6], outputs[-5], outputs[-4], outputs[-2]
    torch.testing.assert_close(script, torch.cat([before, middle, last, mu], 1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(paper, torch.cat([before, after, last, mu], 1), rtol=1e-4, atol=1e-7)


def test_svm_on_real_digits(digits, caplog):
    model = untrained(RECIPES["digits"], digits.mean_image)
    found = svm(model, digits, Work(draws=2), grid=np.array([1e-9, 1.0, 1e4]))
    assert found["labels"] == 1000 and found["draws"] == 2 and found["feature_count"] == 128 * 16 + 256 + 256 + 64
    assert found["held_out_images"] == 1437 // 5 and found["test_images"] == 360
    assert found["error"] < 0.1 and found["held_out_error"] < 0.1  # random features separate digits
    assert 0 <= found["error_std"] < 0.05 and found["C"] > 1e-9
    assert "C is chosen on 287 held-out images, digits has no 10000 to spare" in caplog.text
    few = svm(model, digits, Work(draws=1, labels=29), grid=np.array([1.0]))
    assert (few["labels"], few["draws"], few["error_std"]) == (20, 1, 0) and few["error"] > found["error"]
    with pytest.raises(UserError, match="--labels 9 is fewer than the 10 classes of data set digits"):
        svm(model, digits, Work(labels=9))


def test_svhns_labels_come_from_the_official_training_images(digits, tmp_path):
    shards = digits.splits
    svhn = dataclasses.replace(
        digits, name="svhn", splits={"train": (), "valid": shards["train"], "test": shards["valid"]}
    )
    model = untrained(RECIPES["digits"], digits.mean_image)
    (x, y), (held_x, held_y), (test_x, test_y) = folds(model, svhn, "script", tmp_path, ALONE)
    assert len(x) == len(y) == 1150 and len(held_x) == len(held_y) == 287 and len(test_x) == len(test_y) == 360
    labels = read(digits, "train", Chunk(0, 1437)).y.numpy()
    assert y.tolist() == labels[:1150].tolist() and held_y.tolist() == labels[1150:].tolist()
    row = model.features(read(digits, "train", Chunk(1200, 1201)).x).numpy()
    np.testing.assert_allclose(held_x[50:51], row, rtol=1e-4, atol=1e-6)
    assert labelled_split(svhn) == "valid" and labelled_split(digits) == "train"


def test_knn_of_an_untrained_encoder_is_its_own_baseline(digits):
    found = knn(untrained(RECIPES["digits"], digits.mean_image), digits)
    assert found["accuracy_1"] == found["accuracy_1_untrained"] > 0.8
    assert found["accuracy_5"] == found["accuracy_5_untrained"] > 0.8
    assert (found["train_images"], found["test_images"]) == (1437, 360)


def test_reconstruction_is_zero_for_copies_and_has_ratio_one_for_one_image_for_all(digits):
    copies = reconstruction(Fake(lambda x, y, generator: x.float() / 255), digits)
    assert copies["mse"] == copies["ratio"] == 0 and copies["mse_of_another"] > 0.05
    assert copies["ssim"] == pytest.approx(1, abs=1e-5)
    blank = reconstruction(Fake(lambda x, y, generator: torch.zeros(x.shape)), digits)
    assert blank["ratio"] == pytest.approx(1, abs=1e-12) and blank["images"] == 360


def test_reconstruction_is_compared_with_every_other_image(digits):
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


def ssim(a, b):
    """Wang et al. (2004), equations 13 to 15, at all places of an image that goes on mirrored beyond its edges."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def mean(image):
        return np.einsum("ijkl,kl->ij", np.lib.stride_tricks.sliding_window_view(image, (11, 11)), window)

    a, b = (np.pad(image.astype(np.float64), 5, mode="reflect") for image in (a, b))
    m_a, m_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - m_a**2, mean(b * b) - m_b**2, mean(a * b) - m_a * m_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * m_a * m_b + c1) * (2 * cov + c2) / ((m_a**2 + m_b**2 + c1) * (var_a + var_b + c2))).mean()


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


@pytest.mark.parametrize("name", ("linear", "linear-layers", "knn", "svm", "svm-paper", "classes"))
def test_metrics_of_classes_refuse_a_data_set_without(digits, name):
    with pytest.raises(UserError, match="digits has no classes"):
        METRICS[name](None, dataclasses.replace(digits, classes=()), ALONE)


def swapped(digits):
    """The digits and a model that is trained on the split that others are validated on."""
    model = untrained(dataclasses.replace(RECIPES["digits"], train_split="valid"), digits.mean_image)
    return model, dataclasses.replace(digits, notes={})


@pytest.mark.parametrize("name", ("linear", "knn", "reconstruction", "posterior", "classes"))
def test_no_run_is_tested_on_its_own_training_images(digits, name):
    model, index = swapped(digits)
    found = METRICS[name](model, index, ALONE)
    assert found["split"] == "train"
    if "train_split" in found:
        assert (found["train_split"], found["train_images"], found["test_images"]) == ("valid", 360, 1437)
    else:
        assert found["images"] == min(1437, 2000)


def test_labelled_test_images_are_preferred_to_validation_images(digits):
    model, index = swapped(digits)
    with_test = dataclasses.replace(index, splits={**digits.splits, "test": digits.splits["valid"]})
    assert unseen_split(model, index) == "train" and unseen_split(model, with_test) == "test"
    unlabelled = dataclasses.replace(with_test, notes={"test": Notes()})
    assert unseen_split(model, unlabelled) == "train"


@pytest.mark.parametrize("name", ("linear", "linear-layers", "knn", "svm", "classes"))
def test_one_class_leaves_nothing_to_tell_apart(digits, name):
    with pytest.raises(UserError, match="digits has one class"):
        METRICS[name](None, dataclasses.replace(digits, classes=("0",)), ALONE)


def test_as_asked_is_the_share_that_the_classifier_calls_so(digits):
    """Samples are flat pictures of what was asked for; the classifier takes each 3 for a 4 and is right otherwise."""
    asked = Fake(None)
    asked.latent, asked.labels = 2, 10
    asked.decode = lambda z, y: (y.float() / 10).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)

    def classify(x, generator):
        if x.dtype == torch.uint8:  # real images: calls all of them 0
            return F.one_hot(torch.zeros(len(x), dtype=torch.int64), 10)
        shown = (x[:, 0, 0, 0] * 10).round().long()
        return F.one_hot(torch.where(shown == 3, 4, shown), 10)

    judge = SimpleNamespace(
        classify=classify,
        recipe=RECIPES["digits"],
        place="runs/judge",
        net=SimpleNamespace(nets=SimpleNamespace(classes=10)),
    )
    found = METRICS["classes"](asked, digits, Work(classifier=judge))
    assert found["as_asked"] == 0.9 and found["share/3"] == 0 and found["share/4"] == 0.2
    assert found["classes_shown"] == 9 and found["classifier"] == "runs/judge"
    zeros = (read(digits, "valid", Chunk(0, 360)).y == 0).double().mean().item()
    assert found["classifier_error"] == pytest.approx(1 - zeros) and found["test_images"] == 360
    judge.net.nets.classes = 7
    with pytest.raises(UserError, match="tells 7 classes apart, data set digits has 10"):
        METRICS["classes"](asked, digits, Work(classifier=judge))
    judge.checkpoint, asked.run = Path("runs/judge/checkpoints/8"), SimpleNamespace(root=Path("runs/judge"))
    with pytest.raises(UserError, match="is the run that is evaluated"):
        check_classifier(asked, judge)
    asked.run.root, judge.net.nets.classes = Path("runs/asked"), 0
    with pytest.raises(UserError, match="tells no classes apart"):
        check_classifier(asked, judge)
    judge.net.nets.classes, judge.net.nets.image, asked.shape = 10, (3, 32, 32), (1, 32, 32)
    with pytest.raises(UserError, match="takes images of shape"):
        check_classifier(asked, judge)
