"""The draw of labelled images, and batches of labelled and other images."""

from itertools import islice

import numpy as np
import pytest
import torch
from numbered import numbers, prepare

from ali_dist.data.labelled import SemiSupervised, balanced_draw, draw
from ali_dist.data.stream import Stream
from ali_dist.recipe import UserError

MICRO, LABELLED, SEED = 30, 12, 3


def test_draws_hold_each_class_alike(index):
    drawn = draw(index, "train", 50, seed=1)
    assert np.bincount(drawn.y).tolist() == [5] * 10
    assert len(set(drawn.places.tolist())) == 50 and (drawn.places.diff() > 0).all()
    # Image i of the data set carries its number and has the class i % 10
    found = numbers(drawn.x)
    assert (found % 10 == drawn.y.numpy()).all() and len(set(found)) == 50
    again, other = draw(index, "train", 50, seed=1), draw(index, "train", 50, seed=2)
    assert torch.equal(drawn.x, again.x) and drawn.to_json() == again.to_json()
    assert len(set(other.places.tolist()) & set(drawn.places.tolist())) < 10
    assert drawn.to_json() == {"images": drawn.places.tolist(), "classes": drawn.y.tolist()}


def test_places_are_the_stored_order(index):
    from ali_dist.data.stream import validation

    stored = torch.cat([batch.x for batch in validation(index, "train", count=5003, batch_size=500)])
    drawn = draw(index, "train", 100, seed=0)
    assert torch.equal(stored[drawn.places], drawn.x)
    of_valid = draw(index, "valid", 20, seed=0)
    assert of_valid.places.max() < 301


def test_more_labels_than_images_are_refused(index):
    with pytest.raises(UserError, match="class 1 has 30 training images, fewer than the 31 to draw"):
        draw(index, "valid", 310, seed=0)
    y = np.repeat(np.arange(3), 4)
    assert sorted(balanced_draw(y, 4, seed=0)) == list(range(12))


def batches(index, count, *, world=1, num_images=0, seed=SEED, drawn=None):
    """The first batches, put together from all ranks: x [count, MICRO, ...] and y [count, MICRO]."""
    drawn = drawn or draw(index, "train", 50, seed=1)
    x, y = torch.zeros(count, MICRO, *index.shape, dtype=torch.uint8), torch.full((count, MICRO), -9)
    for rank in range(world):
        place = {"rank": rank, "world": world}
        unlabelled = MICRO - LABELLED
        start = num_images // MICRO * unlabelled
        stream = Stream(index, "train", seed=seed, lanes=6, micro_batch=unlabelled, num_images=start, **place)
        order = {"seed": seed, "micro_batch": MICRO, "labelled": LABELLED, "num_images": num_images}
        with SemiSupervised(stream, drawn, **order, **place) as mixed:
            for t in range(count):
                batch = next(mixed)
                assert batch.size == MICRO and torch.all(batch.rows[1:] > batch.rows[:-1])
                assert (y[t, batch.rows] == -9).all()
                x[t, batch.rows], y[t, batch.rows] = batch.x, batch.y
    assert (y > -9).all()
    return x, y


def test_first_rows_are_the_streams_and_have_no_class(index):
    x, y = batches(index, 10)
    assert (y[:, : MICRO - LABELLED] == -1).all() and (y[:, MICRO - LABELLED :] >= 0).all()
    with Stream(index, "train", seed=SEED, lanes=6, micro_batch=MICRO - LABELLED) as stream:
        for mine, batch in zip(x, islice(stream, 10), strict=True):
            assert torch.equal(mine[: MICRO - LABELLED], batch.x)
    assert (numbers(x[0, MICRO - LABELLED :]) % 10 == y[0, MICRO - LABELLED :].numpy()).all()


def test_labelled_images_come_in_random_rounds(index):
    drawn = draw(index, "train", 50, seed=1)
    x, _ = batches(index, 25, drawn=drawn)  # 300 labelled images: 6 rounds
    rounds = numbers(x[:, MICRO - LABELLED :].flatten(0, 1)).reshape(6, 50)
    assert all(sorted(one) == sorted(numbers(drawn.x)) for one in rounds)
    assert all((a != b).mean() > 0.8 for a, b in zip(rounds, rounds[1:], strict=False))
    other, _ = batches(index, 5, seed=SEED + 1, drawn=drawn)
    assert not torch.equal(other[:, MICRO - LABELLED :], x[:5, MICRO - LABELLED :])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_the_batches_of_one(index, world):
    for mine, alone in zip(batches(index, 8, world=world), batches(index, 8), strict=True):
        assert torch.equal(mine, alone)


def test_resumes_at_any_batch(index):
    x, y = batches(index, 20)
    for at in (1, 4, 13):
        later = batches(index, 7, num_images=at * MICRO, world=2)
        assert torch.equal(later[0], x[at : at + 7]) and torch.equal(later[1], y[at : at + 7])


def test_labelled_images_alone(tmp_path):
    index = prepare(tmp_path, train=300, valid=20)
    drawn = draw(index, "train", 20, seed=0)
    with SemiSupervised(None, drawn, seed=0, micro_batch=8, labelled=8) as mixed:
        seen = [next(mixed) for _ in range(5)]
        assert mixed.wait_seconds == 0
    assert all(batch.rows.tolist() == list(range(8)) and (batch.y >= 0).all() for batch in seen)
    numbers_seen = numbers(torch.cat([batch.x for batch in seen]))
    assert sorted(numbers_seen[:20]) == sorted(numbers(drawn.x)) == sorted(numbers_seen[20:])


def test_leaving_closes_the_stream(index):
    stream = Stream(index, "train", seed=0, lanes=4, micro_batch=4)
    with SemiSupervised(stream, draw(index, "train", 10, seed=0), seed=0, micro_batch=8, labelled=4) as mixed:
        next(mixed)
        assert mixed.wait_seconds == stream.wait_seconds > 0
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)
