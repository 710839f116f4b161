"""A run whose storage is a folder that hosts have over the network, as with NFS: see hosts.py."""

import os
import signal
import time
from pathlib import Path

import pytest
from hosts import Hosts, why_not, why_not_serve
from undisturbed import assert_undisturbed

from ali_dist import checkpoint
from ali_dist.bench.job import Job
from ali_dist.bench.nodes import kill

pytestmark = [pytest.mark.soak, pytest.mark.timeout(360), pytest.mark.xdist_group("nodes")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the job; its storage lies in `store`."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "store").mkdir()
    return folder


@pytest.fixture(scope="module")
def hosts(tmp_path_factory, folder):
    if reason := why_not() or why_not_serve():
        pytest.skip(reason)
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), 2, served=folder / "store")
    yield hosts
    hosts.close()


def device(pid: int, path: Path) -> int:
    """The file system that a process finds a path on."""
    return os.stat(f"/proc/{pid}/root{path}").st_dev


def test_storage_over_the_network(hosts, folder, ranks, data, tmp_path):
    """It stops to answer, workers die, then the host of rank 0 is lost, and with it what only it had seen."""
    job = Job(folder, data, hosts, "--num-workers", 2, "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    seen = {device(pid, job.storage) for pid in hosts.workers()}
    assert len(seen) == 2 and os.stat(job.storage).st_dev not in seen  # each host has a mount of its own

    hosts.serve(False)
    time.sleep(3)
    silent = job.ticks()[-1]["num_images"]
    time.sleep(12)  # longer than a worker may be silent
    assert job.ticks()[-1]["num_images"] == silent
    hosts.serve(True)
    job.wait(lambda: job.ticks()[-1]["num_images"] > silent)
    assert len(job.starts()) == 1

    for rank0 in (True, False):
        saved, begin = int(job.run.saved()[-1].name), time.time()
        kill(job.victim(rank0), signal.SIGKILL)
        job.wait(lambda: job.trains(2, begin))  # noqa: B023, called here
        assert job.starts()[-1]["num_images"] >= saved

    lost = hosts.host(job.victim(rank0=True))
    saved, begin = int(job.run.saved()[-1].name), time.time()
    hosts.cut(lost)
    time.sleep(15)
    hosts.mend(lost)
    job.wait(lambda: job.trains(2, begin))
    assert job.starts()[-1]["num_images"] >= saved
    job.stop()
    assert job.driver.returncode == 0
    for path in job.run.saved():
        checkpoint.verify(path)
    assert_undisturbed(job.run, ranks, data, tmp_path)
