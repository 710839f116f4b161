"""A metric is the same number whoever computes its chunks, and in whatever order."""

import json
import pickle

import pytest
from support import recipe
from test_distances import pixels

from ali_dist.evaluate.__main__ import main
from ali_dist.evaluate.features import FEATURES
from ali_dist.evaluate.table import METRICS
from ali_dist.evaluate.work import Chunk, Work
from ali_dist.model import untrained

NAMES = ("linear", "reconstruction", "posterior", "fd-efficientnet-lite0", "prdc-efficientnet-lite0")


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
