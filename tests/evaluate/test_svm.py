"""L2-SVMs on features from few labels."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.svm import LinearSVC

from ali_dist.data.labelled import balanced_draw
from ali_dist.evaluate.data import read
from ali_dist.evaluate.svm import Svm, error, folds, labelled_split, svm
from ali_dist.evaluate.work import ALONE, Chunk, Work
from ali_dist.model import untrained
from ali_dist.recipe import UserError
from ali_dist.recipes import RECIPES


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
