"""Features of a whole data set: exact, in stored order, resumable, the same for any number of workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import recipe

import ali_dist
from ali_dist import checkpoint, encode, encoding
from ali_dist.data.index import load_index
from ali_dist.data.pack import new_folder, pack
from ali_dist.data.stream import validation
from ali_dist.data.table import DATASETS
from ali_dist.data.types import OpenSource
from ali_dist.run import RunFolder
from ali_dist.state import TrainState, derived_seed

TRAIN, VALID = 4300, 100  # three shards and one


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The digits again and again: data set `digits` of several shards."""
    spec, folder = DATASETS["digits"], tmp_path_factory.mktemp("many")
    opened = spec.open(None, spec.counts)
    samples = [opened.splits["train"][i] for i in range(spec.counts["train"])]
    repeated = [samples[i % len(samples)] for i in range(TRAIN)]
    spec = replace(spec, counts={"train": TRAIN, "valid": VALID})
    with new_folder(folder, spec.name) as partial:
        pack(spec, OpenSource(opened.classes, {"train": repeated, "valid": samples[:VALID]}), None, partial)
    return folder


def trained(folder, index, noise=0, **changes):
    """A run of random networks, the real ones unless told otherwise."""
    run = RunFolder(folder)
    state = TrainState(recipe(**{"networks": "digits", **changes}), index.mean_image, torch.device("cpu"))
    generator = torch.Generator().manual_seed(noise)
    with torch.no_grad():
        for parameter in state.averaged.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    run.claim(state.recipe, "auto")
    checkpoint.save(run, state)
    return run.root


@pytest.fixture(scope="module")
def run(tmp_path_factory, many):
    return trained(tmp_path_factory.mktemp("runs") / "run", load_index(many, "digits"))


@pytest.fixture
def command(run_command, monkeypatch):
    """The command in this process, without a Ray: what it would have its actors do is done here."""

    def here(make, items, workers):
        function = make()
        return (function(item) for item in items)

    monkeypatch.setattr(encode, "connected", nullcontext)
    monkeypatch.setattr(encode, "map_actors", here)
    return lambda *words: run_command(encode.main, ["encode", *map(str, words)])


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.parquet")}


@pytest.fixture(scope="module")
def expected(run, many):
    """By `Model` itself: x, y and each feature of the training images."""
    model, index = ali_dist.load(run), load_index(many, "digits")
    (batch,) = validation(index, "train", count=TRAIN, batch_size=TRAIN)
    mu, log_sigma = model.posterior(batch.x)
    assert torch.equal(mu, model.encode(batch.x))
    blocks = [
        torch.randn(
            min(256, TRAIN - i), 64, generator=torch.Generator().manual_seed(derived_seed(3, "encode", "train", i))
        )
        for i in range(0, TRAIN, 256)
    ]
    layers = model.features(batch.x[:300], "script")
    return {
        "y": batch.y,
        "mu": mu,
        "log_sigma": log_sigma,
        "z": mu + log_sigma.exp() * torch.cat(blocks),
        "layers": layers,
    }


def test_every_image_in_stored_order_with_exactly_the_models_values(command, run, many, expected, tmp_path):
    flags = ["--source", many / "digits", "--features", "mu,log_sigma,z,layers", "--seed", 3]
    code, out, err = command(run.name, "--storage", run.parent, "--out", tmp_path, *flags)
    assert (code, err) == (0, "") and f"encoded {TRAIN + VALID:,} images" in out
    assert sorted(files(tmp_path)) == [
        "train/000000000-000002048.parquet",
        "train/000002048-000004096.parquet",
        "train/000004096-000004300.parquet",
        "valid/000000000-000000100.parquet",
    ]
    table = pq.read_table(tmp_path / "train")
    assert table.column_names == ["index", "label", "mu", "log_sigma", "z", "layers"]
    assert table["index"].to_pylist() == list(range(TRAIN))
    assert table["label"].to_pylist() == expected["y"].tolist()
    for name in ("mu", "log_sigma", "z"):
        column = table[name].combine_chunks()
        assert np.array_equal(column.flatten().to_numpy().reshape(TRAIN, -1), expected[name].numpy()), name
    layers = table["layers"].combine_chunks().flatten().to_numpy().reshape(TRAIN, -1)
    assert np.array_equal(layers[:256], expected["layers"][:256].numpy())
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    assert manifest["complete"] and sum(row["rows"] for row in manifest["files"].values()) == TRAIN + VALID
    assert manifest["encoding"]["features"] == ["mu", "log_sigma", "z", "layers"]


def test_what_is_whole_is_kept_and_the_rest_made_again(command, run, many, tmp_path):
    flags = [run, "--data", many, "--out", tmp_path]
    assert command(*flags)[0] == 0
    whole, names = files(tmp_path), sorted(files(tmp_path))
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    damaged = bytearray(whole[names[0]])
    damaged[1000] ^= 1
    (tmp_path / names[0]).write_bytes(damaged)
    (tmp_path / names[1]).write_bytes(whole[names[1]][:-1])
    (tmp_path / names[3]).unlink()
    (tmp_path / "train" / f".{Path(names[0]).name}.half-written").write_bytes(b"PAR1")
    code, out, _ = command(*flags)
    assert code == 0 and out.count("is missing or damaged: it is made again") == 3
    assert "204 of 4,400 images are encoded already" in out
    assert files(tmp_path) == whole
    assert not list(tmp_path.rglob("*half-written"))
    kept = [name for name in names if (tmp_path / name).stat().st_mtime_ns == times[name]]
    assert kept == [names[2]]
    assert "4,400 of 4,400 images are encoded already" in command(*flags)[1]


def test_another_encoding_under_the_same_folder_is_refused(command, run, many, tmp_path):
    flags = ["--data", many, "--splits", "valid", "--out", tmp_path / "out"]
    assert command(run, *flags)[0] == 0
    before = files(tmp_path / "out")
    other = trained(tmp_path / "other", load_index(many, "digits"), noise=1)
    for words, message in (
        ([run, *flags, "--features", "mu"], "features: ['mu', 'log_sigma'] -> ['mu']"),
        ([run, *flags, "--weights", "raw"], "weights: averaged -> raw"),
        ([other, *flags], "model_sha256: "),
        ([run, *flags, "--splits", "train"], "images: {'valid': 100} -> {'train': 4300}"),
    ):
        code, _, err = command(*words)
        assert code == 2 and err.count("\n") == 1 and message in err and "choose another --out" in err, err
    assert files(tmp_path / "out") == before
    (tmp_path / "out" / "_manifest.json").write_text("[" * 10**5)
    code, _, err = command(run, *flags)
    assert code == 2 and "_manifest.json is damaged" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--features", "nu"], "unknown feature 'nu': did you mean 'mu'?"),
        (["--splits", "test"], "unknown split 'test'"),
        (["--source", "x", "--data", "y"], "--source and --data exclude each other"),
        (["--source", "/nowhere/digits"], "no data set 'digits' in /nowhere"),
        (["--num-workers", "-1"], "must not be negative"),
    ],
)
def test_bad_flags_are_one_line(command, run, many, tmp_path, monkeypatch, words, message):
    monkeypatch.setenv("ALI_DIST_DATA", str(many))
    code, _, err = command(run, "--out", tmp_path / "out", *words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_a_conditional_model_is_given_the_labels(command, digits, data, tmp_path):
    run = trained(tmp_path / "run", digits, networks="small-conditional")
    out = tmp_path / "out"
    assert command(run, "--data", data, "--splits", "valid", "--out", out)[0] == 0
    (batch,) = validation(digits, "valid", count=1000, batch_size=1000)
    mu = pq.read_table(out / "valid")["mu"].combine_chunks().flatten().to_numpy().reshape(len(batch.y), -1)
    assert np.array_equal(mu, ali_dist.load(run).encode(batch.x, batch.y).numpy())
    code, _, err = command(run, "--data", data, "--out", tmp_path / "layers", "--features", "layers")
    assert code == 2 and "--features layers need an encoder that is not given the label" in err


def test_a_folder_that_only_other_nodes_see_is_an_error(command, run, many, tmp_path, monkeypatch):
    row = {"rows": 2048, "bytes": 1, "sha256": "0"}
    monkeypatch.setattr(encode, "map_actors", lambda _, items, workers: [{"name": "train/elsewhere.parquet", **row}])
    code, _, err = command(run, "--data", many, "--out", tmp_path)
    assert code == 2 and "give --out a folder that all nodes see" in err
    assert not (tmp_path / "_manifest.json").exists()


def test_one_process_at_a_time(command, run, many, tmp_path):
    with encoding.alone(tmp_path):
        code, _, err = command(run, "--data", many, "--out", tmp_path)
    assert code == 2 and f"another process encodes to {tmp_path}" in err


def test_a_damaged_shard_is_named(command, run, many, tmp_path):
    shutil.copytree(many, tmp_path / "data")
    shard = tmp_path / "data" / "digits" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-5000])
    code, _, err = command(run, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert code == 2 and "train-000001.tar has" in err and err.count("\n") == 1
    assert not json.loads((tmp_path / "out" / "_manifest.json").read_text())["complete"]
    assert len(files(tmp_path / "out")) == 1


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_killed_on_ray_and_gone_on_with_by_another_number_of_workers(command, run, many, tmp_path):
    assert command(run, "--data", many, "--out", tmp_path / "here")[0] == 0
    undisturbed, out = files(tmp_path / "here"), tmp_path / "out"
    words = [sys.executable, "-m", "ali_dist.encode", run, "--data", many, "--out", out, "--num-workers"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": "local", "PYTHONPATH": str(Path(encode.__file__).parents[1])}
    process = subprocess.Popen([*map(str, words), "1"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "_manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    manifest = json.loads((out / "_manifest.json").read_text())
    assert not manifest["complete"] and manifest["files"]
    done = subprocess.run([*map(str, words), "2"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "images are encoded already, and their files' checksums are right" in done.stdout
    assert files(out) == undisturbed
