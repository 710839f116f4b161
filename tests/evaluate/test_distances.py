"""Distances of samples from a data set."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from pixels import pixels
from support import recipe
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ali_dist.evaluate import distances, seen
from ali_dist.evaluate.__main__ import main
from ali_dist.evaluate.data import read
from ali_dist.evaluate.distances import frechet, kernel_distance, prdc
from ali_dist.evaluate.features import FEATURES, load_efficientnet_lite0
from ali_dist.evaluate.seen import pair, quantised, reference, see
from ali_dist.evaluate.table import METRICS
from ali_dist.evaluate.work import Chunk, Work
from ali_dist.model import untrained
from ali_dist.recipe import UserError


def drawn(n, size, seed, scale=1.0, shift=0.0):
    """Correlated features, float32 [n, size]."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(n, size)) @ generator.normal(size=(size, size))
    return torch.from_numpy((scale * mixed + shift).astype(np.float32))


def test_one_pass_in_parts_leaves_mean_and_covariance(monkeypatch):
    monkeypatch.setattr(seen, "KEPT", 130)
    x = drawn(300, 7, 0, shift=50.0)
    found = see(x.split(64))
    np.testing.assert_allclose(found.mean.numpy(), x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-8)
    assert found.total.dtype == found.products.dtype == torch.float64 and found.count == 300
    assert torch.equal(found.features, x[:130])


def test_frechet_is_the_formula_with_a_matrix_root_and_the_librarys_fid():
    x, y = drawn(400, 16, 0), drawn(300, 16, 1, 0.7, 0.3)
    a, b = x.double().numpy(), y.double().numpy()
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(c @ d).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root)
    found = frechet(see(x.split(100)), see(y.split(100)))
    assert found == pytest.approx(expected, rel=1e-9) and expected > 1

    network = nn.Identity()
    network.num_features = 16
    library = FrechetInceptionDistance(network)
    library.update(x.double(), real=True)
    library.update(y.double(), real=False)
    assert found == pytest.approx(library.compute().item(), rel=1e-9)


def test_frechet_of_fewer_images_than_features():
    x = drawn(12, 40, 0)
    assert frechet(see([x]), see([x])) == pytest.approx(0, abs=1e-4)
    assert frechet(see([x]), see([x + 3])) == pytest.approx(9 * 40, rel=1e-6)


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = drawn(9, 3, 0), drawn(9, 3, 1, shift=0.5)
    a, b = x.double().tolist(), y.double().tolist()

    def kernel(u, v):
        return (sum(s * t for s, t in zip(u, v, strict=True)) / 3 + 1) ** 3

    def within(u):
        return sum(kernel(u[i], u[j]) for i in range(9) for j in range(9) if i != j) / 72

    expected = within(a) + within(b) - 2 * sum(kernel(u, v) for u in a for v in b) / 81
    found = kernel_distance(x, y)
    assert found["distance"] == pytest.approx(expected, rel=1e-9) and found["subset_images"] == 9
    assert found["std"] < 1e-9 * abs(expected)  # each draw is the whole


def test_kernel_distance_draws_by_its_seed_alone(monkeypatch):
    monkeypatch.setattr(distances, "SUBSET", 20)
    x, y = drawn(90, 3, 0), drawn(80, 3, 1)
    found = kernel_distance(x, y)
    state = torch.get_rng_state()
    assert kernel_distance(x, y) == found != kernel_distance(x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and found["std"] > 0


def test_kernel_distance_of_subsets_is_the_mean_over_its_draws(monkeypatch):
    """A loop in float64 over the subsets that the library's two permutations a draw begin with."""
    monkeypatch.setattr(distances, "SUBSET", 7)
    monkeypatch.setattr(distances, "SUBSETS", 5)
    x, y = drawn(20, 3, 0), drawn(15, 3, 1, shift=0.5)
    torch.manual_seed(0)
    expected = []
    for _ in range(5):
        a, b = x.double().numpy()[torch.randperm(20)[:7]], y.double().numpy()[torch.randperm(15)[:7]]
        total = 0.0
        for i in range(7):
            for j in range(7):
                total += ((a[i] @ a[j] / 3 + 1) ** 3 + (b[i] @ b[j] / 3 + 1) ** 3) / 42 if i != j else 0
                total -= 2 * (a[i] @ b[j] / 3 + 1) ** 3 / 49
        expected.append(total)
    found = kernel_distance(x, y)
    assert found["distance"] == pytest.approx(np.mean(expected), rel=1e-9)
    assert found["std"] == pytest.approx(np.std(expected), rel=1e-9) and found["std"] > 0
    assert (found["subsets"], found["subset_images"]) == (5, 7)


def test_prdc_is_the_count_over_all_pairs(monkeypatch):
    monkeypatch.setattr(distances, "MEGABYTES", 0.002)  # a few rows at a time
    x, y = drawn(60, 4, 0).numpy(), drawn(45, 4, 0, 1.2, 0.8).numpy()

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[4]

    balls, fake_balls = [radius(x, i) for i in range(60)], [radius(y, j) for j in range(45)]
    inside = [[np.linalg.norm(x[i] - y[j]) < balls[i] for i in range(60)] for j in range(45)]
    recalled = [any(np.linalg.norm(x[i] - y[j]) < fake_balls[j] for j in range(45)) for i in range(60)]
    found = prdc(x, y)
    assert found["precision"] == pytest.approx(np.mean([any(row) for row in inside])) and 0 < found["precision"] < 1
    assert found["recall"] == pytest.approx(np.mean(recalled)) and 0 < found["recall"] < 1
    assert found["density"] == pytest.approx(np.sum(inside) / (5 * 45))
    assert found["coverage"] == pytest.approx(np.mean([any(row[i] for row in inside) for i in range(60)]))


def test_prdc_is_the_packages():
    """prdc 0.2, `compute_prdc(x, y, nearest_k=5)`, gave these."""
    x = np.random.RandomState(0).standard_normal((70, 4))
    y = np.random.RandomState(1).standard_normal((50, 4)) * 1.3 + 0.6
    expected = {"precision": 0.84, "recall": 0.9285714285714286, "density": 0.728, "coverage": 0.7, "neighbours": 5}
    assert prdc(x, y) == pytest.approx(expected, rel=1e-12)


def test_only_inceptions_distances_have_its_names():
    by_network = {}
    for name, metric in METRICS.items():
        if "features" in getattr(metric, "keywords", {}):
            by_network.setdefault(metric.keywords["features"], []).append(name)
    assert by_network.keys() == FEATURES.keys()
    assert by_network["inception"] == ["fid", "kid", "prdc"]
    assert by_network["efficientnet-lite0"] == [f"{name}-efficientnet-lite0" for name in ("fd", "kd", "prdc")]


def test_the_data_sets_features_are_computed_once(digits, tmp_path, caplog):
    network, work = pixels(), Work(cache=tmp_path / "cache")
    first = reference(digits, network, 300, work)
    calls = network.net.calls
    again = reference(digits, network, 300, work)
    assert network.net.calls == calls > 0
    for name in ("count", "total", "products", "features"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("digits-train-300-pixels-") and file.suffix == ".safetensors"

    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    assert torch.equal(reference(digits, network, 300, work).features, first.features)
    assert network.net.calls == 2 * calls and "is damaged" in caplog.text
    file.write_bytes(b"cut")
    assert torch.equal(reference(digits, network, 300, work).features, first.features)

    for other in (Work(cache=tmp_path / "cache", reference="valid"), Work(cache=tmp_path / "cache", images=299)):
        reference(digits, network, min(other.images, 300), other)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write to --cache"):
        reference(digits, network, 20, Work(cache=tmp_path / "file" / "cache"))


def test_distances_tell_images_from_noise(digits):
    network = load_efficientnet_lite0(Work())
    real = network(digits_images(digits, 0, 60))
    other = network(digits_images(digits, 60, 120))
    noise = network(torch.randint(0, 256, (60, 1, 32, 32), dtype=torch.uint8))
    assert real.shape == (60, network.size)
    assert 5 * kernel_distance(real, other)["distance"] < kernel_distance(real, noise)["distance"]
    assert prdc(real.numpy(), other.numpy())["precision"] > 0.5 > prdc(real.numpy(), noise.numpy())["precision"]


def digits_images(digits, start, stop):
    return read(digits, "train", Chunk(start, stop)).x


def test_a_generator_of_the_data_set_is_at_distance_zero(digits, tmp_path, monkeypatch):
    """A model that shows the very images that it is compared with."""
    monkeypatch.setitem(FEATURES, "pixels", lambda work: pixels())
    model = untrained(recipe(), digits.mean_image)
    images = digits_images(digits, 0, 300).float() / 255
    shown = iter([images[:256], images[256:]])
    monkeypatch.setattr(model, "decode", lambda z, y: next(shown))
    work = Work(cache=tmp_path, images=300)
    found = {
        name: distances.compared(model, digits, work, features="pixels", measure=measure)
        for name, measure in distances.MEASURES.items()
    }
    assert found["fd"]["distance"] == pytest.approx(0, abs=1e-2) and found["fd"]["images"] == 300
    assert found["prdc"]["precision"] == found["prdc"]["recall"] == found["prdc"]["coverage"] == 1
    assert found["kd"]["network"] == "pixels" and found["kd"]["split"] == "train"


def test_a_conditional_model_is_asked_for_the_labels_of_the_images(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURES, "pixels", lambda work: pixels())
    model, asked = untrained(recipe(networks="small-conditional"), digits.mean_image), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z, y: asked.append(y) or decode(z, y))
    both = pair(model, digits, "pixels", Work(cache=tmp_path, images=300))
    assert torch.equal(torch.cat(asked), read(digits, "train", Chunk(0, 300)).y)
    assert both.fake.count == both.real.count == 300 and both.fake.features.shape == (300, 16)
    assert torch.equal(
        quantised(torch.tensor([0.0, 0.5, 1.0, 1.1])), torch.tensor([0, 128, 255, 255], dtype=torch.uint8)
    )


def test_the_command_compares_samples_with_images(saved_run, run_command, data, tmp_path):
    names = [f"{name}-efficientnet-lite0" for name in ("fd", "kd", "prdc")]
    words = ["evaluate", str(saved_run), "--data", str(data), "--cache", str(tmp_path / "cache")]
    code, out, err = run_command(main, [*words, "--metrics", ",".join(names), "--images", "100"])
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["metric"] for line in lines] == names and {line["images"] for line in lines} == {100}
    assert lines[0]["distance"] > 0 and lines[1]["distance"] > 0 and lines[2]["coverage"] < 1
    assert lines[0]["versions"].keys() == {"python", "torch", "ali_dist", "numpy", "scikit-learn", "torchmetrics"}
    assert lines[0]["device"] in ("cpu", "cuda") and lines[0]["shards_sha256"].keys() == {"train", "valid"}
    kept = (saved_run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == lines
    for more, complaint in (
        (["--reference", "tset"], "no split 'tset': it has train, valid"),
        (["--images", "5"], "5 images of split 'train' are too few: compare at least 10"),
        (["--num-workers", "0"], "--num-workers must be at least 1"),
        (["--draws", "0"], "--draws must be at least 1"),
        (["--metrics", "fidd"], "unknown metric 'fidd': did you mean 'fid'?"),
    ):
        code, _, err = run_command(main, [*words, "--metrics", names[0], *more])
        assert code == 2 and complaint in err and len(err.splitlines()) == 1
