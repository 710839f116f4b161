"""Faults of whole processes and nodes on a Ray cluster of several nodes of this machine."""

import json
import time
from pathlib import Path

import pytest

from ali_dist import worker
from ali_dist.bench.faults import BATCH, Job, kill_worker, lose_node, stop_worker, suffer
from ali_dist.bench.nodes import Nodes
from ali_dist.recipe import Job as JobSettings
from ali_dist.recipes import RECIPES
from ali_dist.run import RunFolder, count_restarts, read_lines

MINUTES = 60.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * MINUTES), pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    nodes = Nodes(tmp_path_factory.mktemp("nodes"), 3)
    yield nodes
    nodes.close()


def two_ranks_to(rank: int, data: Path, storage: Path, num_images: int, job: list[str]) -> int:
    """What the job of `bench.faults` trains, without Ray and undisturbed."""
    tree = RECIPES["digits"].to_json()
    tree["schedule"] |= {"num_images": num_images, "tick_images": 4 * BATCH, "save_images": 16 * BATCH}
    tree["schedule"] |= {"sample_images": 10**9, "validate_images": 10**9, "keep": 10**6}
    settings = type(RECIPES["digits"]).from_json(tree)
    worker.train_rank(settings, JobSettings(name="run", data=str(data), storage=str(storage), num_workers=2), gpu=False)
    return rank


def newest(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.saved()[-1].glob("*.safetensors")}


def numbers(run: RunFolder) -> list[tuple]:
    lines = [json.loads(line) for line in run.ticks.read_text().splitlines()]
    return [(line["num_images"], line["loss/d"], line["loss/g"]) for line in lines if "loss/d" in line]


def test_after_each_fault_the_run_goes_on_as_if_undisturbed(nodes, ranks, data, tmp_path):
    """One after the other: a killed rank 0, a hanging worker, a lost node, a killed driver with torn snapshots."""
    job = Job(tmp_path, str(data), nodes, "--num-workers", 2, "--num-images", 10**9)
    trains = lambda: job.trains(2) and bool(job.run.saved())  # noqa: E731
    job.wait(trains)
    for fault, rank0 in ((kill_worker, True), (stop_worker, False), (lambda *a: lose_node(*a) + 1, False)):
        assert suffer(job, fault, rank0)["images_lost"] == 0
        job.wait(trains)
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
    job.stop()
    assert job.driver.returncode == 0, (tmp_path / "job.log").read_text()
    events = read_lines(job.run.events)
    assert count_restarts(events) == 4 and events[-1]["event"] == "end"
    assert not job.run.ray.exists() and not list(job.run.checkpoints.glob(".*"))

    num_images = int(job.run.saved()[-1].name)
    ranks.run(2, two_ranks_to, data, tmp_path / "undisturbed", num_images, [])
    undisturbed = RunFolder(tmp_path / "undisturbed" / "run")
    assert newest(job.run) == newest(undisturbed)
    whole = num_images // (4 * BATCH)  # the last tick is where the run was stopped
    assert numbers(job.run)[:whole] == numbers(undisturbed)[:whole]


def test_an_elastic_job_gives_up_drained_nodes_and_takes_new_ones(nodes, data, tmp_path):
    while len(nodes.nodes) > 2:
        nodes.remove(nodes.nodes[-1])
    while len(nodes.nodes) < 2:
        nodes.add()
    job = Job(tmp_path, str(data), nodes, "--num-workers", "1:2", "--num-images", 10**9)
    job.wait(lambda: job.trains(2) and bool(job.run.saved()))
    drained = nodes.nodes[-1]
    nodes.drain(drained, 20)
    job.wait(lambda: job.trains(1))
    nodes.remove(drained)
    nodes.add()
    job.wait(lambda: job.trains(2, job.starts()[-1]["time"]) or job.trains(2))
    job.stop()
    events = [line for line in read_lines(job.run.events) if line["event"] in ("start", "end")]
    assert [line.get("workers") for line in events if line["event"] == "start"] == [2, 1, 2]
    # Each time they have saved at that very update and gone on from there
    assert [line["event"] for line in events] == ["start", "end"] * 3
    for end, start in zip(events[1::2], events[2::2], strict=False):
        assert end["num_images"] == start["num_images"] > 0
    ticks = [n for n, _, _ in numbers(job.run)]
    assert ticks == sorted(set(ticks)) and set(range(4 * BATCH, ticks[-1], 4 * BATCH)) <= set(ticks)
