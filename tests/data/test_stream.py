import gc
import itertools
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from numbered import numbers, prepare

from ali_dist.data.stream import Stream, order_of, shares, validation
from ali_dist.recipe import UserError

ORDER = {"seed": 3, "lanes": 24}
GOLDEN = [[3039, 917, 1479, 3770, 1127, 202], [1841, 1033, 3137, 666, 464, 2181]]


def take(index, count, *, split="train", micro_batch=100, world=1, num_images=0, **order):
    """The first `count` batches, rows of all ranks put together: image numbers int64 [count, micro_batch]."""
    order = {**ORDER, **order}
    total = np.full((count, micro_batch), -1)
    for rank in range(world):
        with Stream(
            index, split, micro_batch=micro_batch, rank=rank, world=world, num_images=num_images, **order
        ) as stream:
            for t, batch in enumerate(islice(stream, count)):
                assert batch.size == micro_batch and torch.all(batch.rows[1:] > batch.rows[:-1])
                assert (total[t, batch.rows.numpy()] == -1).all()
                total[t, batch.rows.numpy()] = numbers(batch.x)
                assert torch.equal(batch.y, torch.from_numpy(total[t, batch.rows.numpy()] % 10))
    assert (total >= 0).all()
    return total


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 5, 24])
def test_each_image_once_an_epoch(index, lanes, world):
    n = index.images("train")
    sequence = take(index, 3 * n // 97 + 1, micro_batch=97, lanes=lanes, world=world).ravel()
    epochs = sequence[: 3 * n].reshape(3, n)
    assert (np.sort(epochs) == np.arange(n)).all()
    assert (epochs[0] != epochs[1]).mean() > 0.9 and (epochs[1] != epochs[2]).mean() > 0.9


@pytest.mark.parametrize("n", [1, 7, 255, 256, 257, 2048, 2049])
def test_any_number_of_images(tmp_path, n):
    index = prepare(tmp_path, train=n)
    sequence = take(index, -(-3 * n // 64), micro_batch=64, world=2).ravel()[: 3 * n].reshape(3, n)
    assert (np.sort(sequence) == np.arange(n)).all()


@pytest.mark.parametrize("world", [2, 3, 5, 24, 30])
def test_ranks_share_out_the_batches_of_one(index, world):
    assert (take(index, 60, world=world) == take(index, 60)).all()


@pytest.mark.parametrize("lanes", [7, 24])
@pytest.mark.parametrize("at", [1, 100, 2500, 5002, 5003, 5004, 5100, 12_345])
def test_resumes_anywhere(index, at, lanes):
    whole = take(index, at // 100 + 60, lanes=lanes).ravel()[at : at + 5000]
    assert (take(index, 50, lanes=lanes, num_images=at, world=2).ravel() == whole).all()


def test_resumed_tensors_are_equal_bit_for_bit(index):
    with Stream(index, "train", micro_batch=64, **ORDER) as stream:
        later = list(islice(stream, 90, 95))
    with Stream(index, "train", micro_batch=64, num_images=90 * 64, **ORDER) as stream:
        for one, other in zip(later, stream, strict=False):
            assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y) and torch.equal(one.rows, other.rows)
            assert one.x.dtype == torch.uint8 and one.y.dtype == one.rows.dtype == torch.int64


def test_order_depends_on_seed_and_lanes(index):
    orders = [take(index, 10), take(index, 10, seed=4), take(index, 10, lanes=23)]
    assert all((a != b).mean() > 0.9 for a, b in itertools.combinations(orders, 2))


def test_order_is_the_one_that_runs_were_started_with(index):
    """A change here changes what every resumed run sees next."""
    assert take(index, 1, micro_batch=6).tolist() == GOLDEN[:1]
    assert take(index, 1, micro_batch=6, num_images=5003).tolist() == GOLDEN[1:]


@pytest.mark.parametrize("lanes", [1, 5, 24])
def test_order_of_is_what_the_stream_gives(index, lanes):
    n = index.images("train")
    stored = np.concatenate([numbers(batch.x) for batch in validation(index, "train", count=n, batch_size=1000)])
    sequence = take(index, 3 * n // 100 + 1, lanes=lanes).ravel()[: 3 * n].reshape(3, n)
    for epoch in (0, 2):
        assert (stored[order_of(index, "train", seed=3, lanes=lanes, epoch=epoch)] == sequence[epoch]).all()


@pytest.mark.parametrize(("micro_batch", "lanes", "world"), [(100, 24, 8), (100, 24, 7), (30, 24, 5), (12, 24, 24)])
def test_shares_is_the_smallest_that_occurs(index, micro_batch, lanes, world):
    smallest = micro_batch
    for rank in range(world):
        for first in range(lanes):
            lane = (first + np.arange(micro_batch)) % lanes
            smallest = min(smallest, int((lane % world == rank).sum()))
    assert shares(micro_batch, lanes, world) == smallest


def test_shares_counts_what_a_stream_gives(index):
    sizes = []
    for rank in range(5):
        with Stream(index, "train", micro_batch=29, rank=rank, world=5, **ORDER) as stream:
            sizes += [len(batch.y) for batch in islice(stream, 24)]
    assert shares(29, 24, 5) == min(sizes) > 0
    assert shares(12, 24, 24) == 0 and shares(100, 4, 5) == 0


@pytest.mark.parametrize("world", [1, 2, 4])
def test_validation_is_the_stored_order(index, world):
    for count, expected in [(300, 300), (301, 301), (5000, 301), (3, 3)]:
        found = np.full(expected, -1)
        for rank in range(world):
            batches = list(validation(index, "valid", count=count, batch_size=100, rank=rank, world=world))
            assert [batch.size for batch in batches] == [min(100, expected - at) for at in range(0, expected, 100)]
            for t, batch in enumerate(batches):
                assert batch.x.shape == (len(batch.y), *index.shape)
                found[100 * t + batch.rows.numpy()] = numbers(batch.x)
        assert (found == np.arange(expected)).all()


def test_unknown_and_empty_splits(index, tmp_path):
    with pytest.raises(UserError, match="no split 'test': it has train, valid"):
        Stream(index, "test", micro_batch=8, **ORDER)
    with pytest.raises(UserError, match="no split 'test'"):
        next(validation(index, "test", count=1, batch_size=1))
    with pytest.raises(UserError, match="has no images"):
        Stream(prepare(tmp_path, train=300, valid=0), "valid", micro_batch=8, **ORDER)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "ali_dist.data"]


def test_close_joins_the_thread(index):
    stream = Stream(index, "train", micro_batch=8, prefetch=1, **ORDER)
    next(stream)
    assert len(threads()) == 1
    stream.close()
    assert not threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
    stream.close()


def test_a_forgotten_stream_ends_its_thread(index):
    next(Stream(index, "train", micro_batch=8, **ORDER))
    gc.collect()
    assert not threads()


def test_leaving_the_interpreter_with_a_stream_open(index):
    code = (
        "import sys; from pathlib import Path; from ali_dist.data.index import load_index;"
        "from ali_dist.data.stream import Stream;"
        "stream = Stream(load_index(Path(sys.argv[1]), 'numbered'), 'train', seed=0, lanes=4, micro_batch=8);"
        "next(stream)"
    )
    done = subprocess.run([sys.executable, "-c", code, index.store.path.parent], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_wait_seconds_counts_waiting_alone(index):
    with Stream(index, "train", micro_batch=8, **ORDER) as stream:
        assert stream.wait_seconds == 0
        next(stream)
        first = stream.wait_seconds
        assert first > 0
        time.sleep(0.3)
        next(stream)
        assert stream.wait_seconds - first < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_hold_the_same_images(index):
    with (
        Stream(index, "train", micro_batch=64, pin=True, **ORDER) as pinned,
        Stream(index, "train", micro_batch=64, **ORDER) as plain,
    ):
        for one, other in zip(islice(pinned, 50), plain, strict=False):
            assert one.x.is_pinned() and torch.equal(one.x.to("cuda", non_blocking=True).cpu(), other.x)
