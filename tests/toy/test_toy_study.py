"""The study as a whole: its plan, an interrupted search, the table, the figure, and what the command refuses."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from matplotlib import pyplot
from safetensors.torch import load_file

from ali_dist.cluster import connected
from ali_dist.recipe import UserError
from ali_dist.toy import __main__ as command
from ali_dist.toy import figure
from ali_dist.toy.judge import samples
from ali_dist.toy.markdown import render
from ali_dist.toy.metrics import sample_metrics
from ali_dist.toy.plan import SEARCH, Job, Plan, first_jobs, second_jobs
from ali_dist.toy.report import best_covering, over_runs, spread, summarize
from ali_dist.toy.train import finished, read_json, read_run, train, without_nan

pytestmark = pytest.mark.xdist_group("ray")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Plan(runs=2, seeds=1, epochs=2, train_points=200, stack=2)


def train_all(jobs, out):
    for job in jobs:
        train(job, out, CPU, lambda line: None)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny study: its folder and its jobs."""
    out = tmp_path_factory.mktemp("study")
    jobs = first_jobs(TINY)
    with mock.patch("ali_dist.toy.judge.POPULATION", 500):
        train_all(jobs, out)
        jobs += second_jobs(TINY, best_covering(out, jobs, "search-gan"))
        train_all(jobs, out)
    return out, jobs


def test_the_plan_is_the_papers():
    jobs = first_jobs(Plan())
    runs = {name: run for job in jobs for name, run in job.runs.items()}
    count = {
        model: sum(name.startswith(model) for name in runs) for model in ("search-ali", "search-gan", "fixed", "vae")
    }
    assert count == {"search-ali": 10, "search-gan": 10, "fixed": 20, "vae": 10}
    assert max(len(job.runs) for job in jobs) == 5
    for name, run in runs.items():
        assert (run.batch_size, run.train_points) == (100, 100_000)
        assert run.epochs == (400 if name.startswith("fixed") else 200)
        if name.startswith("search"):
            assert all(low <= getattr(run, key) <= high for key, (low, high, _) in SEARCH.items())
    fixed = {(run.lr, run.init_std, run.beta1) for name, run in runs.items() if name.startswith("fixed")}
    assert fixed == {(1e-4, 0.02, 0.2), (1e-4, 0.02, 0.8)}
    searched = [(run.lr, run.beta1, run.init_std) for name, run in runs.items() if name.startswith("search-ali")]
    assert len(set(searched)) == 10
    few = first_jobs(Plan(runs=3))[0].runs
    assert [(run.lr, run.beta1, run.init_std) for run in few.values()] == searched[:3]
    assert Job.from_json(json.loads(json.dumps(jobs[0].to_json()))) == jobs[0]


def test_an_interrupted_search_continues_where_it_was(tmp_path):
    job = first_jobs(dataclasses.replace(TINY, runs=1))[0]
    train(job, tmp_path / "whole", CPU, lambda line: None)
    epochs = []

    def killed(line):
        epochs.append(line["epoch"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job, tmp_path / "parts", CPU, killed)
    assert not any(finished(tmp_path / "parts", name) for name in job.runs)
    train(job, tmp_path / "parts", CPU, lambda line: epochs.append(line["epoch"]))
    assert epochs == [1, 2]
    for name in job.runs:
        whole, parts = (load_file(tmp_path / way / "runs" / name / "weights.safetensors") for way in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    with mock.patch("ali_dist.toy.train.Stack", side_effect=AssertionError):
        train(job, tmp_path / "parts", CPU, lambda line: None)  # finished: nothing is trained again


def test_a_runs_folder_is_enough_to_use_it(study):
    out, jobs = study
    name, run = next(iter(jobs[0].runs.items()))
    assert {path.name for path in (out / "runs" / name).iterdir()} == {
        "recipe.json",
        "weights.safetensors",
        "metrics.json",
    }
    read, nets = read_run(out, name)
    assert read == run
    assert (
        sample_metrics(samples(nets)[1])["modes"]
        == read_json(out / "runs" / name / "metrics.json")["samples_10000"]["modes"]
    )
    assert not (out / "stacks" / jobs[0].name).exists()


def test_inference_keeps_the_decoder_it_was_learned_for(study):
    out, jobs = study
    of = jobs[-1].decoder_of
    decoder = {key: t for key, t in read_run(out, of)[1].weights.items() if key.startswith("decoder")}
    for name in ("inverse-00", "posthoc-00"):
        weights = read_run(out, name)[1].weights
        assert all(torch.equal(weights[key], t) for key, t in decoder.items())


def test_the_table(study):
    out, jobs = study
    table = without_nan(
        {"command": "c", "versions": command.versions(), "plan": dataclasses.asdict(TINY), **summarize(out, jobs)}
    )
    json.dumps(table, allow_nan=False)
    modes = table["groups"]["search-ali"]["samples_10000"]["modes"]
    assert modes["count"] == 2 and modes["min"] <= modes["mean"] <= modes["max"]
    assert len(table["conclusions"]) == 5 and all(row["numbers"] for row in table["conclusions"])
    text = render(table)
    for part in ("13.4 ± 5.8 (8-25)", "PacGAN4", "true samples", "VAE", "ALI, torch β1 = 0.8", "borne out", "c"):
        assert part in text
    widths = {line.count("|") for line in text.split("\n") if line.startswith("|")}
    assert widths == {8, 11}


def test_spreads():
    assert spread([1.0, 3.0, None]) == {"count": 2, "mean": 2, "std": 2**0.5, "stderr": 1.0, "min": 1, "max": 3}
    assert spread([None]) == {"count": 0}
    tree = over_runs([{"a": {"b": 1.0}, "c": [2.0], "cost": {"x": "y"}}, {"a": {"b": 2.0}, "c": [4.0], "cost": {}}])
    assert tree["a"]["b"]["mean"] == 1.5 and tree["c"][0]["mean"] == 3 and "cost" not in tree


def test_the_figure_has_five_rows_of_four_columns(study, tmp_path):
    out, jobs = study
    kept = []
    with mock.patch.object(figure, "save", lambda drawn, path: kept.append(drawn)):
        figure.draw_study(out, {model: f"{name}-00" for model, name in NAMES.items()})
    axes = kept[0].axes
    assert len(axes) == 20
    assert [axis.get_title()[:3] for axis in axes[:4]] == ["(a)", "(b)", "(c)", "(d)"]
    assert [axes[i].get_ylabel() for i in range(0, 20, 4)] == list(figure.ROWS)
    assert all(len(axis.collections[0].get_offsets()) == 10_000 for axis in axes)
    coloured = [len(axis.collections[0].get_facecolors()) > 1 for axis in axes]
    assert coloured == [True] * 12 + [False] * 8
    pyplot.close(kept[0])
    figure.draw_samples(out, "search-ali-00")
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


NAMES = {"ali": "search-ali", "inverse": "inverse", "posthoc": "posthoc", "vae": "vae"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--runs", "0"], "--runs must be at least 1"),
        (["--seeds", "-1"], "--seeds must be at least 1"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--stack", "0"], "--stack must be at least 1"),
        (["--parallel", "0"], "--parallel must be at least 1"),
        (["--save-epochs", "0"], "--save-epochs must be at least 1"),
        (["--seed", "-3"], "--seed must not be negative"),
        (["--train-points", "150"], "--train-points 150 is not a multiple"),
        (["--train-points", "200000"], "--train-points must be at most 100000"),
    ],
)
def test_bad_arguments_are_one_line(words, message, capsys):
    with pytest.raises(UserError, match=message):
        command.parse(words)


def test_unknown_flags_and_recipes_exit_with_2(capsys):
    for words in (["--recipe", "besst"], ["--rums", "3"], ["--epochs", "many"]):
        with pytest.raises(SystemExit) as stop:
            command.parse(words)
        assert stop.value.code == 2
    capsys.readouterr()


def test_quick_changes_the_defaults_and_no_more():
    assert command.parse(["--quick"]).plan == command.QUICK
    plan = command.parse(["--quick", "--seeds", "3"]).plan
    assert plan == dataclasses.replace(command.QUICK, seeds=3)


def test_a_folder_of_another_study_is_refused(tmp_path):
    command.claim(tmp_path, TINY)
    command.claim(tmp_path, TINY)
    with pytest.raises(UserError, match=r"seeds: 1 -> 2"):
        command.claim(tmp_path, dataclasses.replace(TINY, seeds=2))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write"):
        command.claim(tmp_path / "file" / "below", TINY)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        command.claim(tmp_path, TINY)


def test_a_ray_out_of_reach_is_one_line():
    with mock.patch("ray.init", side_effect=ConnectionError("Failed to connect")):
        with pytest.raises(UserError, match="Failed to connect: correct .RAY_ADDRESS"), connected():
            pass


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy", "--quick", "--dry-run", "--out", str(tmp_path / "none")])
    command.main()
    assert not (tmp_path / "none").exists()
    assert "search-ali-00" in capsys.readouterr().out


def test_a_report_of_what_is_finished(study, tmp_path, monkeypatch, capsys):
    out, jobs = study
    words = ["--runs", "2", "--seeds", "1", "--epochs", "2", "--train-points", "200", "--stack", "2"]

    def report(*finished):
        for name in finished:
            shutil.copytree(out / "runs" / name, tmp_path / "runs" / name)
        monkeypatch.setattr(sys, "argv", ["toy", *words, "--report", "--out", str(tmp_path)])
        command.main()
        return capsys.readouterr().out

    with pytest.raises(UserError, match="no run"):
        report()
    assert "fixed setting" in report("fixed-0.2-00")
    metrics = tmp_path / "runs" / "fixed-0.2-00" / "metrics.json"
    kept = metrics.read_text()
    metrics.write_text(json.dumps({"cost": json.loads(kept)["cost"]}))  # of a time before any metric
    assert "--report" not in report().split("`")[1]
    assert metrics.read_text() == kept
    text = report("search-ali-00", "search-gan-00", "search-gan-01", "inverse-00")
    assert "## Random search" in text and "## Inference" not in text
    assert "## Inference" in report("posthoc-00", "vae-00")


@pytest.mark.slow
def test_a_killed_command_continues(tmp_path):
    """All of it, through Ray: killed once a stack is finished, then to its end without training that again."""
    words = ["--quick", "--train-points", "1000", "--epochs", "1", "--parallel", "1", "--out", str(tmp_path / "out")]
    line = [sys.executable, "-m", "ali_dist.toy", *words]
    alone = os.environ | {"RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}

    def first_runs():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/metrics.json")}

    with open(tmp_path / "log", "w") as log:
        killed = subprocess.Popen(line, cwd=ROOT, env=alone, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 140
            while len(first_runs()) < 2 and time.monotonic() < deadline:
                assert killed.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        finally:
            killed.kill()
            killed.wait()
    before = first_runs()
    assert len(before) >= 2 and not (tmp_path / "out" / "table.json").exists(), (tmp_path / "log").read_text()
    done = subprocess.run(line, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "## Inference" in done.stdout
    assert {path: mtime for path, mtime in first_runs().items() if path in before} == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"table.json", "table.md", "figure.png", "runs", "study.json"} and "tune" not in names
    assert json.loads((tmp_path / "out" / "table.json").read_text())["plan"]["epochs"] == 1
