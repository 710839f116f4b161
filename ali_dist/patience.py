"""Waiting for storage that is full or out of reach: a run is longer than most such troubles."""

import itertools
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ali_dist.recipe import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
SECONDS_OF_PATIENCE = 300.0
LONGEST_PAUSE = 15.0


def patiently(action: Callable[[], T], what: str, sleep: Callable[[float], object] = time.sleep) -> T:
    """What `action` returns, tried again after each OSError with growing pauses; UserError after SECONDS_OF_PATIENCE.

    `action` must be one that may be done twice. `what` says what it does, as in "can't {what}".
    """
    begin = time.monotonic()
    for attempt in itertools.count():
        try:
            result = action()
        except OSError as error:
            left = begin + SECONDS_OF_PATIENCE - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"can't {what} for {SECONDS_OF_PATIENCE:,.0f} s ({error}): make room or bring the storage back, "
                    "and start the same command again: it goes on from the last checkpoint"
                ) from error
            if not attempt:
                log.warning(f"can't {what} ({error}): trying again for {left:,.0f} s")
            sleep(min(0.5 * 2**attempt, LONGEST_PAUSE, left))
        else:
            if attempt:
                log.warning(f"could {what} after {time.monotonic() - begin:,.1f} s")
            return result
