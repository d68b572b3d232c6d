"""The plan of a shard set: which spans of which videos become which shard. Made before any shard is.

    <data>/plan/<mark>.rows.jsonl      the rows of the source (plan_rows.py)
    <data>/plan/looks-<mark>.jsonl     what was seen of their videos (plan_looks.py)
    <data>/plan/<mark>.jsonl           one line for each shard to be: its spans and what was set aside (plan_layout.py)
    <data>/plan/<mark>.json            where each line lies; commits the plan

All tasks write the same bytes. Nothing here grows in memory with the number of clips, but for some hundred bytes
for each shard to be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import astuple, dataclass
from pathlib import Path

from landiff.configs.documents import MAX_INDEX_BYTES, parse_line, read_json
from landiff.configs.files import atomic_file, write_text
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.plan.layout import lay
from landiff.data_pipeline.ingest.plan.planned_shard import PlannedShard
from landiff.data_pipeline.ingest.plan.probes import Borrow, ProgressCallback, inspect, look_at_all
from landiff.data_pipeline.ingest.plan.rows import damage_of, plan_path, rows_path, write_rows
from landiff.data_pipeline.ingest.shots import Looker
from landiff.data_pipeline.ingest.sources.listing import Listing

PLAN = "plan"


@dataclass(frozen=True, slots=True)
class Line:
    """What the index says of one unit."""

    name: str
    fingerprint: str
    offset: int
    size: int
    spans: int
    aside: int
    bad: int


class ShardPlan:
    """A committed plan. Reading a unit costs as much as the unit is long."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with damage_of(path):
            units = read_json(path, limit=MAX_INDEX_BYTES)["units"]
            self.lines = [Line(*line) for line in units]

    def unit(self, line: Line) -> PlannedShard:
        units = self.path.with_suffix(".jsonl")
        with damage_of(units), open(units, "rb") as file, open(rows_path(self.path), "rb") as rows:
            text = os.pread(file.fileno(), line.size, line.offset)
            return PlannedShard.from_json(parse_line(text, str(units)), rows)

    def share(self, task: tuple[int, int]) -> list[Line]:
        """The units of task (number, of): in the order of their hashes every of-th, so that shares are even and mixed."""
        number, of = task
        return sorted(self.lines, key=lambda line: hashlib.sha256(line.name.encode()).digest())[
            number::of
        ]


def make(
    config: ShardsConfig,
    path: Path,
    listing: Listing,
    task: tuple[int, int],
    executor: Executor,
    borrow: Borrow,
    progress: ProgressCallback | None,
) -> ShardPlan:
    """The plan at `path`, made where it isn't there; its work is shared with the other tasks."""
    if not path.exists():
        looker = Looker(config)
        rows = write_rows(config, listing, path)
        look_at_all(
            config, rows, task, executor, lambda video: inspect(looker, video, borrow), progress
        )
        write(config, path, lay(config, rows))
    return ShardPlan(path)


def path_of(config: ShardsConfig, data: Path, listing: Listing) -> Path:
    """Where the plan of this source, as it is now, lies or will lie. Raises ConfigError when a row can't be read."""
    return plan_path(config, data, PLAN, listing)


def write(config: ShardsConfig, path: Path, units: Iterable[PlannedShard]) -> None:
    """Commit a plan."""
    lines: list[Line] = []
    with atomic_file(path.with_suffix(".jsonl")) as file:
        for unit in units:
            text = json.dumps(unit.as_json()).encode() + b"\n"
            bad = sum(entry.is_bad for entry in unit.aside)
            lines.append(
                Line(
                    unit.name,
                    unit.fingerprint(config),
                    file.tell(),
                    len(text),
                    len(unit.spans),
                    len(unit.aside),
                    bad,
                )
            )
            file.write(text)
    lines.sort(key=lambda line: int(line.name))
    write_text(path, json.dumps({"units": [astuple(line) for line in lines]}))
