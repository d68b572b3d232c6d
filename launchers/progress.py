"""One line per stage: what is done, how fast, how long it still takes."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from landiff.configs.durations import duration


class Progress:
    """A `progress(done, total, note)` hook.

    A terminal shows one live line, a log file one line every `every_s`. The first report of a count
    is its start: work that was done before does not count as speed.
    """

    def __init__(
        self, name: str, unit: str = "", stream: TextIO | None = None, every_s: float = 15.0
    ) -> None:
        self.name, self.unit, self.every_s = name, unit, every_s
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.started = time.monotonic()
        self.total: int | None = None
        self.first = 0
        self.done = 0
        self.last = self.started - every_s  # so that the first report shows
        self.width = 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if total != self.total or done < self.done:  # another count begins
            self.total, self.first, self.started = total, done, now
        self.done = done
        if done < total and now - self.last < (0.2 if self.live else self.every_s):
            return
        self.last = now
        line = f"{self.name}: {done}/{total} {self.unit}".rstrip() + self._speed(
            done, total, now - self.started
        )
        if note:
            line += f"  ({note})"
        if self.live:
            self.stream.write("\r" + line.ljust(self.width) + ("\n" if done >= total else ""))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def _speed(self, done: int, total: int, elapsed: float) -> str:
        """Rate, time passed and time left; no rate before anything was done."""
        work = done - self.first
        if work <= 0 or elapsed <= 0:
            return f", {duration(elapsed)}"
        left = f", {duration((total - done) * elapsed / work)} left" if done < total else ""
        return f", {rate_text(work / elapsed)}, {duration(elapsed)}{left}"


def rate_text(rate: float) -> str:
    """`3.2/s`; below one in 2 s the time that each takes: `12.5 s each`, `3:20 each`."""
    if rate >= 0.5:
        return f"{rate:.1f}/s"
    seconds = 1 / rate
    return f"{seconds:.1f} s each" if seconds < 60 else f"{duration(seconds)} each"
