"""Repeats of a semi-supervised run as parallel jobs on a Ray of this machine."""

import dataclasses
import json
import shlex

import pytest

from ali_dist import launch, repeats
from ali_dist.meter import read_ticks
from ali_dist.recipe import Job, UserError
from ali_dist.recipes import SEMI_SUPERVISED
from ali_dist.run import RunFolder

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


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_repeats_on_ray(call, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")  # one of its own, whatever else runs on this machine
    flags = "--labels 20 --repeats 2 --num-images 128 --validate-images 128 --sample-images 1000 --tick-images 64"
    code, out, err = call(flags)
    assert code == 0, err
    folder = tmp_path / "digits-20-labels"
    result = json.loads((folder / "repeats.json").read_text())
    ticks = {name: read_ticks(folder / name / "ticks.jsonl") for name in ("seed-0", "seed-1")}
    assert result["errors"] == {name: lines[-1]["test/error"] for name, lines in ticks.items()}
    assert result["mean"] == pytest.approx(sum(result["errors"].values()) / 2)
    assert f"test error {100 * result['mean']:.2f} +- {100 * result['std']:.2f} %" in out
    labels = [json.loads((folder / name / "labels.json").read_text()) for name in ticks]
    assert labels[0]["images"] != labels[1]["images"] and [label["seed"] for label in labels] == [0, 1]
    assert not (folder / "tune").exists()
