"""What `landiff shards` reports about a source: before anything is made, and with its results."""

from __future__ import annotations

from dataclasses import dataclass, field

from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.plan.planned_shard import STAGE
from landiff.data_pipeline.ingest.plan.rows import (
    NO_STAMP,
    failure_before_opening,
    stamp_of,
    with_caption,
)
from landiff.data_pipeline.ingest.shard_maker import tally_rejects
from landiff.data_pipeline.ingest.sources.entries import (
    IgnoredFiles,
    SourceClip,
    Tally,
    TarFile,
    hint_for_missing,
)
from landiff.data_pipeline.ingest.sources.listing import list_source


@dataclass
class SourceSummary:
    """What a source holds, as far as it can be told without opening a video."""

    clips: int = 0  # without a known failure
    tars: int = 0
    rejected: Tally = field(default_factory=Tally)  # by reason
    ignored: Tally = field(default_factory=Tally)  # by kind

    def __str__(self) -> str:
        tars = f" in {self.tars} tars" if self.tars else ""
        return f"{self.clips} clips{tars}; rejected: {self.rejected}; ignored: {self.ignored}"


def summarize_source(config: ShardsConfig) -> SourceSummary:
    """List a whole source, including the members of its tars.

    Raises ConfigError if the source cannot be read.
    """
    listing = list_source(config)
    summary = SourceSummary()
    for entry in listing.entries():
        if isinstance(entry, TarFile):
            summary.tars += 1
            for member in listing.members(entry):
                _count(config, summary, member)
        else:
            _count(config, summary, entry)
    return summary


def _count(config: ShardsConfig, summary: SourceSummary, entry: SourceClip | IgnoredFiles) -> None:
    """Add one entry to the summary."""
    if isinstance(entry, IgnoredFiles):
        summary.ignored.add(entry.kind, entry.name)
        return
    entry = with_caption(config, entry)
    failure = failure_before_opening(config, entry)
    if failure:
        example = f"{entry.name}: {failure.detail}" if failure.detail else entry.name
        summary.rejected.add(failure.reason, example)
    elif stamp_of(entry.video.path) == NO_STAMP:
        example = f"{entry.name}: no such file{hint_for_missing(entry.video.path)}"
        summary.rejected.add("unreadable_file", example)
    else:
        summary.clips += 1


def result_lines(rejected: Tally, ignored: Tally) -> list[str]:
    """One line for rejected clips and one for ignored files, if there are any."""
    lines = []
    if rejected.counts:
        lines.append(f"rejected: {rejected}")
    if ignored.counts:
        lines.append(f"ignored: {ignored}")
    return lines


def manifest_lines(manifest: Manifest) -> list[str]:
    """`result_lines` of a manifest, without the clips that columns rejected."""
    rejected = tally_rejects(reject for reject in manifest.rejects if reject.stage == STAGE)
    counts = {"counts": manifest.ignored_counts, "examples": manifest.ignored_examples}
    return result_lines(rejected, Tally.from_json(counts))
