"""Alarms: metrics beyond a limit, reported once with what to do about it. Torch-free."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from landiff.training.observe.events import (
    ALARM,
    ALARM_OVER,
    EventLog,
    read_events,
    summarize_events,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlarmRule:
    """A limit of one metric.

    name: of the alarm, in messages.
    tag: TensorBoard tag of the metric.
    limit: the alarm is raised below it, or above it if `above`.
    key: config key of the limit.
    advice: what to do, as a clause.
    """

    name: str
    tag: str
    limit: float
    key: str
    advice: str
    above: bool = False

    def broken(self, value: float) -> bool:
        """Whether `value` is beyond the limit. NaN is not."""
        if self.above:
            return value > self.limit
        return value < self.limit

    def describe(self, value: float) -> str:
        """The message for `value`."""
        side = "above" if self.above else "below"
        return (
            f"{self.name}: {self.tag} = {value:.3g} is {side} {self.key} = {self.limit:g}; "
            f"{self.advice}"
        )


class AlarmWatch:
    """Raises each alarm once, until its metric is within the limit again. Rank 0 only."""

    def __init__(self, events: EventLog) -> None:
        """`events`: where alarms are recorded."""
        self.events = events
        self.raised: set[str] = set()

    def resume(self) -> None:
        """Continue from the recorded events, which end at the step that the run resumes from."""
        if self.events.writes:
            self.raised = set(summarize_events(read_events(self.events.path)).alarms)

    def check(self, step: int, rules: Sequence[AlarmRule], scalars: Mapping[str, float]) -> None:
        """Log and record the alarms that begin or end in this step. Metrics may be missing."""
        for rule in rules:
            if rule.tag not in scalars:
                continue
            value = scalars[rule.tag]
            broken = rule.broken(value)
            if broken == (rule.name in self.raised):
                continue
            event = {"name": rule.name, "tag": rule.tag, "value": value}
            if broken:
                self.raised.add(rule.name)
                text = rule.describe(value)
                log.warning("step %d: %s", step, text)
                self.events.add(step, {"kind": ALARM, **event, "text": text})
            else:
                self.raised.discard(rule.name)
                log.info("step %d: %s: over, %s = %.3g", step, rule.name, rule.tag, value)
                self.events.add(step, {"kind": ALARM_OVER, **event})
