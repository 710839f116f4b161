import time
from types import SimpleNamespace

import pytest

from ali_dist import patience, watchdog
from ali_dist.watchdog import Watchdog

ABOVE_PATIENCE = watchdog.SHORTEST  # before it is hurried


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
        assert dog.limit() == 0.6
        assert ended(dog, 10, ends) and ends[0] - begin > 0.6


def test_a_pause_may_take_any_time_and_long_updates_make_it_patient():
    ends = []
    with Watchdog(lambda: ends.append(1)) as dog:
        for _ in range(4):
            dog.beat()
        with dog.paused():
            assert not ended(dog, 0.8, ends)
        dog.beat()
        assert dog.limit() == 0.2  # the pause is no update
        time.sleep(0.1)
        dog.beat()
        assert dog.limit() >= watchdog.TIMES * 0.1
        assert not ended(dog, 0.5, ends)


def test_nothing_is_ended_after_the_training():
    ends = []
    with Watchdog(lambda: ends.append(1)) as dog:
        for _ in range(4):
            dog.beat()
    assert not ended(dog, 0.5, ends)


def test_each_kind_has_a_limit_of_its_own_times(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(watchdog, "SHORTEST", 1.0)
    dog = Watchdog()
    for seconds in (500, 400, 0.01):  # the first two compile
        clock.now += seconds
        dog.beat()
    assert dog.limit() == 1.0 and dog.limit("validation") == watchdog.FIRST
    with dog.during("validation"):
        clock.now += 30
    assert dog.limit("validation") == pytest.approx(20 * 30) and dog.limit() == 1.0
    with dog.paused():
        clock.now += 1000
    clock.now += 0.2
    dog.beat()
    assert dog.limit() == pytest.approx(20 * 0.2) and dog.limit("drawing") == watchdog.FIRST


def test_a_validation_that_hangs_is_ended():
    ends = []
    with Watchdog(lambda: ends.append(1)) as dog:
        for _ in range(4):
            dog.beat()
        with dog.during("validation"):
            time.sleep(0.05)
        with dog.during("validation"):
            assert not ended(dog, 0.5, ends)  # 20 times as long as the one before may it take
            assert ended(dog, 10, ends)


def test_a_wait_that_patience_covers_is_no_hang():
    assert ABOVE_PATIENCE > patience.SECONDS_OF_PATIENCE
