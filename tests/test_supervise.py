"""What a job's driver does beside its workers: stops, failures, a run that is taken over; no Ray is started here."""

import os
import signal
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
    """`launch.supervise` of a run whose `fit(run, ended)` is given, without a Ray; `ended` is set to end the job."""
    run = RunFolder(tmp_path / "run")
    run.claim(RECIPES["digits"], "auto")
    monkeypatch.setattr(launch, "run_folder", lambda *_: run)
    monkeypatch.setattr(launch, "Exporter", lambda _: lambda: None)
    monkeypatch.setattr(launch, "summary", lambda _: "summary")
    monkeypatch.setattr(lookout, "actors_of", lambda _: {"a": {"StartTime": 0}})
    ended = threading.Event()
    monkeypatch.setattr(lookout, "kill_workers", ended.set)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def supervised(fit):
        monkeypatch.setattr(launch, "fit", lambda *_: fit(run, ended))
        launch.supervise(RECIPES["digits"], Job(), {"CPU": 1}, run.take_over())

    yield supervised
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_while_the_storage_is_away_stops_the_job_once_it_is_back(supervise, tmp_path, capsys):
    away = tmp_path / "away"

    def fit(run, _):
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

    def fit(run, ended):
        run.stop.touch()
        time.sleep(3)
        assert not ended.is_set()  # there is a worker, which will heed it
        left.clear()
        assert ended.wait(30)

    supervise(fit)
    assert "were no workers to stop" in (out := capsys.readouterr().out) and "stopped\nsummary" in out


def test_a_job_whose_run_another_one_takes_over_ends_and_leaves_the_run_alone(supervise, capsys):
    folder = []

    def fit(run, ended):
        folder.append(run)
        run.take_over()
        assert ended.wait(30)

    with pytest.raises(UserError, match="another job goes on with"):
        supervise(fit)
    assert not folder[0].failed.exists() and not folder[0].stop.exists()


def test_a_group_that_does_not_begin_is_ended_and_one_that_has_begun_left_alone(monkeypatch, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    workers, kills = {"a": {"StartTime": 0}}, []
    monkeypatch.setattr(lookout, "actors_of", {"RayTrainWorker": workers}.get)
    monkeypatch.setattr(lookout, "kill_workers", lambda: kills.append(set(workers)))
    monkeypatch.setattr(lookout, "SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr(lookout, "SECONDS_TO_START", 0.5)
    look = Lookout(run)
    look()
    time.sleep(0.3)
    look()
    assert not kills
    time.sleep(0.3)
    look()
    assert kills == [{"a"}] and look.ended == 1

    workers.clear()
    workers["b"] = {"StartTime": 1000 * time.time()}
    look()
    run.record("start", 0)
    time.sleep(0.7)
    look()
    workers.clear()  # has begun before it was seen
    workers["c"] = {"StartTime": 1000 * (time.time() - 1)}
    look()
    time.sleep(0.7)
    look()
    assert kills == [{"a"}] and look.ended == 1


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
