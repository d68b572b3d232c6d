"""The plan of a shard set: which spans of which videos become which shard.

    <data>/plan/<fingerprint>.rows.jsonl     the rows of the source (rows.py)
    <data>/plan/looks-<fingerprint>.jsonl    probes of their videos (probes.py)
    <data>/plan/<fingerprint>.jsonl          one line per planned shard: its spans and rejects
    <data>/plan/<fingerprint>.json           offset and size of each line; commits the plan

The plan is complete before any shard is made, and all tasks write the same bytes. Memory does not
grow with the number of clips, except for a few hundred bytes per planned shard.
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
from landiff.data_pipeline.format.progress import ProgressCallback
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.plan.layout import plan_shards
from landiff.data_pipeline.ingest.plan.planned_shard import PlannedShard
from landiff.data_pipeline.ingest.plan.probes import BorrowDecoder, probe_all, probe_video
from landiff.data_pipeline.ingest.plan.rows import (
    SourceState,
    explain_damage,
    rows_path,
    write_rows,
)
from landiff.data_pipeline.ingest.shots import VideoProber
from landiff.data_pipeline.ingest.sources.listing import Listing

PLAN = "plan"


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """The index entry of one planned shard. It is stored as a list in this order."""

    name: str
    fingerprint: str
    offset: int  # of its line, in bytes
    size: int  # of its line, in bytes
    spans: int
    rejects: int
    damaged: int  # of the rejects


class ShardPlan:
    """A committed plan. Only the index is in memory; planned shards are read one at a time."""

    def __init__(self, path: Path) -> None:
        """Read the index. Raises ShardError if it is damaged."""
        self.path = path
        with explain_damage(path):
            entries = read_json(path, limit=MAX_INDEX_BYTES)["units"]
            self.entries = [PlanEntry(*entry) for entry in entries]

    def read_shard(self, entry: PlanEntry) -> PlannedShard:
        """Read one planned shard. Raises ShardError if the plan is damaged."""
        path = self.path.with_suffix(".jsonl")
        with (
            explain_damage(path),
            open(path, "rb") as file,
            open(rows_path(self.path), "rb") as rows,
        ):
            text = os.pread(file.fileno(), entry.size, entry.offset)
            return PlannedShard.from_json(parse_line(text, str(path)), rows)

    def entries_of(self, task: tuple[int, int]) -> list[PlanEntry]:
        """The planned shards of task (number, of).

        These are every of-th in the order of the hashes of their names, so that the parts of the
        tasks are equally large and cover the source evenly.
        """
        number, of = task
        ordered = sorted(self.entries, key=_name_hash)
        return ordered[number::of]


def _name_hash(entry: PlanEntry) -> bytes:
    return hashlib.sha256(entry.name.encode()).digest()


def plan_path(data: Path, state: SourceState) -> Path:
    """The path of the plan of a source."""
    return data / PLAN / f"{state.fingerprint}.json"


def make_plan(
    config: ShardsConfig,
    path: Path,
    listing: Listing,
    *,
    task: tuple[int, int],
    executor: Executor,
    borrow_decoder: BorrowDecoder,
    progress: ProgressCallback | None,
) -> ShardPlan:
    """Read the plan at `path`, or make it together with the other tasks."""
    if not path.exists():
        prober = VideoProber(config)
        rows = write_rows(config, listing, path)
        probe_all(
            config,
            rows,
            task=task,
            executor=executor,
            probe=lambda video: probe_video(prober, video, borrow_decoder),
            progress=progress,
        )
        write_plan(config, path, plan_shards(config, rows))
    return ShardPlan(path)


def write_plan(config: ShardsConfig, path: Path, shards: Iterable[PlannedShard]) -> None:
    """Write and commit a plan."""
    entries: list[PlanEntry] = []
    with atomic_file(path.with_suffix(".jsonl")) as file:
        for shard in shards:
            text = json.dumps(shard.as_json()).encode() + b"\n"
            entry = PlanEntry(
                name=shard.name,
                fingerprint=shard.fingerprint(config),
                offset=file.tell(),
                size=len(text),
                spans=len(shard.spans),
                rejects=len(shard.rejects),
                damaged=sum(rejected.is_damaged for rejected in shard.rejects),
            )
            entries.append(entry)
            file.write(text)
    entries.sort(key=lambda entry: int(entry.name))
    write_text(path, json.dumps({"units": [astuple(entry) for entry in entries]}))
