"""Seconds to the first update: the marks of a real start, and what is made of them."""

import dataclasses
import json

import pytest
import ray.train
from support import recipe

from ali_dist import fast, launch, worker
from ali_dist.bench import __main__ as command
from ali_dist.bench import start, start_job
from ali_dist.recipe import Job
from ali_dist.settings import run_folder


def test_a_start_notes_each_part_once_and_in_order(data, tmp_path, monkeypatch):
    calls = [(kind, "__call__") for kind in (fast.PlainUpdates, fast.StaticUpdates)]
    for owner, name in ((worker, "checked_index"), (worker, "TrainState"), (worker, "open_stream"), *calls):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # given back afterwards
    marks = tmp_path / "marks.jsonl"
    short = recipe(num_images=24, validate_count=1, tick_images=8)
    job = Job(data=str(data), storage=str(tmp_path))
    config = {"recipe": short.to_json(), "job": dataclasses.asdict(job), "gpu": False, "cpus": 1}
    run_folder(short, job).claim(short, "auto")  # as the driver does
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    start_job.our_worker(str(marks), config)
    found = [json.loads(line) for line in marks.read_text().splitlines()]
    assert [mark["name"] for mark in found] == [
        "workers run",
        "worker's imports",
        "data opened",
        "networks built",
        "run and stream opened",
        "first figures, first batch",
        "first update",
    ]
    times = [mark["time"] for mark in found]
    assert times == sorted(times)


def test_the_driver_is_launch_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["start_job", "ours", str(tmp_path / "marks.jsonl"), "--dataset", "digits"])
    for name in ("checked_index", "start_ray", "train_worker", "main"):
        monkeypatch.setattr(launch, name, getattr(launch, name))
    called = []
    monkeypatch.setattr(launch, "main", lambda: called.append((launch.train_worker, launch.start_ray)))
    start_job.main()
    ((train_worker, start_ray),) = called
    assert train_worker.func is start_job.our_worker and start_ray.__wrapped__.__name__ == "start_ray"
    names = [json.loads(line)["name"] for line in (tmp_path / "marks.jsonl").read_text().splitlines()]
    assert names == ["driver started", "driver's imports"]


def test_parts_are_what_lies_between_the_marks(tmp_path, monkeypatch):
    def submitted(words, **_):
        path = tmp_path / "marks.jsonl"
        assert words[:3] == ["ray", "job", "submit"] and str(path) in words
        marks = [{"name": name, "time": 100 + time} for name, time in (("driver started", 2), ("ray.init", 5))]
        path.write_text("".join(json.dumps(mark) + "\n" for mark in marks))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(start.subprocess, "run", submitted)
    monkeypatch.setattr(start.time, "time", lambda: 100.0)
    assert start.job("empty", start.Flags(), tmp_path) == {"driver started": 2.0, "ray.init": 3.0}


def test_the_table_sets_ours_beside_the_empty_job():
    result = {
        "ours": {"parts": {"driver started": 3.0, "workers run": 4.0, "first update": 0.5}, "seconds": [7.5, 8.0, 7.0]},
        "empty": {"parts": {"driver started": 3.0, "workers run": 3.5}, "seconds": [6.5]},
    }
    lines = start.lines(result)
    assert lines[2].split() == ["workers", "run", "4.00", "3.50", "0.50"]
    assert lines[3].split() == ["first", "update", "0.50", "0.50"]
    assert lines[4].split() == ["all,", "seconds", "7.50", "6.50", "1.00"]


@pytest.mark.parametrize(
    "flags, message",
    [([], "launch/local.sh python -m ali_dist.bench start"), (["--rounds", "0"], "must be positive")],
)
def test_bad_flags(run_command, monkeypatch, flags, message):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    code, _, err = run_command(command.main, ["bench", "start", *flags])
    assert code == 2 and err.count("\n") == 1 and message in err
