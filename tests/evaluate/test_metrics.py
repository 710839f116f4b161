"""Probes, classes and classification; and what all metrics refuse."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import Fake
from pixels import pixels

from ali_dist.data.index import Notes
from ali_dist.evaluate import knn as knn_module
from ali_dist.evaluate import linear as linear_module
from ali_dist.evaluate.classes import check_classifier
from ali_dist.evaluate.data import read, unseen_split
from ali_dist.evaluate.features import FEATURES
from ali_dist.evaluate.knn import knn
from ali_dist.evaluate.logistic import Rows, fit
from ali_dist.evaluate.table import METRICS
from ali_dist.evaluate.work import ALONE, Chunk, Work
from ali_dist.model import untrained
from ali_dist.recipe import UserError
from ali_dist.recipes import RECIPES


@pytest.fixture(autouse=True)
def no_large_network(monkeypatch):
    monkeypatch.setitem(FEATURES, "efficientnet-lite0", lambda work: pixels())


def test_knn_of_an_untrained_encoder_is_its_own_baseline(digits):
    found = knn(untrained(RECIPES["digits"], digits.mean_image), digits)
    assert found["accuracy_1"] == found["accuracy_1_untrained"] > 0.8
    assert found["accuracy_5"] == found["accuracy_5_untrained"] > 0.8
    assert (found["train_images"], found["test_images"]) == (1437, 360)


def probed(monkeypatch, generator):
    """Codes of a train and a test split, by rule: three classes of 40 and 30 images."""
    sets = {}
    for split, n in (("train", 120), ("valid", 90)):
        y = np.arange(n) % 3
        x = generator.normal(size=(n, 4)) + 0.8 * np.eye(4)[y]
        sets[split] = ((x * [1, 10, 0.1, 1] + 3).astype(np.float32), y)
    for module in (linear_module, knn_module):
        monkeypatch.setattr(module, "codes", lambda model, index, split, work: sets[split])
    return sets


def test_linear_and_knn_are_those_of_standardised_codes(digits, monkeypatch):
    """Nearest neighbours by a loop; logistic regression by our own solver, whose decay is 1 / (n C)."""
    sets = probed(monkeypatch, np.random.default_rng(0))
    (x, y), (test, test_y) = sets["train"], sets["valid"]
    mean, deviation = x.astype(np.float64).mean(0), x.astype(np.float64).std(0)
    a, b = (x - mean) / deviation, (test - mean) / deviation
    model = untrained(RECIPES["digits"], digits.mean_image)
    found = knn(model, digits)
    for k in (1, 5):
        right = 0
        for row, label in zip(b, test_y, strict=True):
            votes = np.bincount(y[np.argsort(((a - row) ** 2).sum(1))[:k]], minlength=3)
            right += votes.argmax() == label
        assert found[f"accuracy_{k}"] == pytest.approx(right / 90, abs=1e-12) and 0.3 < right / 90 < 1
    fitted = fit(Rows(a.astype(np.float32), y), 3, 1 / (0.1 * 120), slope=1e-5, gain=1e-8)
    error = fitted.error(Rows(b.astype(np.float32), test_y))
    accuracy = METRICS["linear"](model, digits, ALONE)["accuracy"]
    assert accuracy == pytest.approx(1 - error, abs=1e-12) and 0.3 < accuracy < 1


def test_classification_counts_single_draws_and_their_mean_probability(digits):
    """Of three draws two are just wrong and one is surely right: wrong two times in three, but right together."""
    calls, judge = itertools.count(), Fake(None)
    judge.net, judge.checkpoint = SimpleNamespace(nets=SimpleNamespace(classes=10)), "runs/judge/checkpoints/8"
    labels = torch.cat([read(digits, "valid", Chunk(0, 256)).y, read(digits, "valid", Chunk(256, 360)).y])

    def classify(x, generator):
        call = next(calls)
        y = labels[:256] if call < 3 else labels[256:]
        sure, wrong = 10.0 * F.one_hot(y, 10), 0.1 * F.one_hot((y + 1) % 10, 10)
        sure[y == 7] = wrong[y == 7]  # and always wrong about sevens
        return sure if call % 3 == 1 else wrong

    judge.classify = classify
    found = METRICS["classification"](judge, digits, ALONE)
    sevens = int((labels == 7).sum())
    assert found["error_of_mean_probability"] == pytest.approx(sevens / 360) and sevens > 0
    assert found["error"] == pytest.approx((2 * 360 + sevens) / (3 * 360)) and found["test_images"] == 360


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
