"""Progress of a command in one line: what is done, how fast, and the time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from landiff.configs.durations import duration

LIVE_INTERVAL_S = 0.2  # between updates on a terminal


class ProgressLine:
    """A callable `(done, total, note)` that prints one line of progress.

    A terminal shows one line that is updated in place. A log file gets a line every `every_s`
    seconds. The first call for a count sets its start: work done before does not count as speed.
    """

    def __init__(
        self, name: str, unit: str = "", stream: TextIO | None = None, every_s: float = 15.0
    ) -> None:
        self.name = name
        self.unit = unit
        self.every_s = every_s
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.started = time.monotonic()
        self.total: int | None = None
        self.first = 0
        self.done = 0
        self.last = self.started - every_s  # so that the first call prints a line
        self.width = 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Records that `done` of `total` units are done; prints a line if one is due."""
        now = time.monotonic()
        if total != self.total or done < self.done:  # a new count begins
            self.total = total
            self.first = done
            self.started = now
        self.done = done
        interval = LIVE_INTERVAL_S if self.live else self.every_s
        if done < total and now - self.last < interval:
            return
        self.last = now
        line = f"{self.name}: {done}/{total} {self.unit}".rstrip()
        line += self._speed(done, total, now - self.started)
        if note:
            line += f"  ({note})"
        self._write(line, finished=done >= total)

    def _write(self, line: str, *, finished: bool) -> None:
        """Writes a line to the log, or over the previous one on a terminal."""
        if self.live:
            end = "\n" if finished else ""
            self.stream.write("\r" + line.ljust(self.width) + end)
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def _speed(self, done: int, total: int, elapsed: float) -> str:
        """Speed, elapsed time and time left; only the elapsed time before anything is done."""
        work = done - self.first
        if work <= 0 or elapsed <= 0:
            return f", {duration(elapsed)}"
        text = f", {rate_text(work / elapsed)}, {duration(elapsed)}"
        if done < total:
            text += f", {duration((total - done) * elapsed / work)} left"
        return text


def rate_text(rate: float) -> str:
    """A rate per second as `3.2/s`; below 0.5/s as time for each: `12.5 s each`, `3:20 each`."""
    if rate >= 0.5:
        return f"{rate:.1f}/s"
    seconds = 1 / rate
    if seconds < 60:
        return f"{seconds:.1f} s each"
    return f"{duration(seconds)} each"
