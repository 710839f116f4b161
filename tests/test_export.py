"""A model handed on: it loads anywhere, computes the same, and is refused when it is not what it should be."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import recipe

import ali_dist
from ali_dist import checkpoint, export, figures
from ali_dist.evaluate.__main__ import main as evaluate
from ali_dist.pictures import to_uint8
from ali_dist.recipe import UserError
from ali_dist.run import RunFolder
from ali_dist.state import TrainState

ROOT = Path(export.__file__).parents[1]


def trained(folder, digits, **changes) -> Path:
    """A run with one checkpoint, of random networks whose averaged weights differ."""
    run, state = RunFolder(folder), TrainState(recipe(**changes), digits.mean_image, torch.device("cpu"))
    with torch.no_grad():
        for parameter in state.averaged.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    state.num_images = 12_800
    run.claim(state.recipe, "auto")
    checkpoint.save(run, state)
    return run.root


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A run with metrics of this checkpoint, of another, of other weights, and what is no metric."""
    root = trained(tmp_path_factory.mktemp("runs") / "run", digits)
    mine = {"checkpoint": str(root / "checkpoints" / "000000012800"), "weights": "averaged", "versions": {"torch": "2"}}
    lines = [
        {"metric": "linear", "accuracy": 0.25, **mine},
        {"metric": "linear", "accuracy": 0.75, **mine},
        {"metric": "knn", "accuracy": 0.125, **mine, "weights": "raw"},
        {"metric": "svm", "error": 0.375, **mine, "checkpoint": "/elsewhere/000000006400"},
        {"metric": "evil|`\n# heading", "text": "a`b|c", **mine},
        [],
    ]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"metric": "cut')
    return root


@pytest.fixture
def command(run_command):
    return lambda *words: run_command(export.main, ["export", *map(str, words)])


@pytest.fixture
def folder(command, run, tmp_path):
    """An exported model, to be changed at will."""
    assert command(run, "--out", tmp_path / "model")[0] == 0
    return tmp_path / "model"


def images(n=5):
    return torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def test_the_folder_computes_what_the_run_computes(run, folder, command, tmp_path):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    ]
    mine, theirs = ali_dist.load(run), ali_dist.load(folder)
    x, z = images(), torch.randn(3, 4)
    assert torch.equal(mine.encode(x), theirs.encode(x)) and torch.equal(mine.decode(z), theirs.decode(z))
    assert mine.recipe == theirs.recipe
    sheet = torch.from_numpy(np.array(Image.open(folder / "samples.png")))
    first = to_uint8(mine.sample(64, seed=0))
    assert sheet.shape == (256, 256) and torch.equal(sheet[:32, 32:64], first[1, 0])
    assert command(run, "--out", tmp_path / "raw", "--weights", "raw")[0] == 0
    raw = ali_dist.load(tmp_path / "raw", weights="raw")
    assert torch.equal(raw.encode(x), ali_dist.load(run, weights="raw").encode(x))
    assert not torch.equal(raw.encode(x), mine.encode(x))
    for path, weights in ((tmp_path / "raw", "averaged"), (folder, "raw")):
        with pytest.raises(UserError, match="weights only: load it with weights="):
            ali_dist.load(path, weights=weights)


def test_the_card_is_filled_from_the_run(folder, run, command, tmp_path):
    text = (folder / "README.md").read_text()
    for words in (
        'license: "unknown"',
        "`digits`",
        "`12,800`",
        "`small, ",
        "![64 samples](samples.png)",
        "ali_dist.load(",
    ):
        assert words in text, words
    assert '| `linear` | `{"accuracy": 0.75}` |' in text and "0.25" not in text  # the last one
    assert "0.125" not in text and "0.375" not in text  # other weights, another checkpoint
    assert "\n# heading" not in text and '| `evil # heading` | `{"text": "a b c"}` |' in text
    assert str(run) not in text + (folder / "config.json").read_text()  # nobody's folders
    assert command(run, "--out", tmp_path / "licensed", "--license", "cc-by-4.0")[0] == 0
    text = (tmp_path / "licensed" / "README.md").read_text()
    assert 'license: "cc-by-4.0"' in text and "Of the weights: cc-by-4.0." in text


def test_loading_needs_no_trainer_and_no_network(digits, command, tmp_path):
    run, folder = trained(tmp_path / "run", digits, networks="digits"), tmp_path / "model"
    assert command(run, "--out", folder)[0] == 0
    code = """
import pickle, socket, sys
import ali_dist.model, torch
def refuse(*_, **__):
    raise OSError("never")
socket.socket.connect = socket.getaddrinfo = refuse
pickle.Unpickler = pickle.load = pickle.loads = torch.load = refuse
model = ali_dist.load(sys.argv[1])
print(model.encode(torch.zeros(2, 1, 32, 32)).double().sum().item())
loaded = {name if name.startswith("ali_dist.") else name.split(".")[0] for name in sys.modules}
print(sorted(loaded & {"ray", "webdataset", "tensorboard", "pyarrow", "pandas", "sklearn", "requests", "tyro"}))
print(sorted(loaded & {f"ali_dist.{name}" for name in ("loop", "step", "meter", "worker", "launch", "cluster")}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    total, foreign, trainer = done.stdout.splitlines()
    assert float(total) == ali_dist.load(run).encode(torch.zeros(2, 1, 32, 32)).double().sum().item()
    assert (foreign, trainer) == ("[]", "[]")


def test_downloaded_folders_are_made_of_links(folder, tmp_path):
    (tmp_path / "cache").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "cache" / name).symlink_to(folder / name)
    assert torch.equal(ali_dist.load(tmp_path / "cache").encode(images()), ali_dist.load(folder).encode(images()))


@pytest.mark.parametrize("networks", ["small-conditional", "small-attributes", "small-classes"])
def test_models_with_labels(digits, command, tmp_path, networks):
    semi = {"labels": 100, "labelled_batch": 4} if networks == "small-classes" else {}
    run, out = trained(tmp_path / "run", digits, networks=networks, **semi), tmp_path / "out"
    assert command(run, "--out", out)[0] == 0
    model, text = ali_dist.load(out), (out / "README.md").read_text()
    if semi:
        same = {"generator": torch.Generator().manual_seed(0)}
        logits = model.classify(images(), **same)
        same["generator"].manual_seed(0)
        assert torch.equal(logits, ali_dist.load(run).classify(images(), **same)) and "model.classify(" in text
        return
    assert "y=labels" in text and f"`{model.labels} classes or attributes`" in text
    y = torch.zeros(1, model.labels)
    assert torch.equal(model.encode(images(), y), ali_dist.load(run).encode(images(), y))


def test_a_supervised_run_has_no_samples(digits, command, tmp_path):
    semi = {"labels": 100, "supervised_only": True}
    run = trained(tmp_path / "run", digits, networks="small-classes", **semi)
    assert command(run, "--out", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "samples.png").exists()
    assert "samples.png" not in (tmp_path / "out" / "README.md").read_text()


def test_bad_flags_are_one_line_and_write_nothing(command, run, folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for words, message in (
        ([run, "--out", folder], f"{folder} exists"),
        ([run, "--out", tmp_path / "a", "--license", "mine\ntags: x"], "--license 'mine\\ntags: x'"),
        ([tmp_path / "nowhere", "--out", tmp_path / "a"], "no checkpoint at"),
        ([folder, "--out", tmp_path / "a"], "is an exported model, which is of no run"),
    ):
        code, _, err = command(*words)
        assert code == 2 and err.count("\n") == 1 and message in err, err
    code, out, _ = command(run.name, "--storage", run.parent, "--out", tmp_path / "a", "--dry-run")
    assert code == 0 and "would export" in out and not (tmp_path / "a").exists()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_commands_that_write_to_a_run_say_that_this_is_none(folder, data, run_command):
    for main, words in ((evaluate, ["--metrics", "posterior"]), (figures.main, [])):
        code, _, err = run_command(main, ["command", str(folder), "--data", str(data), *words])
        assert code == 2 and "is an exported model, which is of no run" in err


def test_what_an_interrupted_export_left_is_no_model(command, run, tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "model.safetensors").write_bytes(b"half")
    assert command(run, "--out", tmp_path / "model")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def change(folder, edit) -> None:
    tree = json.loads((folder / "config.json").read_text())
    edit(tree)
    (folder / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree.update(model_type="bert"),
        lambda tree: tree.update(version=2),
        lambda tree: tree.update(version=[]),
        lambda tree: tree.update(weights={"a": 1}),
        lambda tree: tree.update(num_images="1"),
        lambda tree: tree.update(sha256="x"),
        lambda tree: tree.update(sha256={"model.safetensors": []}),
        lambda tree: tree.update(recipe=[]),
        lambda tree: tree["recipe"].update(networks="unheard of"),
        lambda tree: tree["recipe"].update(networks=["small"]),
        lambda tree: tree["recipe"].update(networks="small-conditional"),
        lambda tree: tree["recipe"].update(code="import os"),
        lambda tree: tree["recipe"]["optim"].update(lr=10**400),
        lambda tree: tree["recipe"]["optim"].update(lr="__import__('os')"),
        lambda tree: tree.clear(),
    ],
)
def test_hostile_configs(folder, edit):
    change(folder, edit)
    with pytest.raises(UserError) as error:
        ali_dist.load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 10**5, '{"a": "' + "x" * 2**21 + '"}', "\udcff"])
def test_configs_that_are_no_configs(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="config.json is damaged"):
        ali_dist.load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (2**40).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b"[[[[[[[[",
        pickle.dumps({"a": 1}),
    ],
)
def test_hostile_weights(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="model.safetensors does not match the checksum"):
        ali_dist.load(folder)
    path.write_bytes(content)
    change(folder, lambda tree: tree["sha256"].update({path.name: hashlib.sha256(content).hexdigest()}))
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        ali_dist.load(folder)


def test_files_that_are_devices_are_no_model(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # reading it would never end
    with pytest.raises(UserError, match="no checkpoint at"):
        ali_dist.load(folder)
