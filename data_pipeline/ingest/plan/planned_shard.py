"""One shard to be: which spans of which videos it will hold, and what was set aside on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, BinaryIO

from landiff.data_pipeline.format.schema import Reject, content_fingerprint
from landiff.data_pipeline.ingest.config import Bucket, ShardsConfig
from landiff.data_pipeline.ingest.plan.rows import SourceRow
from landiff.data_pipeline.video.codec import VideoFile

STAGE = "shards"
# What says nothing about the state of the clip
HARMLESS = frozenset(
    (
        "empty_caption",
        "long_caption",
        "duplicate",
        "too_short",
        "too_large",
        "hdr",
        "interlaced",
        "field_coded",
        "no_timestamps",
        "dolby_vision",
        "unsupported_transfer",
        "unsupported_primaries",
        "unsupported_matrix",
    )
)


@dataclass(frozen=True)
class Span:
    """One future sample."""

    key: str
    source: str
    video: VideoFile
    caption: str
    source_sha256: str
    start_s: float
    crop: tuple[float, float, float, float]
    row: int  # where its row begins in the file of rows
    more_captions: tuple[str, ...] = ()
    conversions: tuple[str, ...] = ()  # what the video needs to be progressive SDR

    def as_json(self) -> tuple[Any, ...]:
        """Without what the row says."""
        return (self.key, self.source_sha256, self.start_s, self.crop, self.row, self.conversions)


@dataclass(frozen=True)
class SetAside:
    """A clip that won't be in a shard, and where its bytes are."""

    reject: Reject
    video: VideoFile
    row: int

    @property
    def is_bad(self) -> bool:
        return self.reject.reason not in HARMLESS


@dataclass
class PlannedShard:
    """One future shard."""

    name: str
    shape: Bucket
    bucket: str  # of the shard's entry: the shape's name, "" where all shards have one shape
    spans: list[Span] = field(default_factory=list)
    aside: list[SetAside] = field(default_factory=list)

    def fingerprint(self, config: ShardsConfig) -> str:
        """Of everything the shard is made from."""
        parts: list[Any] = [
            config.identity(),
            [(span.key, span.caption, *span.more_captions) for span in self.spans],
            [(entry.reject.key, entry.reject.reason) for entry in self.aside],
        ]
        # Without conversions the fingerprint is that of versions that knew none.
        converted = [(span.key, span.conversions) for span in self.spans if span.conversions]
        if converted:
            parts.append(converted)
        return content_fingerprint(*parts)

    def as_json(self) -> dict[str, Any]:
        """Without what the rows say."""
        return {
            "name": self.name,
            "shape": self.shape.model_dump(),
            "bucket": self.bucket,
            "spans": [span.as_json() for span in self.spans],
            "aside": [(a.reject.reason, a.reject.detail, a.row) for a in self.aside],
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any], rows: BinaryIO) -> PlannedShard:
        """`rows`: the open file of rows."""
        unit = cls(plain["name"], Bucket(**plain["shape"]), plain["bucket"])
        for key, sha256, start, crop, offset, conversions in plain["spans"]:
            clip = _row(rows, offset).clip
            span = Span(
                key,
                clip.name,
                clip.video,
                clip.caption,
                sha256,
                start,
                tuple(crop),
                offset,
                clip.more_captions,
                tuple(conversions),
            )
            unit.spans.append(span)
        for reason, detail, offset in plain["aside"]:
            clip = _row(rows, offset).clip
            unit.aside.append(
                SetAside(
                    Reject(key=clip.name, stage=STAGE, reason=reason, detail=detail),
                    clip.video,
                    offset,
                )
            )
        return unit


def _row(rows: BinaryIO, offset: int) -> SourceRow:
    rows.seek(offset)
    return SourceRow.from_json(rows.readline(), offset)
