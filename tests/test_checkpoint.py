import hashlib
import json
import logging
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import assert_same, copies, recipe

from ali_dist import checkpoint
from ali_dist.data.stream import Stream
from ali_dist.recipe import UserError
from ali_dist.run import RunFolder
from ali_dist.state import TrainState
from ali_dist.step import step
from ali_dist.worker import resume

CPU = torch.device("cpu")
FILES = ["adam.safetensors", "averaged.safetensors", "manifest.json", "model.safetensors", "state.json"]


def advance(state: TrainState, index, updates: int) -> TrainState:
    settings = state.recipe
    with Stream(
        index,
        "train",
        seed=settings.seed,
        lanes=settings.lanes,
        micro_batch=settings.micro_batch,
        num_images=state.num_images,
    ) as stream:
        for _ in range(updates):
            step(state, [next(stream) for _ in range(settings.optim.accumulate)])
    return state


def fresh(index, **changes) -> TrainState:
    return TrainState(recipe(**changes), index.mean_image, CPU)


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory) -> RunFolder:
    """A run with the checkpoints of updates 1, 2 and 3; only to be copied."""
    run = RunFolder(tmp_path_factory.mktemp("saved"))
    state = fresh(digits)
    for _ in range(3):
        checkpoint.save(run, advance(state, digits, 1))
    return run


@pytest.fixture
def run(saved, tmp_path) -> RunFolder:
    shutil.copytree(saved.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_saving_and_loading_changes_nothing(digits, tmp_path, accumulate):
    changes = {"batch_size": 8 * accumulate, "accumulate": accumulate}
    through = advance(fresh(digits, **changes), digits, 10)
    first = advance(fresh(digits, **changes), digits, 5)
    path = checkpoint.save(RunFolder(tmp_path), first)
    second = fresh(digits, **changes)
    checkpoint.load(path, second)
    assert second.num_images == 40 * accumulate
    assert_same(first.tensors(), second.tensors())
    advance(second, digits, 5)
    assert second.num_images == through.num_images
    assert_same(second.tensors(), through.tensors())
    for name in ("weight", "bn.running_var", "bn.num_batches_tracked"):
        assert f"model.encoder.0.{name}" in through.tensors() and f"averaged.encoder.0.{name}" in through.tensors()
    assert {"exp_avg", "exp_avg_sq", "step"} <= {name.rpartition(".")[2] for name in through.tensors()}


def test_another_number_of_steps_differs(digits):
    """The comparison above can fail."""
    assert not torch.equal(
        advance(fresh(digits), digits, 1).model.decoder[0].weight,
        advance(fresh(digits), digits, 2).model.decoder[0].weight,
    )


def test_continuing_after_a_killed_process(digits, data, tmp_path):
    storage = tmp_path / "runs"
    command = [sys.executable, "-m", "ali_dist.worker", "--dataset", "digits", "--data", str(data)]
    command += ["--storage", str(storage), "--batch-size", "8", "--precision", "fp32", "--save-images", "40"]
    command += ["--lr", "3e-4", "--ema-half-life", "5000"]  # what fresh() has
    run = RunFolder(storage / "digits")
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path
        )
    deadline = time.monotonic() + 120
    while not run.saved() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()
    state = fresh(digits, networks="digits")
    resume(run, state)
    assert state.num_images >= 40 and state.num_images % 40 == 0
    advance(state, digits, 5)
    through = advance(fresh(digits, networks="digits"), digits, state.num_images // 8)
    assert_same(state.tensors(), through.tensors())


def test_contents_are_tensors_and_json(run):
    path = run.saved()[-1]
    assert sorted(file.name for file in path.iterdir()) == FILES
    tree = json.loads((path / "state.json").read_text())
    assert tree["num_images"] == 24 and tree["torch"] == torch.__version__
    assert checkpoint.read_recipe(path) == recipe()
    assert "encoder.0.weight" in load_file(path / "model.safetensors")
    assert_same(checkpoint.read_tensors(path, "averaged"), load_file(path / "averaged.safetensors"))


def test_only_the_newest_are_kept(digits, tmp_path):
    run, state = RunFolder(tmp_path), fresh(digits, keep=2)
    for expected in (["08"], ["08", "16"], ["16", "24"], ["24", "32"]):
        path = checkpoint.save(run, advance(state, digits, 1))
        assert names(run) == [f"{'0' * 10}{end}" for end in expected]
        assert path == run.saved()[-1]


def test_saving_the_same_images_again_replaces(digits, run):
    state = fresh(digits)
    checkpoint.load(run.saved()[0], state)
    advance(state, digits, 1)
    state.model.encoder[0].weight.data.zero_()
    path = checkpoint.save(run, state)
    assert path == run.saved()[1]
    checkpoint.verify(path)
    assert not checkpoint.read_tensors(path, "model")["encoder.0.weight"].any()


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def assert_falls_back(run: RunFolder) -> str:
    """To the second of three checkpoints, with one complaint, which is returned."""
    damaged, good = run.saved()[-1], run.saved()[-2]
    path, complaints = checkpoint.newest_whole(run)
    assert path == good
    (line,) = complaints
    assert line.startswith(f"checkpoint {damaged} is damaged: ") and "\n" not in line
    assert line.endswith(f"; set aside as {damaged.name}.damaged")
    assert names(run) == ["000000000008", "000000000016", "000000000024.damaged"]
    assert run.saved() == [run.checkpoints / "000000000008", good]
    return line


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("at", ["start", "middle", "end"])
def test_a_flipped_byte_is_found(run, file, at):
    path = run.saved()[-1] / file
    if file == "manifest.json":  # not in white space, which means nothing
        text = path.read_text()
        position = {"start": 0, "middle": text.index('"sha256": "') + 20, "end": text.rindex("}")}[at]
    else:
        position = {"start": 0, "middle": path.stat().st_size // 2, "end": path.stat().st_size - 1}[at]
    flip(path, position)
    line = assert_falls_back(run)
    if file != "manifest.json":
        assert f"{file} does not match its checksum" in line


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_short_is_found(run, file):
    path = run.saved()[-1] / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_falls_back(run)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found(run, file):
    (run.saved()[-1] / file).unlink()
    assert file in assert_falls_back(run)


def test_what_was_set_aside_before_makes_room(digits, run):
    """Also of the same name; what one search finds damaged stays together."""
    for path in run.saved()[1:]:
        cut(path / "model.safetensors")
    assert checkpoint.newest_whole(run)[0] == run.saved()[0]
    assert names(run) == ["000000000008", "000000000016.damaged", "000000000024.damaged"]
    state = fresh(digits)
    checkpoint.load(run.saved()[0], state)
    cut(checkpoint.save(run, advance(state, digits, 1)) / "adam.safetensors")
    assert checkpoint.newest_whole(run)[0] == run.saved()[0]
    assert names(run) == ["000000000008", "000000000016.damaged"]
    with pytest.raises(checkpoint.Damaged, match="adam.safetensors"):
        checkpoint.verify(run.checkpoints / "000000000016.damaged")


def test_a_wrong_length_in_the_manifest_is_found(run):
    path = run.saved()[-1] / "manifest.json"
    tree = json.loads(path.read_text())
    tree["model.safetensors"]["bytes"] += 1
    path.write_text(json.dumps(tree))
    assert_falls_back(run)


def test_a_manifest_without_files_is_damaged(run):
    (run.saved()[-1] / "manifest.json").write_text("{}")
    assert_falls_back(run)


def test_all_damaged_means_none(run):
    for path in run.saved():
        (path / "manifest.json").unlink()
    path, complaints = checkpoint.newest_whole(run)
    assert path is None and len(complaints) == 3
    assert run.saved() == []


def test_damaged_twice_at_the_same_images(digits, run):
    flip(run.saved()[-1] / "model.safetensors", 1000)
    checkpoint.newest_whole(run)
    state = fresh(digits)
    checkpoint.load(run.saved()[-1], state)
    flip(checkpoint.save(run, advance(state, digits, 1)) / "model.safetensors", 1000)
    assert_falls_back(run)


def test_no_checkpoints_yet(tmp_path):
    assert checkpoint.newest_whole(RunFolder(tmp_path / "none")) == (None, [])


def test_resume_says_what_it_found(digits, run, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ali_dist"), "propagate", True)
    flip(run.saved()[-1] / "adam.safetensors", 2000)
    state = fresh(digits)
    with caplog.at_level("INFO", "ali_dist.worker"):
        resume(run, state)
    assert state.num_images == 16
    damaged, continuing = [record.getMessage() for record in caplog.records]
    assert "adam.safetensors does not match its checksum; set aside as 000000000024.damaged" in damaged
    assert continuing == "continuing at 16 images"


def test_a_half_written_checkpoint_is_ignored_and_replaced(digits, run):
    partial = run.checkpoints / ".000000000032.partial"
    shutil.copytree(run.saved()[-1], partial)
    (partial / "rubbish").write_text("x")
    path, complaints = checkpoint.newest_whole(run)
    assert path.name == "000000000024" and complaints == []
    state = fresh(digits)
    checkpoint.load(path, state)
    path = checkpoint.save(run, advance(state, digits, 1))
    assert sorted(file.name for file in path.iterdir()) == FILES
    assert not partial.exists()


def test_a_crash_while_saving_leaves_the_older_ones(digits, run, monkeypatch):
    state = fresh(digits)
    checkpoint.load(run.saved()[-1], state)
    before = run.saved()

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(run, advance(state, digits, 1))
    assert run.saved() == before
    assert checkpoint.newest_whole(run) == (before[-1], [])


def test_a_checkpoint_of_another_recipe_is_refused_with_the_fields(digits, run):
    path = run.saved()[-1]
    state = fresh(digits, lr=1e-3, seed=5)
    before = copies(state.tensors())
    with pytest.raises(UserError) as error:
        checkpoint.load(path, state)
    assert str(error.value) == (f"checkpoint {path} is of another recipe (--seed: 0 -> 5; --lr: 0.0003 -> 0.001)")
    assert_same(before, state.tensors())
    assert state.num_images == 0


def test_another_schedule_is_no_other_recipe(digits, run):
    state = fresh(digits, num_images=77, keep=1)
    checkpoint.load(run.saved()[-1], state)
    assert state.num_images == 24


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["model.safetensors", "adam.safetensors", "state.json"])
@pytest.mark.parametrize("writer", [pickle.dump, torch.save])
def test_a_pickle_is_refused_and_not_run(digits, run, tmp_path, file, writer):
    path, ran = run.saved()[-1], tmp_path / "ran"
    with open(path / file, "wb") as out:
        writer(Payload(ran), out)
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / file).read_bytes()
    manifest[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(path)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path, fresh(digits))
    assert not ran.exists()
    with open(path / file, "rb") as saved:  # the payload does what it should, where one is so careless
        torch.load(saved, weights_only=False) if writer is torch.save else pickle.load(saved)
    assert ran.exists()


def test_nothing_of_a_fresh_state_is_lost(digits, tmp_path):
    """Before the first update the optimizers hold nothing."""
    state = fresh(digits)
    path = checkpoint.save(RunFolder(tmp_path), state)
    other = fresh(digits)
    other.model.encoder[0].weight.data.zero_()
    checkpoint.load(path, other)
    assert_same(state.tensors(), other.tensors())


@pytest.mark.parametrize("save, failures", [(0.3, 1.8e8), (5.0, 1e4), (60.0, 3600.0), (500.0, 400.0)])
def test_the_best_interval_loses_least(save, failures):
    """Against Daly's exact model of the expected time for an hour's work, minimized by trying every interval."""

    def expected(interval: float) -> float:
        return failures * math.expm1((interval + save) / failures) / interval

    best = min((expected(1.001**k), 1.001**k) for k in range(int(1000 * math.log(20 * failures))))
    found = checkpoint.best_interval(save, failures)
    assert expected(found) <= 1.002 * best[0]
    assert found == pytest.approx(best[1], rel=0.25)


def test_an_interval_is_never_longer_than_what_is_left_between_failures():
    assert checkpoint.best_interval(100.0, 10.0) == 10.0
    assert checkpoint.best_interval(0.0, 1e6) == 0.0
