"""Training over the network of hosts with addresses of their own, one of which is cut off: see hosts.py."""

import shutil
import time

import pytest
from hosts import Hosts, why_not
from undisturbed import assert_undisturbed, numbers

from ali_dist.bench.job import BATCH, Job
from ali_dist.run import RunFolder

MINUTES = 60.0
pytestmark = [pytest.mark.soak, pytest.mark.timeout(6 * MINUTES), pytest.mark.xdist_group("nodes")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), 2)
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def job(hosts, data, tmp_path_factory) -> Job:
    """A job of up to two workers, one on each host, that trains."""
    job = Job(tmp_path_factory.mktemp("job"), data, hosts, "--num-workers", "1:2", "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    return job


def wait_for_updates(job: Job, ticks: int) -> None:
    now = time.time()
    job.wait(lambda: sum(tick["time"] > now for tick in job.ticks()) >= ticks)


def test_disturbed_links_restart_nothing_and_change_nothing(hosts, job, ranks, data, tmp_path):
    """A cut of seconds, then packets that are dropped, then packets that wait."""
    assert {hosts.host(pid) for pid in hosts.workers()} == {1, 2}
    hosts.cut(1)
    time.sleep(3)
    assert job.ticks()[-1]["time"] < time.time() - 2  # they do talk over that link
    hosts.mend(1)
    wait_for_updates(job, 2)
    for queue, sign in (("20kb", "drops"), ("2mb", "overlimits")):
        hosts.shape(2, "200mbit", queue)
        wait_for_updates(job, 2)
        assert hosts.unshape(2)[sign] > 100
    assert len(job.starts()) == 1

    saved, before = job.run.saved()[-1], RunFolder(tmp_path / "before")
    shutil.copytree(saved, before.checkpoints / saved.name)
    shutil.copy(job.run.ticks, before.ticks)
    assert_undisturbed(before, ranks, data, tmp_path)


def test_a_host_that_is_cut_off_is_given_up_and_taken_back(hosts, job):
    """It is the one with rank 0, whose worker and Ray node live on, but reach nobody."""
    lost = hosts.host(job.victim(rank0=True))
    saved, begin, joined = int(job.run.saved()[-1].name), time.time(), hosts.joined(lost)
    hosts.cut(lost)
    job.wait(lambda: job.trains(1, begin))
    assert job.starts()[-1]["num_images"] >= saved
    assert 3 - lost in {hosts.host(pid) for pid in hosts.workers()}
    saved = int(job.run.saved()[-1].name)

    hosts.mend(lost)
    job.wait(lambda: job.trains(2, begin))
    assert hosts.joined(lost) == joined + 1  # its node had been taken for dead
    assert job.starts()[-1]["num_images"] >= saved
    assert {hosts.host(pid) for pid in hosts.workers()} == {1, 2}
    job.stop()
    assert job.driver.returncode == 0
    assert [start["workers"] for start in job.starts() if start["time"] > begin] == [1, 2]
    ticks = [num_images for num_images, _, _ in numbers(job.run)]
    assert ticks == sorted(set(ticks)) and set(range(4 * BATCH, ticks[-1], 4 * BATCH)) <= set(ticks)


def test_a_job_of_fixed_size_waits_for_the_host(hosts, ranks, data, tmp_path):
    job = Job(tmp_path, data, hosts, "--num-workers", 2, "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    lost = hosts.host(job.victim(rank0=False))
    begin, joined = time.time(), hosts.joined(lost)
    hosts.cut(lost)
    time.sleep(40)  # longer than it takes to give the node up
    hosts.mend(lost)
    assert len(job.starts()) == 1
    job.wait(lambda: job.trains(2, begin))
    assert hosts.joined(lost) == joined + 1
    job.stop()
    assert_undisturbed(job.run, ranks, data, tmp_path)
