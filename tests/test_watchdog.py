import time

import pytest

from ali_dist import watchdog
from ali_dist.watchdog import Watchdog


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    for name, seconds in {"FIRST": 0.6, "SHORTEST": 0.2, "LOOK": 0.02}.items():
        monkeypatch.setattr(watchdog, name, seconds)


def ended(dog: Watchdog, seconds: float, ends: list) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not ends:
        time.sleep(0.01)
    return bool(ends)


def test_a_training_that_stands_still_is_ended_once():
    ends = []
    with Watchdog(lambda: ends.append(time.monotonic())) as dog:
        for _ in range(5):
            dog.beat()
        begin = time.monotonic()
        assert ended(dog, 10, ends) and ends[0] - begin > 0.2
        time.sleep(0.1)
    assert len(ends) == 1


def test_the_first_updates_may_take_longer():
    ends = []
    with Watchdog(lambda: ends.append(time.monotonic())) as dog:
        begin = time.monotonic()
        dog.beat()
        assert dog.limit == 0.6
        assert ended(dog, 10, ends) and ends[0] - begin > 0.6


def test_a_pause_may_take_any_time_and_long_updates_make_it_patient():
    ends = []
    with Watchdog(lambda: ends.append(1)) as dog:
        for _ in range(4):
            dog.beat()
        with dog.paused():
            assert not ended(dog, 0.8, ends)
        dog.beat()
        assert dog.limit == 0.2  # the pause is no update
        time.sleep(0.1)
        dog.beat()
        assert dog.limit >= watchdog.TIMES * 0.1
        assert not ended(dog, 0.5, ends)


def test_nothing_is_ended_after_the_training():
    ends = []
    with Watchdog(lambda: ends.append(1)) as dog:
        for _ in range(4):
            dog.beat()
    assert not ended(dog, 0.5, ends)
