"""Runs in s3 and gs: trained on one host, gone on with on another, whatever the network does meanwhile.

A host is a folder of copies: $XDG_CACHE_HOME.
"""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import servers
from support import recipe, when_reaching

from ali_dist import checkpoint, loop, mirror, patience, remote, worker
from ali_dist.bench.nodes import wait_until
from ali_dist.data.store import open_bucket
from ali_dist.meter import read_ticks
from ali_dist.recipe import Job, Recipe, UserError
from ali_dist.run import RunFolder, read_lines
from ali_dist.status import status

SHORT = recipe(
    num_images=64, tick_images=8, save_images=16, sample_images=32, validate_images=10**6, validate_count=8, keep=9
)
pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture
def gs():
    """The address of a prefix in a gs with a process of its own, as pyarrow's client holds the interpreter at times."""
    words = [sys.executable, servers.__file__, "/nowhere", "/"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        yield f"gs://anonymous@bucket/runs?endpoint_override=127.0.0.1:{int(server.stdout.readline())}&scheme=http"
        server.kill()


def train(data: Path, storage: str | Path, settings: Recipe = SHORT, **job) -> RunFolder:
    job = Job(data=str(data), storage=str(storage), name="run", **job)
    worker.train_rank(settings, job, gpu=False)
    return remote.run_at(str(storage), "run")


def weights(run: RunFolder) -> dict[str, bytes]:
    return {str(path.relative_to(run.root)): path.read_bytes() for path in run.checkpoints.glob("[0-9]*/*")}


def there(storage: str, below: str = "") -> dict[str, bytes]:
    """Name -> bytes of all files of the run on the store."""
    bucket = open_bucket(storage, "run")
    return {name: bucket.get(name) for name in bucket.files(below)}


def whole(storage: str) -> list[int]:
    """Images of the checkpoints there, each of which is what its manifest says."""
    run = remote.run_at(storage, "run", "read")
    numbers = [number for number, complete in remote.saved(run).items() if complete]
    for number in numbers:
        checkpoint.verify(remote.fetch_checkpoint(run, number))
    return numbers


def losses(run: RunFolder) -> list[tuple]:
    return [(t["num_images"], t.get("loss/d"), t.get("loss/g")) for t in read_ticks(run.ticks)]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> RunFolder:
    return train(data, tmp_path_factory.mktemp("undisturbed"))


def newest_is_undisturbed(storage: str, undisturbed: RunFolder) -> None:
    assert whole(storage)[-1] == 64
    newest = there(storage, "checkpoints/000000000064")
    assert len(newest) == 5 and newest.items() <= weights(undisturbed).items()


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_run_at_an_address_is_that_of_a_folder(kind, request, data, undisturbed, host):
    place = request.getfixturevalue({"s3": "storage", "gs": "gs"}[kind])
    run = train(data, place)
    newest_is_undisturbed(place, undisturbed)
    files = there(place)
    local = {path.relative_to(undisturbed.root).as_posix() for path in undisturbed.root.rglob("*") if path.is_file()}
    names = {name for name in files if not name.startswith(("OWNER.", "checkpoints/", "tb/"))}
    assert names == {name for name in local if not name.startswith(("checkpoints/", "tb/"))}
    assert any("tfevents" in name for name in files)
    for path in (run.recipe, run.log, run.ticks, run.events, *run.figures.iterdir(), *run.tensorboard.iterdir()):
        assert files[path.relative_to(run.root).as_posix()] == path.read_bytes(), path
    assert losses(run) == losses(undisturbed)
    uploaded = [line["num_images"] for line in read_lines(run.events) if line["event"] == "uploaded"]
    assert uploaded and uploaded == whole(place)  # the newest whenever one was done
    assert not (run.root / ".sending").exists()
    # Another host goes on from there
    host("two")
    run = train(data, place, dataclasses.replace(SHORT, schedule=dataclasses.replace(SHORT.schedule, num_images=96)))
    assert "continuing at 64 images" in run.log.read_text() and whole(place)[-1] == 96
    assert [t["num_images"] for t in read_ticks(run.ticks) if "loss/d" in t] == list(range(8, 97, 8))
    assert len([name for name in there(place, "tb")]) == 2
    # And a command finds out how it is
    found = status(remote.find(place.replace("/runs", "/runs/run"), "elsewhere"), time.time())
    assert (found["state"], found["num_images"], found["starts"], found["restarts"]) == ("finished", 96, 2, 0)
    assert found["checkpoint"]["whole"] and "anonymous" not in found["run"]


def test_training_goes_on_while_a_checkpoint_is_sent_and_the_newest_is_next(data, storage, s3, undisturbed):
    run, held = remote.run_at(storage, "run"), []

    def slow(method, path):
        if method in ("PUT", "POST") and "checkpoints/000000000016/" in path and not held:
            held.append(path)
            wait_until(lambda: run.saved() and run.saved()[-1].name == "000000000064", 60)

    s3.fault = slow
    train(data, storage)
    assert held and whole(storage) == [16, 64]
    newest_is_undisturbed(storage, undisturbed)


def test_a_checkpoint_deleted_here_while_it_is_sent_arrives_whole(data, storage, s3):
    run, held = remote.run_at(storage, "run"), []

    def slow(method, path):
        if method in ("PUT", "POST") and "checkpoints/000000000016/" in path and not held:
            held.append(path)
            wait_until(lambda: run.saved() and run.saved()[-1].name >= "000000000048", 60)

    s3.fault = slow
    train(data, storage, dataclasses.replace(SHORT, schedule=dataclasses.replace(SHORT.schedule, keep=2)))
    assert held and [path.name for path in run.saved()] == ["000000000048", "000000000064"]
    assert whole(storage) == [16, 64]
    # One newest is kept of those there, and nothing of the others is left
    again = dataclasses.replace(SHORT, schedule=dataclasses.replace(SHORT.schedule, keep=1, num_images=80))
    train(data, storage, again)
    assert {name.split("/")[1] for name in there(storage, "checkpoints")} == {"000000000080"}
    keys = [
        item["Key"] for item in s3.client.list_objects_v2(Bucket=s3.bucket, Prefix="runs/run/checkpoints/")["Contents"]
    ]
    assert {key.split("/")[3] for key in keys} - {""} == {"000000000080"}


FAULTS = {"server errors": 500, "slow down": 503, "cut connections": "cut", "cut answers": "short"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass(data, storage, s3, fault, undisturbed, host):
    count = itertools.count()
    s3.fault = lambda method, path: None if next(count) % 5 else FAULTS[fault]
    train(data, storage, dataclasses.replace(SHORT, schedule=dataclasses.replace(SHORT.schedule, num_images=32)))
    host("two")
    run = train(data, storage)
    assert "continuing at 32 images" in run.log.read_text()
    s3.fault = lambda method, path: None
    newest_is_undisturbed(storage, undisturbed)


@pytest.mark.slow
def test_a_store_that_is_away_for_a_while_stops_nothing(data, storage, s3, monkeypatch, undisturbed):
    run, away = remote.run_at(storage, "run"), []

    def leave():
        away.append(time.monotonic())
        s3.fault = lambda method, path: 503

    def come_back():
        wait_until(lambda: "can't send to" in run.log.read_text(), 60)
        s3.fault = lambda method, path: None

    when_reaching(monkeypatch, 24, leave)
    original = worker.train

    def trained(*args, **named):
        original(*args, **named)
        assert [path.name for path in run.saved()][-1] == "000000000064"  # all of it, without the store
        come_back()

    monkeypatch.setattr(worker, "train", trained)
    train(data, storage)
    assert away
    newest_is_undisturbed(storage, undisturbed)
    assert f"can't send to {storage}/run (" in run.log.read_text()
    assert re.search(r"could send to .* after", run.log.read_text())


def test_a_store_that_stays_away_is_told_and_the_same_host_goes_on(data, storage, s3, monkeypatch, undisturbed):
    run = remote.run_at(storage, "run")

    def leave():
        s3.fault = lambda method, path: 503

    with monkeypatch.context() as patch:
        patch.setattr(patience, "SECONDS_OF_PATIENCE", 0.5)
        when_reaching(patch, 24, leave)
        with pytest.raises(
            UserError, match=r"end of the run could not be sent to s3://.*/runs/run .*it is in .*one"
        ) as e:
            train(data, storage)
    assert str(run.root) in str(e.value)
    s3.fault = lambda method, path: None
    assert run.saved()[-1].name == "000000000064" and 64 not in whole(storage)
    train(data, storage)
    assert "continuing at 64 images" in run.log.read_text()
    newest_is_undisturbed(storage, undisturbed)


def test_a_slow_store_is_waited_for_while_bytes_arrive_and_no_file_is_sent_twice(
    data, storage, s3, monkeypatch, undisturbed
):
    sent, failed = [], []

    def slow(method, path):
        if method != "PUT" or "checkpoints/000000000064/" not in path or path.endswith("/"):
            return None
        time.sleep(1.0)
        if path.endswith("model.safetensors") and len(failed) < 12:  # more often than pyarrow tries again by itself
            failed.append(path)
            return 403
        sent.append(path.rpartition("/")[2])

    s3.fault = slow
    monkeypatch.setattr(patience, "SECONDS_OF_PATIENCE", 4.0)
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_LOOKS", 0.05)
    when_reaching(monkeypatch, 48, lambda: failed.extend([""] * 11))
    begin = time.monotonic()
    train(data, storage)
    assert time.monotonic() - begin > 4.0
    newest_is_undisturbed(storage, undisturbed)
    assert len(failed) == 12 and len(sent) == len(set(sent)) == 5


def lose(s3, name, content):
    s3.client.delete_object(Bucket=s3.bucket, Key=name)


def shorten(s3, name, content):
    s3.client.put_object(Bucket=s3.bucket, Key=name, Body=content[:-10])


def change(s3, name, content):
    s3.client.put_object(Bucket=s3.bucket, Key=name, Body=content[:-10] + b"0123456789")


DAMAGES = {
    "missing": (lose, "adam.safetensors", "no file of its own"),
    "short": (shorten, "model.safetensors", "bytes, not"),
    "changed": (change, "averaged.safetensors", "does not match its checksum"),
    "no state": (lose, "state.json", "no file of its own"),
    "no JSON": (shorten, "manifest.json", "is damaged"),
    "half sent": (lose, "manifest.json", None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(data, storage, s3, host, undisturbed, damage):
    harm, name, complaint = DAMAGES[damage]
    for path in (path for path in undisturbed.root.rglob("*") if path.is_file()):  # as if all were sent
        key = f"runs/run/{path.relative_to(undisturbed.root).as_posix()}"
        s3.client.put_object(Bucket=s3.bucket, Key=key, Body=path.read_bytes())
    key = f"checkpoints/000000000064/{name}"
    harm(s3, f"runs/run/{key}", there(storage, "checkpoints/000000000064")[key])
    found = status(remote.find(f"{storage}/run", "elsewhere"), time.time())["checkpoint"]
    if name == "manifest.json":
        assert found["num_images"] == (64 if complaint else 48) and found["whole"] == (complaint is None)
    else:
        assert found["num_images"] == 64 and found["whole"] == (damage == "changed")  # which takes reading all of it
    run = train(data, storage)
    assert "continuing at 48 images" in run.log.read_text()
    damaged = [line for line in read_lines(run.events) if line["event"] == "damaged"]
    assert [line["num_images"] for line in damaged] == ([48] if complaint else [])
    assert all(complaint in line["why"] for line in damaged)
    assert whole(storage) == [16, 32, 48, 64]
    newest_is_undisturbed(storage, undisturbed)


def test_a_stop_in_the_store_ends_the_run_with_that_very_update_sent(data, storage, s3, monkeypatch):
    run = remote.run_at(storage, "run")

    def ask():
        s3.client.put_object(Bucket=s3.bucket, Key="runs/run/STOP", Body=b"")
        wait_until(run.stop.exists, 60)

    when_reaching(monkeypatch, 24, ask)
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_STOP_CHECKS", 0)  # after every update
    train(data, storage)
    (last,) = {tick["num_images"] for tick in read_ticks(run.ticks)[-1:]}
    assert last == 32 and whole(storage)[-1] == last == int(run.saved()[-1].name)
    found = status(remote.find("run", storage), time.time())
    assert (found["state"], found["num_images"]) == ("stopped", last)


def test_the_driver_and_rank_0_hear_each_other(storage, s3):
    """On two hosts, so that they share no folder."""
    bucket = open_bucket(storage, "run")
    run = remote.run_at(storage, "run")
    remote.start(run, SHORT, "auto")
    driver = remote.copy_of(run, "job")
    assert driver.root != run.root and driver.recipe.exists() and not run.root.exists()
    with mirror.followed(driver):
        bucket.put("log.txt", b"first\n")
        wait_until(driver.log.exists, 60)
        bucket.put("log.txt", b"first\nsecond\n")
        wait_until(lambda: "second" in driver.log.read_text(), 60)
        for _ in range(2):  # as often as there is room
            driver.regroup.touch()
            wait_until(lambda: bucket.has("REGROUP") and not driver.regroup.exists(), 60)
            remote.heed(run)
            assert not bucket.has("REGROUP") and not run.regroup.exists() and not run.stop.exists()
        driver.stop.touch()
        wait_until(lambda: bucket.has("STOP"), 60)
        remote.fail(run, "a shard is damaged")
        wait_until(driver.failed.exists, 60)
        assert driver.failed.read_text() == "a shard is damaged"
    remote.heed(run)
    assert run.stop.exists() and run.failed.exists()  # a worker that starts again ends at once
    remote.start(run, SHORT, "auto")
    assert not bucket.has(*remote.CONTROL)
    assert not any((place.root / name).exists() for place in (run, driver) for name in remote.CONTROL)


def test_the_host_that_wrote_last_keeps_what_was_not_sent(data, storage, s3, monkeypatch, host):
    """And loses it where another host has gone on meanwhile."""

    def die():
        raise KeyboardInterrupt  # as good as killed: nothing is waited for

    s3.fault = lambda method, path: 403 if "checkpoints/0000" in path and method != "GET" else None
    with monkeypatch.context() as patch:
        when_reaching(patch, 40, die)
        with pytest.raises(KeyboardInterrupt):
            train(data, storage)
    run = remote.run_at(storage, "run")
    assert run.saved()[-1].name == "000000000032" and whole(storage) == []
    s3.fault = lambda method, path: None
    half = dataclasses.replace(SHORT, schedule=dataclasses.replace(SHORT.schedule, num_images=48))
    train(data, storage, half)
    assert "continuing at 32 images" in run.log.read_text() and whole(storage)[-1] == 48
    owner = (run.root / "OWNER").read_text()
    host("two")
    train(data, storage)
    host("one")
    assert run.saved()[-1].name == "000000000048"
    longer = dataclasses.replace(SHORT, schedule=dataclasses.replace(SHORT.schedule, num_images=80))
    train(data, storage, longer)
    assert "continuing at 64 images" in run.log.read_text()
    assert (run.root / "OWNER").read_text() != owner
    assert [name for name in there(storage) if name.startswith("OWNER.")] == [
        f"OWNER.{(run.root / 'OWNER').read_text()}"
    ]


def test_a_host_that_another_has_replaced_ends_and_sends_nothing(data, storage, s3, monkeypatch):
    bucket, run = open_bucket(storage, "run"), remote.run_at(storage, "run")

    def replace():
        for name in bucket.files(deep=False):
            if name.startswith("OWNER."):
                bucket.delete(name)
        wait_until(run.stop.exists, 60)

    when_reaching(monkeypatch, 24, replace)
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_STOP_CHECKS", 0)
    with pytest.raises(UserError, match="another host goes on with s3://"):
        train(data, storage)
    assert run.saved()[-1].name == "000000000032" and whole(storage)[-1:] != [32]
    events = [line["event"] for line in read_lines(run.events)]  # one sent before may arrive after the end
    assert "end" in events[-2:] and b'"end"' not in there(storage)["events.jsonl"]


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_sent_another_host_goes_on_bit_for_bit(data, storage, s3, tmp_path, host):
    """By the command, in a process of its own."""
    sending, killed, seen = threading.Event(), threading.Event(), {}

    def hold(method, path):
        if method in ("PUT", "POST") and (found := re.search(r"checkpoints/(\d+)/(\w+)", path)):
            seen.setdefault(found[1], set()).add(found[2])
            if len(seen) == 2 and len(seen[found[1]]) == 2:  # the second file of the second
                sending.set()
                killed.wait(60)
                return 503

    s3.fault = hold
    words = [sys.executable, Path(__file__).with_name("worker_with_small_networks.py"), "--dataset", "digits"]
    words += ["--networks", "small", "--precision", "fp32", "--lr", "3e-4", "--batch-size", "8", "--name", "run"]
    words += ["--ema-half-life", "5000", "--num-images", "1000000", "--tick-images", "8", "--save-images", "16"]
    words += ["--data", data, "--storage", storage]
    with subprocess.Popen(list(map(str, words)), env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        assert sending.wait(60)
        process.kill()
    killed.set()
    s3.fault = lambda method, path: None
    first, second = remote.saved(remote.run_at(storage, "run")).items()
    assert first[1] and not second[1] and whole(storage) == [first[0]]
    host("two")
    settings = dataclasses.replace(SHORT, schedule=dataclasses.replace(SHORT.schedule, num_images=first[0] + 48))
    run = train(data, storage, settings)
    assert f"continuing at {first[0]:,} images" in run.log.read_text()
    alone = train(data, tmp_path / "alone", settings)
    newest = f"checkpoints/{first[0] + 48:012d}"
    assert there(storage, newest).items() <= weights(alone).items() and len(there(storage, newest)) == 5


def train_on_its_host(
    rank: int, environment: dict[str, str], folder: Path, data: Path, storage: str, images: int
) -> int:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "XDG_CACHE_HOME": str(folder / f"host-{rank}")}.items():
            patch.setenv(name, value)
        patch.setattr(mirror, "SECONDS_BETWEEN_LOOKS", 0.05)
        schedule = dataclasses.replace(SHORT.schedule, num_images=images)
        run = train(data, storage, dataclasses.replace(SHORT, schedule=schedule), num_workers=2)
        return int(run.root.exists())


@pytest.mark.slow
def test_ranks_on_hosts_without_a_copy_have_rank_0s_state(ranks, data, storage, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "NO_PROXY"))}
    for host, images in (("a", 32), ("b", 64)):
        made = ranks.run(2, train_on_its_host, environment, tmp_path / host, data, storage, images)
        assert made == [1, 0]
    for images in (32, 64):
        ranks.run(2, train_on_its_host, {}, tmp_path, data, str(tmp_path / "alone"), images)
    newest = there(storage, "checkpoints/000000000064")
    assert len(newest) == 5 and newest.items() <= weights(RunFolder(tmp_path / "alone" / "run")).items()
