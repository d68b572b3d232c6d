"""How long training pauses for checkpoints, and how much slower it is while they are written.

Metrics of the last save, on rank 0:

    time/save_stall_s     seconds for which the loop paused
    time/save_wait_s      part of it: waiting until the previous checkpoint was written
    time/save_write_s     seconds from the start of the save until the checkpoint was committed
    time/save_slowdown    median time of steps during the save over that of other steps, minus 1
"""

from __future__ import annotations

import statistics
import time
from collections import deque

STEPS_COMPARED = 64


class SaveTimes:
    """Measures steps and saves. Call `step` after every step."""

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self.metrics: dict[str, float] = {}
        self._begin_s = 0.0
        self._last_s: float | None = None  # end of the step or save before
        self._during: list[float] = []
        self._others: deque[float] = deque(maxlen=STEPS_COMPARED)

    def step(self, *, writing: bool) -> None:
        """Record a step. `writing`: whether a checkpoint was being written."""
        now_s = time.perf_counter()
        if self._last_s is not None:
            (self._during if writing else self._others).append(now_s - self._last_s)
        self._last_s = now_s

    def begin(self) -> None:
        """A save begins."""
        self._begin_s = time.perf_counter()
        self._during = []

    def waited(self) -> None:
        """The checkpoint before is written."""
        self.metrics["time/save_wait_s"] = time.perf_counter() - self._begin_s

    def resumed(self) -> None:
        """Training continues."""
        self._last_s = time.perf_counter()
        self.metrics["time/save_stall_s"] = self._last_s - self._begin_s

    def committed(self) -> None:
        """The checkpoint is committed."""
        self.metrics["time/save_write_s"] = time.perf_counter() - self._begin_s
        if self._during and self._others:
            ratio = statistics.median(self._during) / statistics.median(self._others)
            self.metrics["time/save_slowdown"] = ratio - 1
