"""Work shared out over processes of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from ali_dist.recipe import UserError

T, R = TypeVar("T"), TypeVar("R")

_function: Callable[[Any], Any] | None = None


def map_processes(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """`function(item)` for all items, in any order; the function is sent once to each of at most `workers` processes.

    What it raises ends all; UserError when a process dies.
    """
    # Spawned, since threads of this process would not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)) or 1, context, _start, (function,)) as pool:
        try:
            for future in as_completed([pool.submit(_call, item) for item in items]):
                yield future.result()
        except BrokenProcessPool:
            message = "a worker process was killed, perhaps for want of memory: fewer --workers need less"
            raise UserError(f"{message}; the same command goes on where this one ended") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    """First in each process: it keeps the function, leaves Ctrl-C to its parent, and dies when that does."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
