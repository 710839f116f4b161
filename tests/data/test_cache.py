"""The cache of a host: bounded, shared, and never trusted."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from numbered import prepare
from servers import running
from test_store import take

from ali_dist.data.index import load_index
from ali_dist.data.shards import verify
from ali_dist.recipe import UserError

WORKER = """
import sys
from itertools import islice
from pathlib import Path
from ali_dist.data.index import load_index
from ali_dist.data.stream import Stream
address, cache, bound, rank, batches = sys.argv[1:]
index = load_index(address, "numbered", cache=Path(cache), cache_bytes=int(bound))
with Stream(index, "train", seed=3, lanes=24, micro_batch=100, rank=int(rank), world=2) as stream:
    for batch in islice(stream, int(batches)):
        print(batch.rows.tolist(), batch.y.tolist(), flush=True)
"""


@pytest.fixture
def server(index):
    with running() as server:
        server.put(index.store.path.parent, "/sets/")
        yield server


def kept(cache):
    return [path for path in cache.glob("*/*") if path.is_file()]


def blocks(index):
    return sum(len(shard.blocks) for shards in index.splits.values() for shard in shards)


def cached(server, cache, bound=10**9):
    return load_index(f"{server.address}/sets", "numbered", cache=cache, cache_bytes=bound)


def test_each_block_is_fetched_once(index, server, tmp_path):
    remote = cached(server, tmp_path)
    assert (take(remote, 120) == take(index, 120)).all()
    asked = [request for request in server.requests if request[0].endswith(".tar")]
    again = cached(server, tmp_path)
    assert (take(again, 120) == take(index, 120)).all()
    assert [request for request in server.requests if request[0].endswith(".tar")] == asked
    assert len(kept(tmp_path)) == sum(len(shard.blocks) for shard in index.shards("train"))


def test_the_bound_holds_and_the_rest_is_still_read(index, server, tmp_path):
    size = index.shards("train")[0].blocks[0].bytes
    bound = 7 * size + size // 2
    remote = cached(server, tmp_path, bound)
    assert (take(remote, 120) == take(index, 120)).all()
    assert len(kept(tmp_path)) == 7
    assert sum(path.stat().st_size for path in kept(tmp_path)) <= bound


def test_another_set_makes_room_oldest_first(index, server, tmp_path):
    other = prepare(tmp_path / "other", train=2560)
    with running() as second:
        second.put(other.store.path.parent, "/sets/")
        take(cached(second, tmp_path / "cache"), 30)
    before = {path: path.stat().st_mtime_ns for path in kept(tmp_path / "cache")}
    assert len(before) == 10
    for age, path in enumerate(before):
        os.utime(path, (time.time() - age, time.time() - age))
    oldest = set(list(before)[-4:])
    size = index.shards("train")[0].blocks[0].bytes
    remote = cached(server, tmp_path / "cache", sum(path.stat().st_size for path in before) + size // 2)
    plan = [block for shard in remote.shards("train") for block in shard.blocks][:4]
    for block in plan:
        remote.store.block("train-000000.tar", remote.shards("train")[0].bytes, *block)
    assert oldest == {path for path in before if not path.exists()}


def test_damage_in_the_cache_is_mended(index, server, tmp_path):
    take(cached(server, tmp_path))
    for path in kept(tmp_path)[:5]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    kept(tmp_path)[6].write_bytes(b"")
    assert (take(cached(server, tmp_path)) == take(index)).all()
    verify(cached(server, tmp_path))


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write to --cache .*file"):
        cached(server, tmp_path / "file")


def test_two_processes_share_it_and_one_is_killed(index, server, tmp_path):
    """kill -9 in the middle of filling the cache; another takes its place, beside one that goes on."""
    expected = take(index, 100)
    bound = 12 * index.shards("train")[0].blocks[0].bytes

    def start(rank):
        words = [sys.executable, "-c", WORKER, f"{server.address}/sets", tmp_path, bound, rank, 100]
        return subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True)

    def check(process, rank):
        for t, line in enumerate(process.stdout):
            rows, y = (np.fromstring(part.strip(" [\n"), sep=",", dtype=int) for part in line.split("]")[:2])
            assert np.array_equal(y, expected[t, rows] % 10)
        assert (t, process.wait()) == (99, 0)

    def slow(handler):
        time.sleep(0.05)
        handler.answer(handler.server.files[handler.path])

    server.faults += [slow] * 40
    first, second = start(0), start(1)
    while len(kept(tmp_path)) < 3:
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    left = tmp_path / next(tmp_path.glob("*/")).name / ".half-written"
    left.write_bytes(b"x" * 100)
    third = start(0)
    check(second, 1)
    check(third, 0)
    assert not left.exists()
    assert sum(path.stat().st_size for path in kept(tmp_path)) <= bound
