"""What of a cluster each worker gets, and what is waited for."""

import pytest

from ali_dist import room
from ali_dist.recipe import Job, UserError

NODE_OF_8_GPUS = {"CPU": 96.0, "GPU": 8.0}


@pytest.mark.parametrize(
    "job, nodes, resources",
    [
        (Job(num_workers=2), [{"CPU": 8.0}], {"CPU": 4}),
        (Job(num_workers=3), [{"CPU": 2.0}], {"CPU": 1}),
        # By the cluster's sum these would be 2 CPUs, which no node has
        (Job(num_workers=1), [{"CPU": 1.0}] * 2, {"CPU": 1}),
        (Job(num_workers=3), [{"CPU": 3.0}] * 2, {"CPU": 1}),
        (Job(num_workers=4), [{"CPU": 8.0}, {"CPU": 5.0}, {}], {"CPU": 2}),
        (Job(num_workers=2, cpus_per_worker=3), [{"CPU": 8.0}], {"CPU": 3}),
        (Job(num_workers=2), [{"CPU": 8.0, "GPU": 2.0}], {"CPU": 4, "GPU": 1}),
        (Job(num_workers=2, gpu=False), [{"CPU": 8.0, "GPU": 2.0}], {"CPU": 4}),
        # CPUs of a head without GPUs are nothing to workers with one, nor are those that belong to other GPUs
        (Job(num_workers=8), [{"CPU": 64.0}, NODE_OF_8_GPUS], {"CPU": 12, "GPU": 1}),
        (Job(num_workers=1), [{"CPU": 64.0}, NODE_OF_8_GPUS], {"CPU": 12, "GPU": 1}),
        (Job(num_workers=8), [NODE_OF_8_GPUS, {"CPU": 4.0, "GPU": 1.0}], {"CPU": 12, "GPU": 1}),
        (Job(num_workers=9), [NODE_OF_8_GPUS, {"CPU": 4.0, "GPU": 1.0}], {"CPU": 4, "GPU": 1}),
        (Job(min_workers=1, num_workers=16), [NODE_OF_8_GPUS], {"CPU": 12, "GPU": 1}),
        (Job(gpu=True), [{"CPU": 8.0}], {"CPU": 1, "GPU": 1}),  # to be waited for, whatever CPUs it will come with
        (Job(num_workers=4), [], {"CPU": 1}),
    ],
)
def test_resources_of_a_worker(job, nodes, resources):
    assert room.worker_resources(job, nodes) == resources
    wanted = min(job.num_workers, room.workers_on(nodes, {**resources, "CPU": 1}))
    assert job.cpus_per_worker or room.workers_on(nodes, resources) >= wanted


@pytest.fixture
def cluster(monkeypatch):
    """Resources of each node, of what is free there, and what the autoscaler was asked for."""
    nodes, free, asked = [], [], []
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 64.0}}
    monkeypatch.setattr("ray.nodes", lambda: [dead, *({"Alive": True, "Resources": node} for node in nodes)])
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: dict(enumerate(free or nodes)))
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)
    return nodes, free, asked


def test_an_autoscaler_is_asked_for_what_is_missing_and_released(cluster, monkeypatch, capsys):
    """A cluster whose autoscaler brings a node of 4 CPUs and 2 GPUs each time it is asked, here twice."""
    nodes, _, asked = cluster

    def request_resources(bundles):
        asked.append(bundles)
        if bundles:
            nodes.append({"CPU": 4.0, "GPU": 2.0})

    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", request_resources)
    found = room.wait_for_room(Job(num_workers=4, gpu=True, cpus_per_worker=2))
    assert found == {"CPU": 2, "GPU": 1}
    assert asked == [[{"CPU": 2, "GPU": 1}] * 4] * 2 + [[]]
    assert "waiting" in capsys.readouterr().out
    asked.clear()
    del nodes[1:]
    with pytest.raises(UserError, match=r"too small .* 8 CPUs \(it has 4\) and 4 GPUs \(it has 2\)"):
        room.wait_for_room(Job(num_workers=4, gpu=True, cpus_per_worker=2, wait_seconds=0))
    assert asked[-1] == []


def test_workers_larger_than_every_node_are_an_error_and_not_waited_for_ever(cluster):
    nodes, _, asked = cluster
    nodes += [{"CPU": 3.0}] * 4
    with pytest.raises(UserError, match="3 workers: they need 4 CPUs each, which only 0 find on a node"):
        room.wait_for_room(Job(num_workers=3, cpus_per_worker=4, wait_seconds=0))
    assert asked[-1] == []


def test_a_line_says_that_workers_wait_for_other_jobs(cluster, capsys):
    nodes, free, _ = cluster
    nodes += [{"CPU": 4.0}] * 2
    assert room.wait_for_room(Job(num_workers=2)) == {"CPU": 4}
    assert capsys.readouterr().out == ""
    free += [{"CPU": 4.0}, {"CPU": 3.0}]
    assert room.wait_for_room(Job(num_workers=2)) == {"CPU": 4}
    assert "room for 1 of 2 workers" in capsys.readouterr().out
