"""Times of the start and within optimizer steps, and the rank that the others wait for.

On CUDA the times are those of device events, which are read at logged steps only, so measuring adds
no further synchronization with the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

log = logging.getLogger(__name__)

Mark = float | torch.cuda.Event
"""A point in time: seconds of the host's clock, or an event in the stream of the device."""

WARN_FRACTION = 0.2  # of a step: a rank that is slower than the median by more is reported


def mark(device: torch.device) -> Mark:
    """The present point in time of the host, or on CUDA of the device's stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds from `start` to `end`. Waits until the device has reached `end`."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float), (start, end)
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


class StartTimes:
    """Seconds that the parts of a process's start take, from its creation to its first step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._ended = psutil.Process().create_time()  # when the last part did

    def end(self, part: str) -> None:
        """The time since the last part belongs to `part`. Only its first end counts."""
        if part not in self.seconds:
            now = time.time()
            self.seconds[part] = max(0.0, now - self._ended)
            self._ended = now


def slowest_starts(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest seconds of all ranks by part, logged in one line. Returns them by tag.

    ranks: `StartTimes.seconds` of each. A rank that waits for others in a part takes as long as
    the slowest of them.
    """
    slowest = {part: max(rank[part] for rank in ranks) for part in ranks[0]}
    parts = ", ".join(f"{part.replace('_', ' ')} {taken:.1f}" for part, taken in slowest.items())
    log.info("the start took %.1f s on the slowest ranks: %s", sum(slowest.values()), parts)
    return {f"start/{part}_s": taken for part, taken in slowest.items()}


@dataclass
class StepTimes:
    """Points in time of one step on this rank.

    start, end: of the whole step.
    forward_start, forward_end: of the first forward pass through the model. It is the longest part
        of a step in which most parallel layouts wait for no other rank.
    update: after forward and backward passes, before the optimizer's update.
    """

    start: Mark
    forward_start: Mark
    forward_end: Mark
    update: Mark
    end: Mark

    @property
    def forward_backward_s(self) -> float:
        """Seconds from the start to the update."""
        return seconds_between(self.start, self.update)

    @property
    def optimizer_s(self) -> float:
        """Seconds of the update."""
        return seconds_between(self.update, self.end)

    @property
    def first_forward_s(self) -> float:
        """Seconds of the first forward pass."""
        return seconds_between(self.forward_start, self.forward_end)


class StepClock:
    """Takes the times of an engine's steps.

    An engine calls `start`, then `update` before the optimizer's update, then `stop`.
    """

    def __init__(self, device: torch.device, module: nn.Module) -> None:
        """`module`: the model, whose forward passes are observed between `start` and `stop`."""
        self.device = device
        self._marks: list[Mark] = []
        module.register_forward_pre_hook(self._before_forward)
        module.register_forward_hook(self._after_forward)

    def start(self) -> None:
        """Begin a step."""
        self._marks = [mark(self.device)]

    def update(self) -> None:
        """Note that the optimizer's update begins."""
        self._marks.append(mark(self.device))

    def stop(self) -> StepTimes:
        """End a step. Returns its times. A step without update has one of no length."""
        end = mark(self.device)
        if len(self._marks) == 3:
            self._marks.append(end)
        assert len(self._marks) == 4, f"{len(self._marks)} marks: no forward pass was observed"
        start, forward_start, forward_end, update = self._marks
        times = StepTimes(start, forward_start, forward_end, update, end)
        self._marks = []
        return times

    def _before_forward(self, *_: Any) -> None:
        if len(self._marks) == 1:
            self._marks.append(mark(self.device))

    def _after_forward(self, *_: Any) -> None:
        if len(self._marks) == 2:
            self._marks.append(mark(self.device))


@dataclass
class RankTimes:
    """Times of one rank in a window of steps, as ranks exchange them.

    own_s: seconds a step that the rank spends on its own: waiting for data and in the first forward
        pass. The times of whole steps are equal on all ranks, since the fast ones wait.
    """

    host: str
    own_s: float
    data_s: float


@dataclass
class Lag:
    """The slowest of several ranks or nodes, compared with their median."""

    slowest: int  # its number
    own: RankTimes
    median: RankTimes

    @classmethod
    def of(cls, times: Sequence[RankTimes]) -> Lag:
        """`times`: by number."""
        order = sorted(range(len(times)), key=lambda number: times[number].own_s)
        return cls(order[-1], times[order[-1]], times[order[(len(order) - 1) // 2]])

    @property
    def seconds(self) -> float:
        """Seconds a step by which the slowest exceeds the median."""
        return self.own.own_s - self.median.own_s


class StragglerWatch:
    """Finds the slowest rank and node of each window, and warns of one that stays behind."""

    def __init__(self) -> None:
        self._suspect: str | None = None  # behind in the last window
        self._reported: str | None = None

    def find(self, ranks: Sequence[RankTimes], step_s: float) -> dict[str, float]:
        """The slowest rank, and the seconds a step by which it exceeds the median, by tag.

        With several nodes of several ranks, also the seconds by which the slowest node exceeds the
        median of the nodes. A node is as slow as the median of its ranks, so that it is not slow
        for one slow rank. Of a slow node, other ranks may be slowest in each window.

        `ranks`: by rank. `step_s`: seconds of a step. Empty if there is one rank.
        """
        if len(ranks) < 2:
            return {}
        lag = Lag.of(ranks)
        found = {"time/straggler_rank": float(lag.slowest), "time/straggler_lag_s": lag.seconds}
        name = f"rank {lag.slowest} on {lag.own.host}"
        nodes = times_of_nodes(ranks)
        if 1 < len(nodes) < len(ranks):
            node_lag = Lag.of(nodes)
            found["time/slow_node_lag_s"] = node_lag.seconds
            if node_lag.seconds > WARN_FRACTION * step_s:
                lag = node_lag
                name = f"node {lag.own.host}"
        self._judge(name, lag, step_s)
        return found

    def _judge(self, name: str, lag: Lag, step_s: float) -> None:
        """Warn if the same rank or node is behind in two windows in a row, once."""
        if lag.seconds <= WARN_FRACTION * step_s:
            self._suspect = None
            self._reported = None
        elif self._suspect != name:
            self._suspect = name
        elif self._reported != name:
            self._reported = name
            log.warning(
                "%s is slow: %.3f s a step before it meets the other ranks (%.3f s of it waiting "
                "for data), the median is %.3f s (%.3f s); a step takes %.3f s",
                name,
                lag.own.own_s,
                lag.own.data_s,
                lag.median.own_s,
                lag.median.data_s,
                step_s,
            )


def times_of_nodes(ranks: Sequence[RankTimes]) -> list[RankTimes]:
    """Of each node the rank that is the median of its ranks."""
    by_host: dict[str, list[RankTimes]] = {}
    for rank in ranks:
        by_host.setdefault(rank.host, []).append(rank)
    return [Lag.of(members).median for members in by_host.values()]
