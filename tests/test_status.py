"""The status command on run folders in every state: real ones of short runs, and folders as crashes leave them."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from support import recipe

from ali_dist import cli, prometheus, worker
from ali_dist.recipe import Job, UserError
from ali_dist.run import RunFolder, count_restarts, find_run, read_lines
from ali_dist.status import main, patience, status

NOW = 1_000_000.0


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> RunFolder:
    """A finished run of 48 images, saved each 16; only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    small = recipe(num_images=48, tick_images=16, save_images=16, sample_images=10**6, validate_images=10**6)
    job = Job(name="mine", data=str(data), storage=str(folder))
    worker.train_rank(small, job, gpu=False)
    return RunFolder(folder / "mine")


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "mine")
    run.claim(recipe(num_images=1000), "auto")
    os.utime(run.recipe, (NOW - 10_000, NOW - 10_000))
    return run


def write(path, *lines: dict) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def event(name, num_images, ago, **details):
    return {"event": name, "num_images": num_images, "time": NOW - ago, **details}


def tick(num_images, ago, **scalars):
    speed = {"speed/images_per_s": 10.0, "speed/data_wait_share": 0.25, "loss/d": 1.5, "loss/g": 2.5}
    return {"num_images": num_images, "time": NOW - ago, **speed, **scalars}


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["status", *words])
        with pytest.raises(SystemExit) as exit:
            cli.run(main)
        return exit.value.code, *capsys.readouterr()

    return call


def test_a_run_that_trained_to_its_end(trained, call):
    code, out, err = call(str(trained.root), "--json")
    tree = json.loads(out)
    assert (code, tree["state"], tree["why"], err) == (0, "finished", None, "")
    assert (tree["num_images"], tree["total_images"], tree["eta_seconds"]) == (48, 48, None)
    assert (tree["workers"], tree["starts"], tree["restarts"]) == (1, 1, 0)
    last = [line for line in read_lines(trained.ticks) if "loss/d" in line][-1]
    assert tree["losses"] == {"loss/d": last["loss/d"], "loss/g": last["loss/g"]}
    assert tree["images_per_s"] == last["speed/images_per_s"] > 0
    saved = tree["checkpoint"]
    assert (saved["num_images"], saved["whole"], saved["problem"]) == (48, True, None)
    assert saved["path"] == str(trained.saved()[-1]) and saved["save_seconds"] > 0
    assert 0 <= saved["age_seconds"] < 300 and 0 <= tree["seconds_since_sign_of_life"] < 300
    events = [(line["event"], line["num_images"]) for line in read_lines(trained.events)]
    assert events == [("start", 0), ("save", 16), ("save", 32), ("save", 48), ("end", 48)]


def test_text_says_the_same(trained, call):
    code, out, err = call("mine", "--storage", str(trained.root.parent))
    assert code == 0 and "finished" in out and "48 / 48 images  100.0 %" in out
    assert f"{trained.saved()[-1]}, " in out and out.rstrip().endswith("whole")
    assert "restarts    0 (started 1 times)" in out and "loss/d" in out and "with 1 workers" in out


def test_a_damaged_checkpoint_is_told(trained, tmp_path, call):
    shutil.copytree(trained.root, tmp_path / "copy")
    newest = RunFolder(tmp_path / "copy").saved()[-1]
    (newest / "adam.safetensors").write_bytes(b"short")
    code, out, err = call(str(tmp_path / "copy"))
    assert code == 0 and "NOT WHOLE" in out and "adam.safetensors has 5 bytes" in out
    assert newest.exists()  # looking changes nothing


def test_a_running_run_has_an_eta_at_its_real_pace(run):
    write(run.events, event("start", 0, 100, workers=2), event("save", 400, 20, seconds=7.5))
    write(run.ticks, tick(200, 60), tick(400, 20))  # 200 images in 40 s, though 10 a second between the pauses
    tree = status(run, NOW)
    assert (tree["state"], tree["why"], tree["num_images"], tree["workers"]) == ("running", None, 400, 2)
    assert tree["eta_seconds"] == pytest.approx(600 / 5)
    assert (tree["seconds_since_sign_of_life"], tree["checkpoint"]) == (20, None)
    run.stop.touch()
    assert status(run, NOW)["state"] == "running" and "stopping" in status(run, NOW)["why"]


def test_one_tick_is_enough_for_an_eta_and_none_gives_none(run):
    write(run.events, event("start", 0, 5, workers=1))
    assert status(run, NOW)["eta_seconds"] is None
    write(run.ticks, tick(200, 1), {"num_images": 200, "time": NOW - 1, "valid/loss/d": 1.0})
    assert status(run, NOW)["eta_seconds"] == pytest.approx(80)


def test_ticks_before_the_last_start_say_nothing_of_its_pace(run):
    write(run.events, event("start", 0, 5000), event("start", 200, 50))
    write(run.ticks, tick(100, 4900), tick(200, 4000), tick(300, 20))
    assert status(run, NOW)["eta_seconds"] == pytest.approx(70)


def test_a_silent_run_is_stale(run, call):
    write(run.events, event("start", 0, 5000))
    write(run.ticks, tick(200, 4900), tick(400, 4800))
    tree = status(run, NOW)
    assert tree["state"] == "stale" and "1h20m" in tree["why"] and tree["eta_seconds"] is None
    code, out, err = call(str(run.root))
    assert code == 1 and "stale" in out


def test_patience_grows_with_the_ticks_own_distance(run):
    lines = [event("start", 0, 5000), tick(1, 4000), tick(2, 2800)]
    assert patience(lines) == 5 * 1200
    assert patience(lines[:1]) == patience([]) == 1800
    assert patience([tick(1, 3), tick(2, 2)]) == 300
    write(run.events, lines[0])
    write(run.ticks, *lines[1:])
    assert status(run, NOW)["state"] == "running"
    assert status(run, NOW + 5 * 1200)["state"] == "stale"


def test_a_run_just_claimed_is_running_and_later_stale(run):
    os.utime(run.recipe, (NOW - 60, NOW - 60))
    tree = status(run, NOW)
    assert (tree["state"], tree["num_images"], tree["losses"], tree["workers"]) == ("running", 0, {}, None)
    assert status(run, NOW + 4000)["state"] == "stale"


def test_stopped_failed_and_finished(run, call):
    write(run.events, event("start", 0, 90), event("save", 300, 80, seconds=1), event("end", 300, 80))
    run.stop.touch()
    assert status(run, NOW + 10**6)["state"] == "stopped"
    write(run.events, event("start", 300, 60), event("end", 1000, 50))
    assert (status(run, NOW)["state"], status(run, NOW)["restarts"]) == ("finished", 0)
    run.failed.write_text("loss/d is not finite")
    code, out, err = call(str(run.root))
    assert code == 1 and "failed: loss/d is not finite" in out


def test_restarts_are_starts_without_an_end():
    names = "start save start start save end start end start"
    assert count_restarts([{"event": name} for name in names.split()]) == 2
    assert count_restarts([{"event": "other"}, {}]) == 0


def test_lines_that_a_crash_or_a_stranger_left_are_passed_over(run):
    write(run.events, event("start", 0, 50, workers=1))
    with open(run.events, "a") as file:
        file.write(
            '{"event": "save", "num_im\n[1]\nnull\n"x"\n{"num_images": "9", "time": []}\n' + "[" * 100_000 + "\n"
        )
    write(run.ticks, tick(200, 5, **{"loss/d": None}))
    tree = status(run, NOW)
    assert (tree["state"], tree["starts"], tree["losses"]) == ("running", 1, {"loss/g": 2.5})


def test_runs_are_found_by_folder_checkpoint_or_name(trained, monkeypatch):
    monkeypatch.chdir(trained.root.parent)
    for words in (str(trained.root), "mine", str(trained.saved()[0]), "mine/checkpoints/000000000016"):
        assert find_run(words, "elsewhere").root.resolve() == trained.root.resolve()
    monkeypatch.chdir(trained.root)
    assert find_run(".", "runs").root.resolve() == trained.root.resolve()
    with pytest.raises(UserError, match="no run 'figures'"):
        find_run("figures", "runs")


def test_no_run_is_one_line_and_code_2(call):
    code, out, err = call("nothing")
    assert (code, out, err.count("\n")) == (2, "", 1) and "no run 'nothing'" in err and "--storage" in err


def test_a_damaged_recipe_is_one_line_and_code_2(run, call):
    for text in ("{", "[]", '{"dataset": 1}', "[" * 100_000):
        run.recipe.write_text(text)
        code, out, err = call(str(run.root))
        assert (code, out, err.count("\n")) == (2, "", 1), text[:20]


def test_an_error_that_no_restart_mends_is_told(data, tmp_path):
    job = Job(name="broken", data=str(data), storage=str(tmp_path))
    with pytest.raises(UserError):
        worker.train_rank(recipe(networks="svhn"), job, gpu=False)
    run = RunFolder(tmp_path / "broken")
    assert not run.failed.exists()  # refused before there was a run

    RunFolder(tmp_path / "broken").claim(recipe(num_images=16), "auto")
    with pytest.raises(UserError):
        worker.train_rank(recipe(num_images=16, seed=5), job, gpu=False)
    assert "another recipe" in run.failed.read_text() and status(run, time.time())["state"] == "failed"


def test_the_command_itself(trained):
    command = [sys.executable, "-m", "ali_dist.status", str(trained.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr


def test_gauges_come_from_the_runs_folder(run):
    write(run.events, event("start", 0, 90))
    assert prometheus.values(run) == {
        "ali_restarts": 0,
        "ali_sign_of_life_timestamp_seconds": NOW - 90,
        "ali_end_timestamp_seconds": 0,
    }
    write(run.events, event("start", 0, 80), event("save", 100, 30, seconds=2.5))
    write(run.ticks, tick(200, 20, **{"loss/g": None}), {"num_images": 200, "time": NOW - 10, "valid/loss/d": 1.0})
    assert prometheus.values(run) == {
        "ali_images": 200,
        "ali_images_per_second": 10.0,
        "ali_data_wait_ratio": 0.25,
        "ali_loss_d": 1.5,
        "ali_sign_of_life_timestamp_seconds": NOW - 10,
        "ali_restarts": 1,
        "ali_end_timestamp_seconds": 0,
        "ali_checkpoint_seconds": 2.5,
        "ali_checkpoint_timestamp_seconds": NOW - 30,
    }
    assert set(prometheus.TICK) | set(prometheus.SAVE) < set(prometheus.GAUGES)


@pytest.mark.parametrize("images, stop, ended", [(100, False, False), (100, True, True), (1000, False, True)])
def test_the_end_is_one_that_was_asked_for_or_after_all_images(run, images, stop, ended):
    """Not the end of workers that start again as there is room for more, or a node is to leave."""
    write(run.events, event("start", 0, 90), event("end", images, 20))
    if stop:
        run.stop.touch()
    assert prometheus.values(run)["ali_end_timestamp_seconds"] == (NOW - 20 if ended else 0)
    write(run.events, event("start", images, 10))
    assert prometheus.values(run)["ali_end_timestamp_seconds"] == 0


def test_a_last_call_after_the_workers_end_exports_it(run, monkeypatch):
    said = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            self.name = name

        def set(self, value, tags):
            said[self.name, tags["run"]] = value

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    write(run.events, event("start", 0, 90))
    export = prometheus.Exporter(run)
    export()
    name = run.root.name
    assert said["ali_end_timestamp_seconds", name] == 0 < said["ali_job_timestamp_seconds", name]
    write(run.events, event("end", 1000, 20))
    export()
    assert said["ali_end_timestamp_seconds", name] == NOW - 20
