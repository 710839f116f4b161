"""A store whose files are waited for while it is away, so that a moment's outage does not end a run."""

import copy
import threading
from collections.abc import Callable
from typing import TypeVar

from ali_dist.data.parts import Away, Part, Store
from ali_dist.patience import patiently

T = TypeVar("T")


class Patient(Store):
    """Another store, waited for as long as `ali_dist.patience` says; UserError then, or when `until`'s event is set."""

    def __init__(self, store: Store) -> None:
        self.store, self.remote = store, store.remote
        self._stop, self._one = threading.Event(), threading.Lock()

    def __str__(self) -> str:
        return str(self.store)

    def read(self, name: str) -> bytes:
        return self._wait(lambda: self.store.read(name))

    def part(self, name: str, offset: int, size: int) -> Part:
        return self._wait(lambda: self.store.part(name, offset, size))

    def block(self, name: str, total: int, offset: int, size: int, sha256: str) -> bytes:
        return self._wait(lambda: self.store.block(name, total, offset, size, sha256))

    def until(self, stop: threading.Event) -> "Patient":
        same = copy.copy(self)
        same._stop = stop
        return same

    def _wait(self, read: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return read()
            except Away as error:
                if self._stop.is_set():
                    raise
                raise OSError(str(error)) from error

        try:
            return attempt()
        except OSError:
            with self._one:  # one of the threads that read says what it waits for, and how long
                return patiently(attempt, f"read data in {self}", self._stop.wait)
