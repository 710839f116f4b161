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

log = logging.getLogger(__name__)

FIRST = 1800.0  # seconds that the first updates may take: compilation is among them
SHORTEST = 600.0  # longer than rank 0 waits for storage
TIMES = 20  # as long as the longest update so far may an update take
LOOK = 1.0  # seconds between looks


def end_process() -> None:
    faulthandler.dump_traceback(sys.__stderr__)
    os._exit(1)


class Watchdog:
    """A context in which `beat` must be called again and again, except while `paused`."""

    def __init__(self, end: Callable[[], None] = end_process) -> None:
        self._end, self._done = end, threading.Event()
        self._beats, self._longest = 0, 0.0
        self._last: float | None = time.monotonic()  # None: paused

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self) -> None:
        """The end of an update."""
        now = time.monotonic()
        if self._last is not None and self._beats > 1:
            self._longest = max(self._longest, now - self._last)
        self._beats, self._last = self._beats + 1, now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take any time, as saving to a slow storage, or waiting for the rank that does."""
        self._last = None
        yield
        self._last = time.monotonic()

    @property
    def limit(self) -> float:
        """Seconds after which an update counts as hanging."""
        return max(SHORTEST, TIMES * self._longest) if self._beats > 2 else FIRST

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(LOOK):
            now, last = time.monotonic(), self._last
            if now - looked > 10 * LOOK and last is not None:  # this thread stood still too: the process was stopped
                self._last = last = now
            looked = now
            if last is not None and now - last > self.limit:
                log.error(f"no update for {now - last:,.0f} s, the longest took {self._longest:,.1f} s: ending")
                self._end()
                return
