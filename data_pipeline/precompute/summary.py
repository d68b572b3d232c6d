"""Summary of one precompute task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ColumnSummary:
    """What a task did for one column."""

    made: int = 0  # units computed in this run
    found: int = 0  # units that were finished before
    clips: int = 0  # clips of the units of this run, rejects included
    rejects: dict[str, int] = field(default_factory=dict)  # clips by reason, of all units
    truncated: int = 0  # clips of all units whose text is longer than the encoder accepts

    def __str__(self) -> str:
        """Format the counts as text."""
        parts = [f"{self.clips} clips in {self.made} shards, {self.found} shards were finished"]
        if self.rejects:
            reasons = format_reject_counts(self.rejects)
            parts.append(f"{sum(self.rejects.values())} rejected ({reasons})")
        if self.truncated:
            parts.append(f"{self.truncated} captions truncated to the encoder's length")
        return ", ".join(parts)


@dataclass(frozen=True)
class Summary:
    """What one task did."""

    columns: dict[str, ColumnSummary]
    stage_seconds: dict[str, float]  # summed over the threads of a stage
    cpu_seconds: dict[str, float]  # CPU time, decoder processes included
    wall_s: float

    def __str__(self) -> str:
        """Format the summary as one line."""
        parts = [f"{name}: {column}" for name, column in self.columns.items()]
        time = f"{self.wall_s:.1f} s"
        if self.stage_seconds:
            stages = [f"{stage} {seconds:.1f}" for stage, seconds in self.stage_seconds.items()]
            time += f" (seconds by stage: {', '.join(stages)})"
        return "; ".join([*parts, time])


def format_reject_counts(rejects: Mapping[str, int]) -> str:
    """Format rejects by reason, most frequent first: "damaged 3, frame_count 1"."""
    most_frequent_first = sorted(rejects.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason} {count}" for reason, count in most_frequent_first)
