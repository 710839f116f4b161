"""Repeats of a semi-supervised run as parallel jobs on a Ray of this machine."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from ali_dist import checkpoint, launch, repeats
from ali_dist.meter import read_ticks
from ali_dist.recipe import Job, UserError
from ali_dist.recipes import SEMI_SUPERVISED
from ali_dist.run import RunFolder, count_restarts, read_lines

CIFAR10 = SEMI_SUPERVISED["cifar10"]


def test_a_seed_each_in_one_folder():
    recipe = dataclasses.replace(CIFAR10, seed=5)
    runs = repeats.plan(recipe, Job(storage="/runs", repeats=3, data="/data"))
    assert list(runs) == ["seed-5", "seed-6", "seed-7"]
    for seed, (one, job) in zip((5, 6, 7), runs.values(), strict=True):
        assert one == dataclasses.replace(CIFAR10, seed=seed)
        assert (job.storage, job.name, job.repeats) == ("/runs/cifar10-1000-labels", f"seed-{seed}", 1)
        assert job.data == "/data"


def test_mean_and_deviation_beside_the_papers(tmp_path):
    result = repeats.summarize(CIFAR10, {"seed-0": 0.2, "seed-1": 0.22, "seed-2": 0.27})
    assert result["mean"] == pytest.approx(0.23)
    assert result["std"] == pytest.approx((0.0026 / 2) ** 0.5)  # of the sample
    text = repeats.as_text(CIFAR10, result, tmp_path)
    assert "cifar10, 1000-labels: test error 23.00 +- 3.61 %" in text and "of 3 runs" in text
    assert "ALI 19.98 +- 0.89; GAN with feature matching 21.83 +- 2.01" in text
    other = dataclasses.replace(CIFAR10, semi=dataclasses.replace(CIFAR10.semi, labels=500))
    assert "+- here is three standard deviations, ours is one" in text
    assert "published, in %: nothing" in repeats.as_text(other, repeats.summarize(other, {"a": 0.5}), tmp_path)


def test_the_test_error_at_the_end_counts(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match="the run did not finish, it is at 0 of 24 images"):
        repeats.final_error(run, 24)
    lines = [{"num_images": 8, "test/error": 0.5}, {"num_images": 16, "test/error": 0.25}, {"num_images": 24}]
    run.ticks.write_text("".join(json.dumps({"time": 0.0, **line}) + "\n" for line in lines))
    assert repeats.final_error(run, 16) == 0.25
    with pytest.raises(UserError, match="the run did not finish, it is at 24 of 32 images"):
        repeats.final_error(run, 32)


@pytest.fixture
def call(run_command, data, tmp_path):
    """Runs `launch` in this process: exit code, stdout, stderr."""

    def run(flags: str) -> tuple[int, str, str]:
        words = ["launch", "--dataset", "digits", "--data", str(data), "--storage", str(tmp_path), *shlex.split(flags)]
        return run_command(launch.main, words)

    return run


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--repeats 3", "--repeats is for semi-supervised training (--labels), with one worker each"),
        ("--labels 100 --repeats 3 --num-workers 2", "--repeats is for semi-supervised training"),
        ("--labels 100 --repeats 0", "--repeats must be positive, not 0"),
    ],
)
def test_bad_input_is_one_line(call, flags, message):
    code, _, err = call(flags)
    assert code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "flags, resources, failures",
    [
        ("", {"CPU": 1, "GPU": 1}, 3),
        ("--gpu False --cpus-per-worker 3 --max-failures 5", {"CPU": 3}, 5),
        ("--gpu True --cpus-per-worker 2 --max-failures 0", {"CPU": 2, "GPU": 1}, 0),
        ("--cpus-per-worker 9 --wait-seconds 0", None, None),
    ],
)
def test_each_repeat_gets_what_the_flags_say(call, monkeypatch, flags, resources, failures):
    given = []

    def run_trials(function, pieces, folder, parallel, columns, resources, max_failures):
        given.append((resources, max_failures))
        assert len(pieces) == 2
        for piece in pieces.values():
            assert (piece["gpu"], piece["cpus"]) == ("GPU" in resources, resources["CPU"])
        raise UserError("that is enough")

    monkeypatch.setattr(repeats, "connected", nullcontext)
    monkeypatch.setattr(repeats, "run_trials", run_trials)
    node = {"CPU": 8.0, "GPU": 2.0}
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node}])
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: {"node": node})
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    code, _, err = call(f"--labels 20 --repeats 2 {flags}")
    assert code == 2 and err.count("\n") == 1
    assert given == ([(resources, failures)] if resources else [])
    assert ("that is enough" if resources else "9 CPUs (it has 8)") in err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_repeats_on_ray(call, data, tmp_path, monkeypatch):
    """Stopped while the first trains and the second, for lack of cores, waits; then gone on with side by side."""
    monkeypatch.setenv("RAY_ADDRESS", "local")  # one of its own, whatever else runs on this machine
    flags = "--labels 20 --repeats 2 --validate-images 1000000 --sample-images 1000000 --tick-images 64"
    flags += " --save-images 1000000 --num-images"
    folder = tmp_path / "digits-20-labels"
    first, second = RunFolder(folder / "seed-0"), RunFolder(folder / "seed-1")
    words = [sys.executable, "-m", "ali_dist.launch", "--dataset", "digits", "--data", data, "--storage", tmp_path]
    words += [*flags.split(), 10**6, "--cpus-per-worker", os.cpu_count()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(list(map(str, words)), env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not first.ticks.exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "out").read_text()
    finally:
        process.terminate()
        process.wait(60)
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[-2:] == ["stopped", f"runs  {folder}"] and sum(line.startswith("stopping:") for line in lines) == 1
    (saved,) = first.saved()
    checkpoint.verify(saved)
    assert int(saved.name) == read_ticks(first.ticks)[-1]["num_images"] < 10**6
    assert not second.events.exists() and not (folder / "repeats.json").exists()

    code, out, err = call(f"{flags} {int(saved.name) + 64}")
    assert code == 0, err
    assert f"continuing at {int(saved.name):,} images" in first.log.read_text()
    assert count_restarts(read_lines(first.events)) == 0
    result = json.loads((folder / "repeats.json").read_text())
    ticks = {name: read_ticks(folder / name / "ticks.jsonl") for name in ("seed-0", "seed-1")}
    assert result["errors"] == {name: lines[-1]["test/error"] for name, lines in ticks.items()}
    assert result["mean"] == pytest.approx(sum(result["errors"].values()) / 2)
    assert f"test error {100 * result['mean']:.2f} +- {100 * result['std']:.2f} %" in out
    labels = [json.loads((folder / name / "labels.json").read_text()) for name in ticks]
    assert labels[0]["images"] != labels[1]["images"] and [label["seed"] for label in labels] == [0, 1]
    assert not (folder / "tune").exists()
