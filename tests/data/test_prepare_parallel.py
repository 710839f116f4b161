"""Preparing in several processes, killed at any moment, comes out the same to the byte."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from archives import (
    bad_files,
    celeba_files,
    encoded,
    odd_files,
    picture,
    svhn_arrays,
    write_celeba,
    write_folder,
    write_zip,
)
from test_imagenet64 import archives, class_folders
from test_svhn import COUNTS as SVHN_COUNTS
from test_svhn import write_svhn

from ali_dist import cli, prepare
from ali_dist.data.index import load_index
from ali_dist.data.processes import map_processes
from ali_dist.data.shards import verify
from ali_dist.data.stream import validation
from ali_dist.data.table import DATASETS
from ali_dist.recipe import UserError

pytestmark = pytest.mark.xdist_group("ray")

IMAGES = 4400  # three shards of training, one of validation


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A zip of small images in three classes, odd and unreadable ones among them."""
    small = [encoded(picture(i, 40, 36), "PNG") for i in range(100)]
    files = {f"{'abc'[i % 3]}/{i:05d}.png": small[i % 100] for i in range(IMAGES)}
    for i in range(5):
        files |= {f"a/odd-{i}-{name}": data for name, (data, _) in odd_files(40, 36).items()}
    files |= {f"b/bad-{name}": data for name, data in bad_files().items()}
    return write_zip(tmp_path_factory.mktemp("source") / "images.zip", files)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """What one process makes of it, without interruption."""
    data = tmp_path_factory.mktemp("undisturbed")
    assert run(source, data, "--workers", 1)[0] == 0
    return data / "folder"


def words(source, data, *more):
    fixed = ["--dataset", "folder", "--source", source, "--size", 32, "--data", data, "--on-bad-image", "skip"]
    return [*map(str, fixed), *map(str, more)]


def run(source, data, *more):
    """The command in this process: exit code, and what it printed to stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["prepare", *words(source, data, *more)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.run(prepare.main)
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), err.getvalue()


def assert_same_files(folder, other):
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_three_processes_write_the_same_bytes_and_report_everything(source, undisturbed, tmp_path):
    code, out, err = run(source, tmp_path, "--workers", 3, "--verify")
    assert (code, err) == (0, "")
    assert_same_files(tmp_path / "folder", undisturbed)
    index = load_index(tmp_path, "folder")
    images = IMAGES + 5 * len(odd_files())
    assert sum(index.images(split) for split in index.splits) == images and f"packed {images:,} images" in out
    both = [index.notes[split] for split in ("train", "valid")]
    kinds = [kind for _, kinds in odd_files().values() for kind in kinds] * 5
    for kind in set(kinds):
        count = sum(notes.odd[kind][0] for notes in both if kind in notes.odd)
        assert count == kinds.count(kind) and f"{kind} images converted (a/odd-" in out
    left_out = dict(row for notes in both for row in notes.bad)
    assert left_out.keys() == {f"b/bad-{name}" for name in bad_files()}
    assert "images LEFT OUT, all named in" in out and "b/bad-empty.jpg is empty" in out
    assert "train, images of each class: a " in out and "verified: every byte" in out
    assert "train with: python -m ali_dist.launch --dataset folder --networks svhn" in out
    labels = np.concatenate([b.y.numpy() for b in validation(index, "train", count=10**6, batch_size=500)])
    assert tuple(np.bincount(labels)) == index.notes["train"].label_counts


@pytest.mark.parametrize(
    "finished", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_and_run_again(source, undisturbed, tmp_path, finished):
    """Killed with SIGKILL once so many shards are finished; its workers end by themselves."""
    command = [sys.executable, "-m", "ali_dist.prepare", *words(source, tmp_path, "--workers", 2)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    rows = tmp_path / ".folder.partial" / "rows"
    try:
        wait_for(lambda: rows.exists() and len(list(rows.glob("*.json"))) >= finished)
        children = workers_of(process.pid)
    finally:
        process.kill()
        process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert not (tmp_path / "folder").exists()
    kept = len(list(rows.glob("*.json")))
    code, out, err = run(source, tmp_path, "--workers", 2)
    assert code == 0, err
    assert (f"going on with {kept} shards" in out) == bool(kept)
    assert_same_files(tmp_path / "folder", undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def workers_of(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ends
            found += map(int, (task / "children").read_text().split())
    return found


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_an_unreadable_image_is_an_error_unless_asked_for(source, undisturbed, tmp_path):
    code, out, err = run(source, tmp_path, "--workers", 2, "--on-bad-image", "error")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"error: {source}: b/bad-" in err and "--on-bad-image skip" in err
    assert run(source, tmp_path, "--workers", 1)[0] == 0  # goes on from there
    assert_same_files(tmp_path / "folder", undisturbed)


def test_a_changed_source_is_read_anew(tmp_path):
    folder = write_folder(tmp_path / "source", {f"a/{i}.png": encoded(picture(i), "PNG") for i in range(20)})
    (folder / "a" / "3.png").write_bytes(b"")
    assert run(folder, tmp_path, "--workers", 1, "--on-bad-image", "error")[0] == 2
    (folder / "a" / "3.png").write_bytes(encoded(picture(77), "PNG"))
    assert run(folder, tmp_path, "--workers", 1)[0] == 0
    index = load_index(tmp_path, "folder")
    verify(index)
    assert index.images("train") == 18 and not index.notes["train"].bad


def test_celeba_from_its_archive(tmp_path, monkeypatch):
    files, attributes, splits = celeba_files()
    source = write_celeba(tmp_path / "source", files)
    out = prepared("celeba", source, tmp_path, monkeypatch, train=6, valid=3, test=3)
    assert "train, images of each attribute: Attribute_0 " in out
    index = load_index(tmp_path, "celeba")
    assert index.attributes[0] == "Attribute_0" and index.classes == ()
    (batch,) = validation(index, "valid", count=10, batch_size=10)
    assert (batch.y.numpy() == attributes[[i for i in range(12) if splits[i] == 1]]).all()
    sums = attributes[[i for i in range(12) if splits[i] == 0]].sum(0)
    assert index.notes["train"].label_counts == tuple(sums.tolist())


def test_svhn_from_its_files(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    prepared("svhn", write_svhn(tmp_path / "source"), tmp_path, monkeypatch, **SVHN_COUNTS)
    index = load_index(tmp_path, "svhn")
    x, y = svhn_arrays(9, 1)  # train_32x32.mat
    (batch,) = validation(index, "valid", count=10, batch_size=10)
    assert (batch.y.numpy() == y.ravel() % 10).all() and (batch.x.numpy() == x.transpose(3, 2, 0, 1)).all()


def test_imagenet64_from_its_archives(tmp_path, monkeypatch):
    out = prepared("imagenet64", archives(tmp_path / "source"), tmp_path, monkeypatch, workers=2, train=12, valid=6)
    assert "train, images of each class: words of n01440764 4, words of n01443537 4, words of n02119789 4" in out
    first = {path.name: path.read_bytes() for path in (tmp_path / "imagenet64").glob("*.tar")}
    other = tmp_path / "folders"
    prepared("imagenet64", class_folders(tmp_path / "unpacked"), other, monkeypatch, train=12, valid=6)
    assert first == {path.name: path.read_bytes() for path in (other / "imagenet64").glob("*.tar")}


def prepared(name, source, data, monkeypatch, workers=1, **counts):
    """What the command prints when it prepares a small archive of the data set."""
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], counts=counts))
    code, out, err = run(source, data, "--dataset", name, "--size", 0, "--workers", workers, "--verify")
    assert (code, err) == (0, "") and "verified: every byte" in out
    return out


def test_errors_in_other_processes():
    with pytest.raises(json.JSONDecodeError):
        list(map_processes(json.loads, ["{"], 1))
    with pytest.raises(UserError, match="a worker process was killed, .*fewer --workers.*goes on"):
        list(map_processes(os._exit, [1], 1))
    assert list(map_processes(abs, [], 4)) == []


RAY = """
import sys
import ray
from ali_dist import cli, prepare
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
cli.run(prepare.main)
"""


@pytest.mark.slow
def test_ray_tasks_write_the_same_bytes(source, undisturbed, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(Path(prepare.__file__).parents[1])
    environment["RAY_ADDRESS"] = "local"  # not that of a Ray that somebody else runs on this machine

    def run_on_ray(*more):
        command = [sys.executable, "-c", RAY, *words(source, tmp_path, "--ray", "--workers", 2, *more)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)

    done = run_on_ray("--on-bad-image", "error")
    assert done.returncode == 2 and f"error: {source}: b/bad-" in done.stderr and "Traceback" not in done.stderr
    done = run_on_ray()
    assert done.returncode == 0, done.stderr
    assert_same_files(tmp_path / "folder", undisturbed)
