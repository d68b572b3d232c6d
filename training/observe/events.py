"""events.jsonl: what happened in a run beside its numbers. Torch-free.

One object per line:

    {"step": 12, "time": 1.7e9, "kind": "skip", "cause": "not finite", "loss": "nan", ...}

kind: `skip` (a step without an update), `report` (a spike that was trained on), `rollback` (a step
without an update, after which the weights of checkpoint `to` were loaded), `alarm`. A resumed run
truncates the file to the step that it resumes from.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from landiff.configs.documents import DocumentError, parse_json
from landiff.configs.files import write_text
from landiff.training.checkpoint.run_folder import EVENTS


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
