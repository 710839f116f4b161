"""What a job's driver does beside its workers: stops, failures, a run that is taken over; no Ray is started here."""

import os
import signal
import subprocess
import threading
import time

import pytest

from ali_dist import launch, lookout
from ali_dist.bench.nodes import wait_until
from ali_dist.lookout import Lookout
from ali_dist.recipe import Job, UserError
from ali_dist.recipes import RECIPES
from ali_dist.run import RunFolder


def test_failures_are_counted_since_the_last_checkpoint(monkeypatch, tmp_path):
    """Also where the storage is away at the last failure."""
    run, away, fits, timers = RunFolder(tmp_path / "digits"), tmp_path / "away", [], []
    run.root.mkdir()
    run.recipe.write_text("{}")

    def fail(*_):
        fits.append(len(run.saved()))
        if len(fits) < 3:
            (run.checkpoints / f"{len(fits):012d}").mkdir(parents=True)
        if len(fits) == 2:
            os.rename(run.root, away)
            timers.append(threading.Timer(0.3, os.rename, (away, run.root)))
            timers[0].start()
        raise RuntimeError("too many failures")

    monkeypatch.setattr(launch, "_fit", fail)
    with pytest.raises(RuntimeError, match="too many"):
        launch.fit(RECIPES["digits"], Job(storage=str(tmp_path)), {"CPU": 1}, Lookout(run))
    assert fits == [0, 1, 2] and not away.exists()


@pytest.fixture
def supervise(monkeypatch, tmp_path):
    """`launch.supervise` of a run whose `fit` is given, without a Ray; rows of workers can be put into `.workers`."""
    run = RunFolder(tmp_path / "run")
    run.claim(RECIPES["digits"], "auto")
    monkeypatch.setattr(launch, "run_folder", lambda *_: run)
    monkeypatch.setattr(launch, "Exporter", lambda _: lambda: None)
    monkeypatch.setattr(launch, "summary", lambda _: "summary")
    monkeypatch.setattr(lookout, "actors_of", lambda _: {"a": {"StartTime": 0}})
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def supervised(fit):
        monkeypatch.setattr(launch, "fit", lambda *_: fit(run))
        launch.supervise(RECIPES["digits"], Job(), {"CPU": 1}, run.take_over())

    yield supervised
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_while_the_storage_is_away_stops_the_job_once_it_is_back(supervise, tmp_path, capsys):
    away = tmp_path / "away"

    def fit(run):
        run.root.rename(away)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)  # some looks of the driver at a folder that is not there
        away.rename(run.root)
        wait_until(run.stop.exists, 10)

    supervise(fit)
    assert "stopped\nsummary" in capsys.readouterr().out


def test_a_job_without_workers_is_stopped_all_the_same(supervise, monkeypatch, capsys):
    monkeypatch.setattr(lookout, "SECONDS_ALONE", 1)
    monkeypatch.setattr(lookout, "SECONDS_BETWEEN_LOOKS", 0)
    left = {"a": {"StartTime": 0}}
    monkeypatch.setattr(lookout, "actors_of", lambda _: left)
    ended = threading.Event()

    def fit(run):
        run.stop.touch()
        time.sleep(3)
        assert not ended.is_set()  # there is a worker, which will heed it
        left.clear()
        assert ended.wait(30)

    supervise(fit)
    ended.set()
    assert "no workers to stop" in (out := capsys.readouterr().out) and "stopped\nsummary" in out


def test_a_job_whose_run_another_one_takes_over_ends_and_leaves_the_run_alone(supervise, capsys):
    ended, folder = threading.Event(), []

    def fit(run):
        folder.append(run)
        run.take_over()
        assert ended.wait(30)

    with pytest.raises(UserError, match="another job goes on with"):
        supervise(fit)
    ended.set()
    assert not folder[0].failed.exists() and not folder[0].stop.exists()


def test_a_group_that_does_not_begin_is_ended_and_another_tried(monkeypatch, tmp_path):
    """The controller is a real process; a group that has begun is left alone however long it takes."""
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    workers, controllers = {"a": {"StartTime": 0}}, [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    rows = {"RayTrainWorker": workers, "TrainController": {"c": {"Pid": controllers[0].pid}}}
    monkeypatch.setattr(lookout, "actors_of", rows.get)
    monkeypatch.setattr(lookout, "free_room", lambda: None)
    monkeypatch.setattr(lookout, "SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr(lookout, "SECONDS_TO_START", 0.5)
    look = Lookout(run)
    try:
        look()
        time.sleep(0.3)
        look()
        assert controllers[0].poll() is None
        time.sleep(0.3)
        look()
        assert controllers[0].wait(5) == -signal.SIGKILL and look.ended == 1
        workers.clear()
        rows["TrainController"] = {"d": {"Pid": controllers[1].pid}}
        workers["b"] = {"StartTime": 1000 * time.time()}
        look()
        run.record("start", 0)
        time.sleep(0.7)
        look()
        workers.clear()  # a group that has begun before it was seen
        workers["c"] = {"StartTime": 1000 * (time.time() - 1)}
        look()
        time.sleep(0.7)
        look()
        assert controllers[1].poll() is None and look.ended == 1
    finally:
        for controller in controllers:
            controller.kill()
            controller.wait()


def test_groups_that_were_ended_for_not_beginning_count_as_failures(monkeypatch, tmp_path):
    run, fits = RunFolder(tmp_path / "run"), []
    monkeypatch.setattr(launch, "run_folder", lambda *_: run)
    run.checkpoints.mkdir(parents=True)
    run.recipe.write_text("{}")
    look = Lookout(run)

    def fail(*_):
        fits.append(look.ended)
        look.ended += 1
        raise RuntimeError("the controller died")

    monkeypatch.setattr(launch, "_fit", fail)
    with pytest.raises(RuntimeError, match="the controller died"):
        launch.fit(RECIPES["digits"], Job(storage=str(tmp_path), max_failures=2), {"CPU": 1}, look)
    assert fits == [0, 1, 2]
