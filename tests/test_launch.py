"""The job on a real Ray cluster of this machine, started by launch/local.sh with token authentication."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from ali_dist import checkpoint, elastic, launch, remote
from ali_dist.cluster import start_ray
from ali_dist.data.store import open_bucket
from ali_dist.meter import read_ticks
from ali_dist.prometheus import GAUGES, TICK
from ali_dist.recipe import Job
from ali_dist.run import RunFolder, count_restarts
from ali_dist.status import status

ROOT = Path(__file__).parents[1]
LOCAL, SUBMIT = ROOT / "launch" / "local.sh", ROOT / "launch" / "submit.sh"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
MINUTES = 60.0

pytestmark = [pytest.mark.timeout(10 * MINUTES), pytest.mark.xdist_group("nodes")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which a running cluster's commands work; one cluster for all tests here."""
    told = tmp_path_factory.mktemp("cluster") / "env.json"
    tell = f"import json, os; json.dump(dict(os.environ), open({str(told)!r} + '.partial', 'w'))"
    script = f'"{sys.executable}" -c "{tell}" && mv "{told}.partial" "{told}" && cat'
    stray = {"RAY_ADDRESS": "10.255.255.1:1", "RAY_AUTH_TOKEN_PATH": "/nowhere"}  # another cluster's: must not reach it
    process = subprocess.Popen(
        [LOCAL, "sh", "-c", script], stdin=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PATH": PATH, **stray}
    )
    wait_for(told.exists, process)
    yield json.loads(told.read_text())
    process.stdin.close()
    assert process.wait(MINUTES) == 0


def wait_for(condition, process=None, seconds=4 * MINUTES):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def submit(cluster, data, tmp_path):
    """Starts launch/submit.sh on a short run of the digits; its output is in NAME.out. No job outlives its test."""
    started = []

    def submit(name, *flags, data=data):
        words = ["--dataset", "digits", "--data", data, "--storage", tmp_path, "--name", name, "--batch-size", 16]
        words += ["--tick-images", 32, "--save-images", 64, "--sample-images", 10**6, "--validate-images", 10**6]
        words = [str(word) for word in (SUBMIT, *words, *flags)]
        with open(tmp_path / f"{name}.out", "w") as out:
            started.append(subprocess.Popen(words, cwd=ROOT, env=cluster, stdout=out, stderr=subprocess.STDOUT))
        return started[-1]

    yield submit
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(2 * MINUTES)


def status_of_jobs_api(cluster, token):
    request = urllib.request.Request(cluster["RAY_API_SERVER_ADDRESS"] + "/api/jobs/")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def job_id(out: Path) -> str:
    return re.search(r"'(ali-[\w-]+)' submitted", out.read_text()).group(1)


def test_the_cluster_answers_only_with_its_token(cluster):
    token = Path(cluster["RAY_AUTH_TOKEN_PATH"])
    assert status_of_jobs_api(cluster, token.read_text().strip()) == 200
    assert status_of_jobs_api(cluster, None) == 401
    assert status_of_jobs_api(cluster, "0" * 64) == 403
    assert token.stat().st_mode & 0o077 == 0
    assert cluster["RAY_API_SERVER_ADDRESS"].startswith("http://127.0.0.1:")


def test_a_submitted_job_trains_with_two_workers(submit, tmp_path):
    process = submit("two workers", "--num-workers", 2, "--num-images", 96)
    assert process.wait(3 * MINUTES) == 0, (tmp_path / "two workers.out").read_text()
    out = (tmp_path / "two workers.out").read_text()
    assert "finished" in out and "96 / 96 images" in out and "RAY_JOB_STOP_WAIT_TIME_S" not in out
    assert "Traceback" not in out and "WARNING" not in out
    run = RunFolder(tmp_path / "two workers")
    assert [int(path.name) for path in run.saved()] == [64, 96]
    for path in run.saved():
        checkpoint.verify(path)
    assert [tick["num_images"] for tick in read_ticks(run.ticks) if "loss/d" in tick] == [32, 64, 96]
    assert sorted(path.name for path in run.figures.glob("*96.png")) == [
        "interpolations-000000000096.png",
        "reconstructions-000000000096.png",
        "samples-000000000096.png",
    ]
    assert not run.ray.exists() and not run.failed.exists() and not run.stop.exists()


@pytest.mark.slow
def test_a_stopped_job_saves_and_continues_at_that_update(cluster, submit, tmp_path):
    process = submit("stopped", "--num-images", 10**6)
    run, out = RunFolder(tmp_path / "stopped"), tmp_path / "stopped.out"
    wait_for(lambda: run.ticks.exists() and len(read_ticks(run.ticks)) >= 3, process)
    subprocess.run(["ray", "job", "stop", job_id(out)], env=cluster, check=True, capture_output=True)
    process.wait(MINUTES)
    stopped_at = int(run.saved()[-1].name)
    assert stopped_at == read_ticks(run.ticks)[-1]["num_images"]
    assert f"{stopped_at:012d}" in out.read_text()

    process = submit("stopped", "--num-images", stopped_at + 48)
    assert process.wait(2 * MINUTES) == 0, out.read_text()
    assert f"continuing at {stopped_at:,} images" in out.read_text()
    assert int(run.saved()[-1].name) == stopped_at + 48


RAY_THAT_TAKES_ITS_TIME = """#!/bin/sh
cd "${0%/*}"
if [ "$2" = submit ]; then
    touch submitted
    until [ -e stopped ]; do sleep 0.1; done
else
    echo "$*" >>asked
    case $(wc -l <asked) in
    1) exit 1 ;; # it does not know the job yet
    2) ;; # it knows it, but there is no process yet to be stopped
    *) touch stopped ;;
    esac
fi
"""


def test_ctrl_c_on_the_submitter_is_not_lost_while_ray_takes_the_job(tmp_path):
    ray_command = tmp_path / "ray"
    ray_command.write_text(RAY_THAT_TAKES_ITS_TIME)
    ray_command.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    process = subprocess.Popen([SUBMIT, "--dataset", "digits"], env=env)
    wait_for((tmp_path / "submitted").exists, process)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(20) == 130
    finally:
        (tmp_path / "stopped").touch()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 3 and all(re.fullmatch(r"job stop --no-wait ali-[\d-]+", line) for line in asked)


@pytest.mark.slow
def test_ctrl_c_before_the_job_is_submitted_ends_it(cluster, submit, tmp_path):
    process = submit("early", "--num-images", 10**6)
    command = ["pgrep", "-P", str(process.pid)]
    wait_for(lambda: subprocess.run(command, capture_output=True).stdout, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(MINUTES) == 130
    address, token = cluster["RAY_API_SERVER_ADDRESS"], Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    (job,) = [
        job for job in json.load(urllib.request.urlopen(request)) if job["submission_id"].endswith(f"-{process.pid}")
    ]
    assert job["status"] == "STOPPED"


@pytest.mark.slow
@pytest.mark.soak
def test_a_job_whose_storage_is_an_address(data, storage, s3, tmp_path):
    """Stopped through the store, then gone on with from another host's empty folder, by two workers."""
    bucket, flags = open_bucket(storage, "run"), ["--dataset", "digits", "--data", data, "--storage", storage]
    flags += ["--name", "run", "--batch-size", 16, "--tick-images", 32, "--sample-images", 10**6, "--num-workers", 2]
    words = list(map(str, [sys.executable, "-m", "ali_dist.launch", *flags, "--validate-images", 10**6]))

    @contextmanager
    def job(host: str, *more: object) -> Iterator[subprocess.Popen]:
        environment = {**os.environ, "RAY_ADDRESS": "local", "XDG_CACHE_HOME": str(tmp_path / host)}
        with open(tmp_path / f"{host}.out", "w") as out:
            command = [*words, *map(str, more)]
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield process
            assert process.wait(2 * MINUTES) == 0, (tmp_path / f"{host}.out").read_text()
        finally:
            process.terminate()
            process.wait(MINUTES)

    with job("one", "--num-images", 10**6, "--save-images", 10**6) as process:
        # Its log has come to the driver by way of the store
        wait_for(lambda: " images  " in (tmp_path / "one.out").read_text(), process)
        bucket.put("STOP", b"")
    (stopped_at,) = [number for number, whole in remote.saved(RunFolder(tmp_path, bucket)).items() if whole]
    out = (tmp_path / "one.out").read_text()
    assert "stopped" in out.splitlines() and f"checkpoint       {storage}/run/checkpoints/{stopped_at:012d}" in out
    assert [line["event"] for line in read_events(bucket)] in (
        ["start", "save", "uploaded", "end"],
        ["start", "save", "end", "uploaded"],
    )

    with job("two", "--num-images", stopped_at + 48):
        pass
    out = (tmp_path / "two.out").read_text()
    assert f"continuing at {stopped_at:,} images" in out and "finished" in out.splitlines() and "hush" not in out
    assert list(remote.saved(RunFolder(tmp_path, bucket)).items())[-1] == (stopped_at + 48, True)
    assert count_restarts(read_events(bucket)) == 0


def read_events(bucket) -> list[dict]:
    return [json.loads(line) for line in bucket.get("events.jsonl").splitlines()]


def scraped(cluster, run: str) -> dict[str, float]:
    """Gauge -> value of the run's samples at all addresses that Ray lists for Prometheus."""
    folder, samples = Path(cluster["RAY_AUTH_TOKEN_PATH"]).parent, {}
    for target in json.loads((folder / "prom_metrics_service_discovery.json").read_text())[0]["targets"]:
        try:
            text = urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode()
        except urllib.error.URLError:
            continue  # as Prometheus does: of several clusters on a host only one gets the autoscaler's fixed port
        for line in text.splitlines():
            if line.startswith("ray_ali_") and f'run="{run}"' in line:
                name, value = line.rsplit(maxsplit=1)
                samples[name.split("{")[0].removeprefix("ray_")] = float(value)
    return samples


@pytest.mark.slow
def test_prometheus_reads_a_job_until_ctrl_c_on_the_submitter_stops_it_with_a_checkpoint(cluster, submit, tmp_path):
    # Saves are far rarer than ticks: only the interrupt's own is as new as the last tick
    run, process = RunFolder(tmp_path / "scraped"), submit("scraped", "--num-images", 10**6, "--save-images", 512)
    wait_for(lambda: scraped(cluster, "scraped").keys() == GAUGES.keys(), process)
    seen = scraped(cluster, "scraped")
    process.send_signal(signal.SIGINT)
    assert process.wait(MINUTES) == 130
    assert (tmp_path / "scraped.out").read_text().count("stopping:") == 1
    checkpoint.verify(run.saved()[-1])
    assert int(run.saved()[-1].name) == read_ticks(run.ticks)[-1]["num_images"]
    # Ray shows the last values for longer than passes between two readings of launch/prometheus.yaml
    assert scraped(cluster, "scraped")["ali_end_timestamp_seconds"] > seen["ali_job_timestamp_seconds"]
    ticks = {tick["num_images"]: tick for tick in read_ticks(run.ticks)}
    tick = ticks[int(seen["ali_images"])]
    for gauge, name in TICK.items():
        assert seen[gauge] == pytest.approx(tick[name]), gauge
    assert seen["ali_restarts"] == seen["ali_end_timestamp_seconds"] == 0 and 0 < seen["ali_checkpoint_seconds"] < 60
    assert 0 < seen["ali_checkpoint_timestamp_seconds"] <= seen["ali_sign_of_life_timestamp_seconds"] < time.time()


@pytest.mark.slow
def test_a_damaged_shard_ends_the_job_with_one_clear_line(data, submit, tmp_path):
    shutil.copytree(data, tmp_path / "damaged")
    shard = next((tmp_path / "damaged" / "digits").glob("train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    process = submit("run", "--num-images", 96, data=tmp_path / "damaged")
    assert process.wait(3 * MINUTES) != 0
    out = (tmp_path / "run.out").read_text()
    (line,) = {line for line in out.splitlines() if line.startswith("error: ")}  # Ray repeats a failed job's last lines
    assert shard.name in line and "exit code 2" in out and "Traceback" not in out
    found = status(RunFolder(tmp_path / "run"), time.time())
    assert found["state"] == "failed" and shard.name in found["why"]


def test_more_workers_than_the_cluster_has_are_waited_for_then_refused(cluster, data, tmp_path):
    command = [sys.executable, "-m", "ali_dist.launch", "--dataset", "digits", "--data", data, "--storage", tmp_path]
    done = subprocess.run(
        [*map(str, command), "--num-workers", "60", "--lanes", "60", "--wait-seconds", "1"],
        env=cluster,
        capture_output=True,
        text=True,
        timeout=MINUTES,
    )
    assert done.returncode == 2
    assert "waiting up to 1 s for nodes to join" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "60 CPUs" in line and "--num-workers" in line


def test_outside_our_clusters_a_submitted_job_says_how_to_be_given_time(monkeypatch, capsys):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    launch.tell_about_stopping()
    assert "RAY_JOB_STOP_WAIT_TIME_S" in capsys.readouterr().out
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    launch.tell_about_stopping()
    assert capsys.readouterr().out == ""


def test_what_a_killed_job_reserved_is_released(monkeypatch):
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    monkeypatch.setenv("RAY_ADDRESS", "local")
    start_ray()
    try:
        elastic.release("train-1")  # on a cluster without elastic jobs

        def reserved(requester):
            return ray.get(coordinator.get_reserved_resources.remote(requester, recompute=True))

        coordinator = get_or_create_autoscaling_coordinator()
        for requester in ("train-1", "train-2"):
            ray.get(coordinator.request_resources.remote(requester, [{"CPU": 1}], expire_after_s=180))
            assert reserved(requester)
        elastic.release("train-1")
        assert not reserved("train-1") and reserved("train-2")
    finally:
        ray.shutdown()


def test_an_elastic_job_grows_once_there_has_been_room_for_a_while(monkeypatch, tmp_path):
    run, free, now = RunFolder(tmp_path), {"CPU": 0.0}, [0.0]
    monkeypatch.setattr("ray.available_resources", lambda: dict(free))
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    grow = elastic.Growth(run, Job(num_workers=3, min_workers=1), {"CPU": 2})

    def after(seconds: int) -> bool:
        for _ in range(seconds):
            now[0] += 1
            grow()
        asked = run.regroup.exists()
        run.regroup.unlink(missing_ok=True)  # as the workers do when they start again
        return asked

    run.record("start", 0, workers=1)
    assert not after(100)
    free["CPU"] = 3.0
    assert not after(10) and after(10)
    run.record("end", 64)
    assert not after(100)  # they are being started
    run.record("start", 64, workers=1)
    assert after(20)  # Ray could not place more of them: once more,
    assert not after(15) and after(15)  # and then less often
    run.record("start", 128, workers=2)  # it brought one more, which was soon lost
    run.record("start", 128, workers=1)
    assert after(20) and not after(15) and after(15)
    run.record("start", 128, workers=2)
    free["CPU"] = 0.0
    assert not after(200)
    free["CPU"] = 2.0
    assert not after(10) and after(10)  # the last attempt did bring more
    run.record("start", 192, workers=2)
    assert after(20)
    run.record("start", 256, workers=3)
    assert not after(200)
    for start in (320, 448, 576):  # nodes that are lost and come back, however often
        run.record("start", start, workers=1)
        assert after(20)
        run.record("start", start + 64, workers=3)
        assert not after(20)


def test_ray_train_is_told_of_nodes_that_come_and_go(monkeypatch):
    nodes, asked = [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": True}], []

    class Coordinator:
        class get_reserved_resources:  # noqa: N801
            remote = staticmethod(lambda requester, recompute: asked.append(recompute))

    def no_actor(*_, **__):
        raise ValueError("no such actor")

    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.get_actor", no_actor)
    look = elastic.ClusterView()
    look()
    monkeypatch.setattr("ray.get_actor", lambda *_, **__: Coordinator)
    look()
    assert not asked
    nodes[1]["Alive"] = False
    look()
    look()
    nodes.append({"NodeID": "c", "Alive": True})
    look()
    assert asked == [True, True]


def test_the_token_that_ray_makes_becomes_the_users_alone(monkeypatch, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setattr("ray.init", lambda **_: None)
    start_ray()
    assert token.stat().st_mode & 0o777 == 0o600
    token.unlink()
    start_ray()


def test_dry_run_prints_the_job_and_writes_nothing(data, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ali_dist.launch", "--dataset", "digits", "--data", data]
        + ["--storage", tmp_path / "runs", "--num_workers", "2", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=MINUTES,
    )
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert tree["num_workers"] == 2 and tree["recipe"]["optim"]["batch_size"] == 64
    assert not (tmp_path / "runs").exists()
