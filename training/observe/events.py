"""events.jsonl: skipped steps, spikes, rollbacks and alarms of a run. Torch-free.

One object per line:

    {"step": 12, "time": 1.7e9, "kind": "skip", "cause": "not finite", "loss": "nan", ...}

kind: `skip` (a step without an update), `spike` (one that was trained on), `rollback` (a step
without an update, after which the weights of checkpoint `to` were loaded), `alarm` and `alarm over`
(a metric exceeds its limit, and no longer does). A resumed run truncates the file to the step that
it resumes from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from landiff.configs.documents import DocumentError, parse_json
from landiff.configs.files import write_text
from landiff.training.checkpoint.run_folder import EVENTS

ALARM = "alarm"
ALARM_OVER = "alarm over"


class EventLog:
    """Writer of events.jsonl. Only rank 0 writes."""

    def __init__(self, run: Path, rank: int) -> None:
        """`run`: the run folder."""
        self.path = run / EVENTS
        self.writes = rank == 0

    def resume(self, step: int) -> None:
        """Drop the events after `step`."""
        if self.writes and self.path.exists():
            kept = [event for event in read_events(self.path) if event["step"] <= step]
            write_text(self.path, "".join(json.dumps(event) + "\n" for event in kept))

    def add(self, step: int, event: dict[str, Any]) -> None:
        """Append one event."""
        if not self.writes:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **event}) + "\n")


@dataclass
class EventSummary:
    """Counts of a run's events.

    skipped_steps: steps without an update, also those with a rollback.
    spikes: steps with a spike.
    alarms: names of the alarms that are not over.
    """

    skipped_steps: int = 0
    rollbacks: int = 0
    spikes: int = 0
    alarms: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Text such as `3 skipped, 1 rollback, alarm: dead codes`, empty without events."""
        parts = []
        if self.skipped_steps:
            parts.append(f"{self.skipped_steps} skipped")
        if self.rollbacks:
            parts.append(f"{self.rollbacks} rollback{'s' if self.rollbacks > 1 else ''}")
        if self.spikes:
            parts.append(f"{self.spikes} spike{'s' if self.spikes > 1 else ''}")
        parts += [f"alarm: {name}" for name in self.alarms]
        return ", ".join(parts)


def summarize_events(events: Sequence[Mapping[str, Any]]) -> EventSummary:
    """Counts of `events`."""
    found = EventSummary()
    for event in events:
        kind = event.get("kind")
        name = event.get("name", "")
        found.skipped_steps += kind in ("skip", "rollback")
        found.rollbacks += event.get("to") is not None
        found.spikes += event.get("cause") == "spike"
        if kind == ALARM and name not in found.alarms:
            found.alarms.append(name)
        elif kind == ALARM_OVER and name in found.alarms:
            found.alarms.remove(name)
    return found


def read_events(path: Path) -> list[dict[str, Any]]:
    """The complete lines of an events.jsonl. Lines that a kill truncated are skipped."""
    if not path.exists():
        return []
    complete = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        try:
            event = parse_json(line, EVENTS)
        except DocumentError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            complete.append(event)
    return complete
