"""Ends a process whose training stands still, so that what supervises it starts it again from the last checkpoint.

Ray finds processes that are dead or stopped as a whole within seconds. This is for those that live but hang: a
collective that never ends, a driver that never answers.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ali_dist import patience

log = logging.getLogger(__name__)

FIRST = 1800.0  # seconds that the first of its kind may take: compilation is among them
SHORTEST = 2 * patience.SECONDS_OF_PATIENCE  # an update may have to wait for any rank that waits for data or storage
TIMES = 20  # as long as the longest of its kind so far may an update, a validation, ... take
WARM_UP = 2  # updates that count as first
LOOK = 1.0  # seconds between looks
UPDATE = "update"


def end_process() -> None:
    faulthandler.dump_traceback(sys.__stderr__)
    os._exit(1)


class Watchdog:
    """A context in which `beat` must be called again and again, except while `paused`.

    `during` says that what goes on is no update; each kind is held to its own longest time.
    """

    def __init__(self, end: Callable[[], None] = end_process) -> None:
        self._end, self._done = end, threading.Event()
        self._longest: dict[str, float] = {}  # by kind, of those after the first
        self._updates = 0
        # What goes on and since when, in one: the thread that watches must never see one without the other
        self._now: tuple[str, float] | None = (UPDATE, time.monotonic())

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self) -> None:
        """The end of an update."""
        self._updates += 1
        if self._updates > WARM_UP:
            self._note(UPDATE)
        self._now = (UPDATE, time.monotonic())

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Around what is no update, as a validation."""
        self._now = (kind, time.monotonic())
        yield
        self._note(kind)
        self._now = (UPDATE, time.monotonic())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what has a patience of its own: saving, or waiting for the rank that does."""
        self._now = None
        yield
        self._now = (UPDATE, time.monotonic())

    def limit(self, kind: str = UPDATE) -> float:
        """Seconds after which one of this kind counts as hanging."""
        return max(SHORTEST, TIMES * self._longest[kind]) if kind in self._longest else FIRST

    def _note(self, kind: str) -> None:
        _, begin = self._now
        self._longest[kind] = max(self._longest.get(kind, 0.0), time.monotonic() - begin)

    def _watch(self) -> None:
        looked = awake = time.monotonic()
        while not self._done.wait(LOOK):
            seen, now = self._now, time.monotonic()
            if now - looked > 10 * LOOK:  # this thread stood still too: the process was stopped
                awake = now
            looked = now
            if seen is None:
                continue
            kind, seconds = seen[0], now - max(seen[1], awake)
            if seconds > self.limit(kind):
                longest = self._longest.get(kind, 0.0)
                log.error(f"no end of the {kind} for {seconds:,.0f} s, the longest took {longest:,.1f} s: ending")
                self._end()
                return
