"""How far a long task is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections import deque

BAR = 24  # characters
TERMINAL_SECONDS, LOG_SECONDS = 0.1, 30.0  # between lines
WINDOW = 60.0  # seconds over which speed is measured


class Progress:
    """Call it with what is done so far and the total, both in `unit`, a word like "images", or "bytes"."""

    def __init__(self, unit: str) -> None:
        self.unit, self.terminal = unit, sys.stderr.isatty()
        self.seen: deque[tuple[float, int]] = deque()
        self.next_line = time.monotonic() + (0 if self.terminal else LOG_SECONDS)

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.seen.append((now, done))
        while now - self.seen[0][0] > WINDOW and len(self.seen) > 2:
            self.seen.popleft()
        last = self.terminal and done == total
        if now < self.next_line and not last:
            return
        self.next_line = now + (TERMINAL_SECONDS if self.terminal else LOG_SECONDS)
        line = self.line(done, total)
        if self.terminal:
            print(f"\r{line}\x1b[K", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def line(self, done: int, total: int) -> str:
        """The bar, amounts, speed, and the time left at that speed."""
        (first, start), (now, _) = self.seen[0], self.seen[-1]
        speed = (done - start) / (now - first) if now > first else 0.0
        left = f", {clock((total - done) / speed)} left" if speed > 0 and total > done else ""
        filled = BAR * done // total if total else BAR
        amounts = f"{self._amount(done)} of {self._amount(total)}" if total else self._amount(done)
        return f"[{'#' * filled}{'.' * (BAR - filled)}] {amounts} {self.unit}, {self._amount(speed)}/s{left}"

    def _amount(self, value: float) -> str:
        return f"{value / 1e6:,.1f} M" if self.unit == "bytes" else f"{value:,.0f}"


def clock(seconds: float) -> str:
    """H:MM:SS or M:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
