"""Faults of whole processes and nodes on a Ray cluster of several nodes of this machine."""

import os
import signal
import subprocess
import time

import pytest
from metadata import Metadata
from undisturbed import assert_undisturbed, numbers

from ali_dist import checkpoint
from ali_dist.bench.inflict import kill_driver, kill_worker, lose_node, stop_worker
from ali_dist.bench.job import BATCH, Job, suffer
from ali_dist.bench.nodes import ROOT, Nodes, processes, wait_until
from ali_dist.launch import SECONDS
from ali_dist.run import count_restarts, read_lines

MINUTES = 60.0
HELD_BY_RAY = 180  # seconds for which it keeps what a job reserved that says no more
pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * MINUTES), pytest.mark.xdist_group("nodes")]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    nodes = Nodes(tmp_path_factory.mktemp("nodes"), 2)
    yield nodes
    nodes.close()


def stops_undisturbed(job, restarts, nodes, ranks, data, tmp_path):
    job.stop()
    assert job.driver.returncode == 0, (tmp_path / "job.log").read_text()
    events = read_lines(job.run.events)
    wait_until(lambda: not nodes.workers(), MINUTES)  # nor one that hung
    assert count_restarts(events) == restarts and events[-1]["event"] == "end"
    assert not job.run.ray.exists() and not list(job.run.checkpoints.glob(".*"))
    assert_undisturbed(job.run, ranks, data, tmp_path)


def test_after_each_fault_the_run_goes_on_as_if_undisturbed(nodes, ranks, data, tmp_path):
    """One after the other: a killed rank 0, a worker that hangs."""
    job = Job(tmp_path, data, nodes, "--num-workers", 2, "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    for fault, rank0 in ((kill_worker, True), (stop_worker, False)):
        assert suffer(job, fault, rank0)["images_lost"] == 0
        job.wait(lambda: job.trains(2))
    stops_undisturbed(job, 2, nodes, ranks, data, tmp_path)


@pytest.mark.soak
def test_a_storage_that_is_away_and_a_killed_driver(nodes, ranks, data, tmp_path):
    job = Job(tmp_path, data, nodes, "--num-workers", 2, "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))

    # Away for longer than a silent worker is given, the storage holds up the run, but is no hang
    begun = len(job.starts())
    os.rename(job.run.root, tmp_path / "away")
    time.sleep(1.3 * float(SECONDS["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"]))
    assert not job.run.root.exists()
    os.rename(tmp_path / "away", job.run.root)
    back = time.time()
    job.wait(lambda: job.ticks()[-1]["time"] > back + 1)
    assert len(job.starts()) == begun
    saved = job.run.saved()[-1]

    job.driver.kill()
    job.driver.wait()
    for _ in range(2):
        snapshot = job.run.ray / str(time.time_ns()) / "checkpoint_manager_snapshot.json"
        snapshot.parent.mkdir(parents=True)
        snapshot.write_text('{"checkpoint_results": [{"checkpoint_dir_na')
    since = time.time()
    job.start()
    job.wait(lambda: job.trains(2, since))
    assert job.starts()[-1]["num_images"] >= int(saved.name)
    stops_undisturbed(job, 1, nodes, ranks, data, tmp_path)


@pytest.mark.soak
def test_a_lost_node_is_replaced_by_a_spare_one(nodes, ranks, data, tmp_path):
    job = Job(tmp_path, data, nodes, "--num-workers", 2, "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    nodes.add()
    assert suffer(job, lambda *a: lose_node(*a) + 1, rank0=False)["images_lost"] == 0
    job.stop()
    assert_undisturbed(job.run, ranks, data, tmp_path)


class Impatient(Job):
    program = ("-c", "from ali_dist import cli, launch, lookout; lookout.SECONDS_TO_START = 30; cli.run(launch.main)")


@pytest.mark.soak
def test_a_worker_that_hangs_before_it_trains_is_found(nodes, data, tmp_path):
    job = Impatient(tmp_path, data, nodes, "--num-workers", 2, "--num-images", 10**9)
    job.wait(nodes.workers)
    hanging = min(nodes.workers())
    os.kill(hanging, signal.SIGSTOP)
    job.wait(lambda: job.trains(2))
    assert "did not begin to train within 30 s" in (tmp_path / "job.log").read_text()
    wait_until(lambda: hanging not in nodes.workers(), MINUTES)
    job.stop()
    assert job.driver.returncode == 0, (tmp_path / "job.log").read_text()


@pytest.mark.soak
def test_a_job_that_waits_for_a_lost_node_can_be_stopped(nodes, data, tmp_path):
    job = Job(tmp_path, data, nodes, "--num-workers", 2, "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    lose_node(job, rank0=True)
    job.wait(lambda: not nodes.workers())
    job.stop()
    log = (tmp_path / "job.log").read_text()
    assert job.driver.returncode == 0 and "were no workers to stop" in log and "stopped" in log.splitlines()
    checkpoint.verify(job.run.saved()[-1])
    nodes.add()


@pytest.mark.soak
def test_a_second_job_of_the_name_takes_the_run_over(nodes, ranks, data, tmp_path):
    job = Job(tmp_path, data, nodes, "--num-workers", 2, "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    first, since = job.driver, time.time()
    job.start()
    assert first.wait(MINUTES) == 2
    job.wait(lambda: job.trains(2, since) and int(job.run.saved()[-1].name) > job.starts()[-1]["num_images"])
    job.stop()
    assert job.driver.returncode == 0 and "another job goes on with" in (tmp_path / "job.log").read_text()
    assert_undisturbed(job.run, ranks, data, tmp_path)


@pytest.mark.soak
def test_a_killed_elastic_job_leaves_no_reservation_to_wait_for(nodes, data, tmp_path):
    job = Job(tmp_path, data, nodes, "--num-workers", "1:2", "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    assert suffer(job, kill_driver, rank0=False)["seconds"] < HELD_BY_RAY
    job.stop()


@pytest.mark.soak
def test_nodes_that_get_sigterm_or_a_spot_notice_are_left_at_that_very_update(nodes, ranks, data, tmp_path):
    job = Job(tmp_path, data, nodes, "--num-workers", 2, "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    metadata = Metadata()
    env = nodes.environment | {"METADATA_ADDRESS": metadata.address}
    for notice in (False, True):
        nodes.add()
        leaving = nodes.workers()[job.victim(rank0=notice)]
        since = time.time()
        if notice:
            (raylet,) = [pid for pid, name in processes(leaving.pid).items() if name == "raylet"]
            spot = subprocess.Popen([ROOT / "launch" / "spot.sh", "ec2", str(raylet)], env=env)
            metadata.notice.set()
            assert spot.wait(MINUTES) == 0
        else:
            leaving.send_signal(signal.SIGTERM)
        job.wait(lambda since=since: job.trains(2, since))
        assert leaving not in nodes.workers().values()
        # Ray ends a node that is to leave with the last that ran there, and joins no more
        wait_until(lambda leaving=leaving: "raylet" not in processes(leaving.pid).values(), MINUTES)
        nodes.remove(leaving)
    metadata.close()
    job.stop()
    events = [line for line in read_lines(job.run.events) if line["event"] in ("start", "end")]
    assert [line["event"] for line in events] == ["start", "end"] * 3
    for end, start in zip(events[1::2], events[2::2], strict=False):
        assert end["num_images"] == start["num_images"] > 0
    assert_undisturbed(job.run, ranks, data, tmp_path)


@pytest.mark.soak
def test_an_elastic_job_gives_up_drained_nodes_and_takes_new_ones(nodes, data, tmp_path):
    job = Job(tmp_path, data, nodes, "--num-workers", "1:2", "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    drained = nodes.nodes[-1]
    nodes.drain(drained, 20)
    job.wait(lambda: read_lines(job.run.events)[-1]["event"] == "end")
    nodes.remove(drained)
    job.wait(lambda: job.trains(1))
    nodes.add()
    job.wait(lambda: job.trains(2))
    job.stop()
    assert job.driver.returncode == 0, (tmp_path / "job.log").read_text()
    events = [line for line in read_lines(job.run.events) if line["event"] in ("start", "end")]
    assert [line.get("workers") for line in events if line["event"] == "start"] == [2, 1, 2]
    # Each time they have saved at that very update and gone on from there
    assert [line["event"] for line in events] == ["start", "end"] * 3
    for end, start in zip(events[1::2], events[2::2], strict=False):
        assert end["num_images"] == start["num_images"] > 0
    ticks = [n for n, _, _ in numbers(job.run)]
    assert ticks == sorted(set(ticks)) and set(range(4 * BATCH, ticks[-1], 4 * BATCH)) <= set(ticks)
