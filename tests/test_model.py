import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import recipe

import ali_dist
from ali_dist import checkpoint, model
from ali_dist.data.stream import validation
from ali_dist.evaluate.__main__ import main
from ali_dist.layers import Layer
from ali_dist.recipe import UserError
from ali_dist.run import RunFolder
from ali_dist.state import TrainState


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A run with one checkpoint whose raw and averaged weights differ."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "small")
    state = TrainState(recipe(), digits.mean_image, torch.device("cpu"))
    with torch.no_grad():
        for parameter in state.averaged.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    state.num_images = 8
    run.claim(state.recipe, "auto")
    checkpoint.save(run, state)
    return run, state


@pytest.fixture(scope="module")
def loaded(run):
    return ali_dist.load(run[0].root)


def images(n=5):
    return torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def test_load_takes_a_run_or_a_checkpoint_and_averaged_or_raw_weights(run):
    folder, state = run
    z = torch.randn(3, 4)
    for path in (folder.root, str(folder.root), folder.saved()[-1]):
        with torch.no_grad():
            assert torch.equal(ali_dist.load(path).decode(z), state.averaged.decode(z))
    with torch.no_grad():
        expected = state.model.eval().decode(z)
    assert torch.equal(ali_dist.load(folder.root, weights="raw").decode(z), expected)
    assert not torch.equal(expected, ali_dist.load(folder.root).decode(z))


def test_encode_gives_mu_and_with_sample_a_draw_around_it(loaded):
    x = images()
    mu = loaded.encode(x)
    with torch.no_grad():
        expected, log_sigma = loaded.net.encode(x.float() / 255)
    torch.testing.assert_close(mu, expected)
    draw = loaded.encode(x, sample=True, generator=torch.Generator().manual_seed(3))
    eps = torch.randn(mu.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(draw, expected + log_sigma.exp() * eps)


def test_images_may_be_uint8_or_float_arrays_or_tensors_of_any_number(loaded):
    x = images(600)  # more than a batch
    mu = loaded.encode(x)
    assert mu.shape == (600, 4)
    torch.testing.assert_close(loaded.encode(x.numpy()), mu)
    torch.testing.assert_close(loaded.encode(x.double().numpy() / np.float64(255)), mu)
    torch.testing.assert_close(loaded.encode(x[550:]), mu[550:], rtol=1e-4, atol=1e-6)


def test_samples_repeat_by_seed_and_are_images(loaded):
    a, b, c = loaded.sample(7, seed=0), loaded.sample(7, seed=0), loaded.sample(7, seed=1)
    assert a.shape == (7, 1, 32, 32) and a.dtype == torch.float32
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert 0 <= a.min() and a.max() <= 1
    assert not torch.equal(loaded.sample(2), loaded.sample(2))


def test_reconstruct_decodes_a_drawn_code(loaded):
    x = images()
    z_hat = loaded.encode(x, sample=True, generator=torch.Generator().manual_seed(4))
    reconstruction = loaded.reconstruct(x, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(reconstruction, loaded.decode(z_hat))


def test_interpolations_run_from_one_drawn_code_to_the_other(loaded):
    x1, x2 = images(3), images(6)[3:]
    path = loaded.interpolate(x1, x2, 5, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    z1, z2 = (loaded.encode(x, sample=True, generator=generator) for x in (x1, x2))
    assert path.shape == (3, 5, 1, 32, 32)
    for step, t in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        torch.testing.assert_close(path[:, step], loaded.decode(z1 * (1 - t) + z2 * t))


def test_wrong_shapes_are_named(loaded):
    with pytest.raises(ValueError, match=r"\[N, 1, 32, 32\]"):
        loaded.encode(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\[N, 4\]"):
        loaded.decode(torch.zeros(2, 5))


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, digits):
    """A conditional model, saved and loaded, in which labels show."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "conditional")
    state = TrainState(recipe(networks="small-conditional"), digits.mean_image, torch.device("cpu"))
    with torch.no_grad():
        for parameter in state.averaged.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        state.averaged.embedding.weight.mul_(100)
    state.num_images = 8
    run.claim(state.recipe, "auto")
    checkpoint.save(run, state)
    loaded = ali_dist.load(run.root)
    assert torch.equal(loaded.net.embedding.weight, state.averaged.embedding.weight)
    return loaded


def test_a_conditional_model_heeds_y_everywhere(conditional):
    x, z = images(), torch.randn(5, 4)
    y, other = torch.tensor([0, 1, 2, 3, 9]), torch.tensor([0, 1, 2, 3, 4])

    def generator():
        return torch.Generator().manual_seed(3)

    for call in (
        lambda y: conditional.encode(x, y),
        lambda y: conditional.encode(x, y, sample=True, generator=generator()),
        lambda y: conditional.decode(z, y),
        lambda y: conditional.reconstruct(x, y, generator=generator()),
        lambda y: conditional.sample(5, y, seed=0),
        lambda y: conditional.interpolate(x, x, 3, y, y, generator=generator()),
    ):
        mine, theirs = call(y), call(other.numpy())
        torch.testing.assert_close(mine[:4], theirs[:4])
        assert (mine[4] - theirs[4]).abs().max() > 1e-4
        one_hot = torch.nn.functional.one_hot(y, 10)
        torch.testing.assert_close(call(one_hot.to(torch.uint8)), mine)
    torch.testing.assert_close(conditional.sample(5, 7, seed=0), conditional.sample(5, [7] * 5, seed=0))
    both = torch.zeros(1, 10)
    both[0, [2, 7]] = 1
    torch.testing.assert_close(conditional.decode(z, both), conditional.decode(z, both.expand(5, -1)))


def test_labels_go_along_with_interpolations_and_batches(conditional):
    x1, x2, y1, y2 = images(3), images(6)[3:], torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    path = conditional.interpolate(x1, x2, 3, y1, y2, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    z1, z2 = (conditional.encode(x, y, sample=True, generator=generator) for x, y in ((x1, y1), (x2, y2)))
    one_hot = torch.nn.functional.one_hot
    halves = (one_hot(y1, 10) + one_hot(y2, 10)) / 2
    for step, (z, y) in enumerate(((z1, y1), ((z1 + z2) / 2, halves), (z2, y2))):
        torch.testing.assert_close(path[:, step], conditional.decode(z, y))
    many, y = images(600), torch.arange(600) % 10  # more than a batch
    torch.testing.assert_close(conditional.encode(many, y)[550:], conditional.encode(many[550:], y[550:]))
    long = conditional.interpolate(many[:300], many[300:], 2, y[:300], y[300:])
    assert long.shape == (300, 2, 1, 32, 32)


def test_labels_that_do_not_fit_are_named(loaded, conditional):
    z = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="this one is unconditional"):
        loaded.decode(z, [1, 2, 3])
    with pytest.raises(ValueError, match="a conditional model needs y: classes below 10, or 10 attributes"):
        conditional.decode(z)
    for y in ([1, 2], torch.zeros(3, 9), torch.zeros(2, 10)):
        with pytest.raises(ValueError, match=r"y must have shape \[3\] or \[3, 10\], not"):
            conditional.decode(z, y)
    for y in ([0, 1, 10], [-1, 0, 1], [0.5, 1, 2], 10):
        with pytest.raises(ValueError, match="y must be integers from 0 to 9"):
            conditional.decode(z, y)
    with pytest.raises(ValueError, match="this one is conditional"):
        conditional.features(images())


def test_what_a_command_line_names(tmp_path, run, monkeypatch):
    folder, newest = run[0].root, run[0].saved()[-1]
    monkeypatch.chdir(folder.parent)
    for words, storage in (
        (folder, "elsewhere"),
        (folder.name, "elsewhere"),
        (newest, "elsewhere"),
        (f"{folder.name}/checkpoints/{newest.name}", "elsewhere"),
    ):
        assert model.find(str(words), storage).resolve() == newest.resolve()
    (tmp_path / folder.name).mkdir()  # no run, as a data set of that name is none
    monkeypatch.chdir(tmp_path)
    for words in (folder.name, f"{folder.name}/checkpoints/{newest.name}"):
        assert model.find(words, str(folder.parent)) == newest
    with pytest.raises(UserError, match=f"no checkpoint at nothing, nor at {folder.parent}/nothing: .* --storage$"):
        model.find("nothing", str(folder.parent))
    with pytest.raises(UserError, match="^--storage https://host/runs: give a folder"):
        model.find("nothing", "https://me:hush@host/runs")


def test_no_checkpoint_and_a_damaged_one_are_named(tmp_path, run):
    with pytest.raises(UserError, match="no checkpoint at"):
        ali_dist.load(tmp_path)
    folder, state = run
    copy = RunFolder(tmp_path)
    checkpoint.save(copy, state)
    file = copy.saved()[0] / "averaged.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="averaged.safetensors"):
        ali_dist.load(copy.root)


def test_untrained_is_the_start_of_training(digits):
    start = TrainState(recipe(), digits.mean_image, torch.device("cpu"))
    untrained = model.untrained(recipe(), digits.mean_image)
    for name, tensor in start.model.state_dict().items():
        assert torch.equal(tensor, untrained.net.state_dict()[name]), name


def test_importing_the_package_imports_no_torch():
    code = "import sys, ali_dist, ali_dist.recipes, ali_dist.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def evaluate(run_command):
    """Runs the command in this process: exit code, stdout, stderr."""
    return lambda *words: run_command(main, ["evaluate", *map(str, words)])


def test_metrics_on_real_digits_are_printed_and_kept(evaluate, tmp_path, data, digits):
    run = RunFolder(tmp_path / "digits")
    state = TrainState(recipe(networks="digits"), digits.mean_image, torch.device("cpu"))
    run.claim(state.recipe, "auto")
    checkpoint.save(run, state)
    code, out, err = evaluate(run.root, "--metrics", "linear,classes", "--data", data)
    assert code == 0, err
    linear, classes = (json.loads(line) for line in out.splitlines())
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [linear, classes]
    assert linear["metric"] == "linear" and linear["test_images"] == 360
    assert linear["accuracy"] == linear["accuracy_untrained"] > 0.8  # pixels at random projections separate digits
    assert classes["classifier_accuracy"] > 0.95
    shares = [classes[f"share/{name}"] for name in digits.classes]
    assert sum(shares) == pytest.approx(1) and max(shares) == classes["largest_share"]
    assert classes["classes_shown"] == sum(share > 0 for share in shares)


def test_metrics_of_a_conditional_run(evaluate, conditional, data, digits):
    run = conditional.checkpoint
    code, out, err = evaluate(run, "--metrics", "reconstruction,posterior,classes", "--data", data)
    assert code == 0, err
    reconstruction, posterior, classes = (json.loads(line) for line in out.splitlines())
    assert reconstruction["images"] == posterior["images"] == 360 and 0 <= classes["as_asked"] <= 1
    for name in ("svm", "linear", "knn"):
        code, _, err = evaluate(run, "--metrics", name, "--data", data)
        assert code == 2 and "is conditional: its encoder is given the labels" in err and err.count("\n") == 1


@pytest.mark.parametrize("supervised_only", [False, True])
def test_metrics_of_a_semi_supervised_run(evaluate, tmp_path, data, digits, supervised_only):
    run = RunFolder(tmp_path / "classes")
    settings = recipe(networks="small-classes", labels=20, labelled_batch=4, supervised_only=supervised_only)
    state = TrainState(settings, digits.mean_image, torch.device("cpu"))
    run.claim(settings, "auto")
    with torch.no_grad():
        for layer in state.averaged.modules():
            if isinstance(layer, Layer):
                layer.weight.normal_(std=layer.weight[0].numel() ** -0.5)
    checkpoint.save(run, state)
    loaded, x = ali_dist.load(run.root), images(300)
    logits = loaded.classify(x, generator=torch.Generator().manual_seed(1))
    assert logits.shape == (300, 10)
    code = loaded.encode(x, sample=True, generator=torch.Generator().manual_seed(1)) * (not supervised_only)
    with torch.no_grad():
        expected, _ = loaded.net.discriminator(x.float() / 255, code[:, :, None, None])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    code, out, err = evaluate(run.root, "--metrics", "classification,posterior", "--data", data)
    assert code == 0, err
    found, posterior = (json.loads(line) for line in out.splitlines())
    batch = next(validation(digits, "valid", count=360, batch_size=360))
    wrong = (loaded.classify(batch.x).argmax(1) != batch.y).double().mean().item()
    assert found["error"] == pytest.approx(wrong, abs=0.02) and found["test_images"] == 360
    assert (found["split"], found["labels"], found["supervised_only"]) == ("valid", 20, supervised_only)
    assert posterior["images"] == 360


def test_only_a_d_of_classes_classifies(evaluate, loaded, run, data):
    with pytest.raises(ValueError, match="this D has one logit"):
        loaded.classify(images())
    code, _, err = evaluate(
        run[0].root.name, "--storage", run[0].root.parent, "--metrics", "classification", "--data", data
    )
    assert code == 2 and "tells no classes apart" in err and err.count("\n") == 1


def test_evaluate_names_what_is_wrong(evaluate, tmp_path, run, data):
    for words, complaint in (
        ((run[0].root, "--metrics", "liner"), "did you mean 'linear'"),
        ((tmp_path, "--metrics", "linear"), "no checkpoint at"),
    ):
        code, _, err = evaluate(*words, "--data", data)
        assert code == 2 and complaint in err and len(err.splitlines()) == 1
