"""One line per stage: what is done, how fast, how long it still takes."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from configs.durations import duration


class Progress:
    """A `progress(done, total, note)` hook. A terminal sees one live line, a log file one line every `every_s`."""

    def __init__(self, name: str, unit: str = "", stream: TextIO | None = None, every_s: float = 15.0) -> None:
        self.name, self.unit, self.every_s = name, unit, every_s
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.started = time.monotonic()
        self.total: int | None = None
        self.first = 0
        self.last = self.started - every_s  # so that the first report shows
        self.width = 0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if total != self.total:  # another count begins
            self.total, self.first, self.started = total, done, now  # work done before does not count as speed
        if done < total and now - self.last < (0.2 if self.live else self.every_s):
            return
        self.last = now
        elapsed = now - self.started
        rate = (done - self.first) / elapsed if elapsed > 0 else 0.0
        left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
        line = f"{self.name}: {done}/{total} {self.unit}".rstrip() + f", {rate:.1f}/s, {duration(elapsed)}{left}" + (f"  ({note})" if note else "")
        if self.live:
            self.stream.write("\r" + line.ljust(self.width) + ("\n" if done >= total else ""))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
