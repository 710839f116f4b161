"""A metric is the same number whoever computes its chunks, and in whatever order."""

import json
import os
import pickle
import time

import pytest
from pixels import pixels
from support import recipe

from ali_dist.cluster import ordered_map
from ali_dist.evaluate.__main__ import main
from ali_dist.evaluate.features import FEATURES
from ali_dist.evaluate.table import METRICS
from ali_dist.evaluate.work import Chunk, Work
from ali_dist.model import untrained
from ali_dist.recipe import UserError

NAMES = (
    "linear",
    "linear-layers",
    "classes",
    "reconstruction",
    "posterior",
    "fd-efficientnet-lite0",
    "prdc-efficientnet-lite0",
)


def elsewhere(function, items):
    """The last item first, each by a copy of the function, as another process would have it."""
    found = [pickle.loads(pickle.dumps(function))(item) for item in reversed(items)]
    return reversed(found)


def test_chunks_are_the_blocks_in_order_whoever_computes_them():
    for run in (map, elsewhere):
        found = list(Work(map=run).each(bounds, 600, "held"))
        assert found == [("held", 0, 256), ("held", 256, 512), ("held", 512, 600)]
    assert list(Work().each(bounds, 0, "held")) == []
    draws = [Chunk(start, start + 1).generator().get_state().tolist() for start in (0, 0, 256)]
    assert draws[0] == draws[1] != draws[2]


def bounds(held, chunk):
    return held, chunk.start, chunk.stop


def test_numbers_do_not_depend_on_the_order_of_computing(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURES, "efficientnet-lite0", lambda work: pixels())
    model = untrained(recipe(), digits.mean_image)
    for name in NAMES:
        here, there = (
            METRICS[name](model, digits, Work(map=run, images=300, cache=tmp_path / run.__name__))
            for run in (map, elsewhere)
        )
        assert here == there, name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("ray")
def test_two_ray_workers_give_the_same_numbers(saved_run, run_command, data, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    words = ["evaluate", str(saved_run), "--data", str(data), "--images", "300"]

    def lines(workers):
        more = ["--metrics", ",".join(NAMES), "--num-workers", workers, "--cache", str(tmp_path / workers)]
        code, out, err = run_command(main, [*words, *more])
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    alone = lines("1")
    assert lines("2") == alone and len(alone) == len(NAMES)
    code, _, err = run_command(main, [*words, "--metrics", "posterior", "--num-workers", "1000"])
    assert code == 2 and "--num-workers 1000: the cluster has" in err


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_an_ordered_map_waits_for_slow_items_and_passes_errors_on(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")

    def squared(i):
        time.sleep(0.3 if i % 4 == 0 else 0)
        return i * i, os.getpid()

    def refused(i):
        raise UserError(f"shard {i} is damaged")

    with ordered_map(2) as run:
        found = list(run(squared, range(11)))
        assert [square for square, _ in found] == [i * i for i in range(11)]
        assert len({pid for _, pid in found}) == 2
        with pytest.raises(UserError, match="shard 0 is damaged"):
            list(run(refused, range(4)))
        assert list(run(str, [1, 2, 3])) == ["1", "2", "3"]  # another function by the same actors
