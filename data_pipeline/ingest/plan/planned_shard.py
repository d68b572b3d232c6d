"""A planned shard: the spans that become its clips, and the rejects that it records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, BinaryIO

from landiff.data_pipeline.format.schema import Reject, content_fingerprint
from landiff.data_pipeline.ingest.config import Bucket, ShardsConfig
from landiff.data_pipeline.ingest.plan.rows import SourceRow
from landiff.data_pipeline.video.codec import Crop, VideoFile

STAGE = "shards"
# Reasons that do not mean that a clip is damaged; they do not count towards `max_bad_fraction`.
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
    """A part of a video that becomes one sample."""

    key: str
    source: str
    video: VideoFile
    caption: str
    source_sha256: str
    start_s: float
    crop: Crop
    row: int  # offset of its row in the file of rows
    more_captions: tuple[str, ...] = ()
    conversions: tuple[str, ...] = ()  # those that make the video progressive SDR

    def as_json(self) -> tuple[Any, ...]:
        """The values that are not in the row of the span."""
        return (self.key, self.source_sha256, self.start_s, self.crop, self.row, self.conversions)


@dataclass(frozen=True)
class RejectedRow:
    """A reject of the plan, with the place of its bytes."""

    reject: Reject
    video: VideoFile
    row: int  # offset of its row in the file of rows

    @property
    def is_damaged(self) -> bool:
        """Whether the reject counts towards `max_bad_fraction`."""
        return self.reject.reason not in HARMLESS


@dataclass
class PlannedShard:
    """One shard of a plan, before it is made."""

    name: str
    shape: Bucket
    bucket: str  # name of the shape; "" if all shards have one shape
    spans: list[Span] = field(default_factory=list)
    rejects: list[RejectedRow] = field(default_factory=list)

    def fingerprint(self, config: ShardsConfig) -> str:
        """Fingerprint of everything that the shard is made from."""
        parts: list[Any] = [
            config.identity(),
            [(span.key, span.caption, *span.more_captions) for span in self.spans],
            [(rejected.reject.key, rejected.reject.reason) for rejected in self.rejects],
        ]
        # Without conversions the fingerprint equals that of versions that had none.
        converted = [(span.key, span.conversions) for span in self.spans if span.conversions]
        if converted:
            parts.append(converted)
        return content_fingerprint(*parts)

    def as_json(self) -> dict[str, Any]:
        """Plain values, without those that are in the rows."""
        aside = []
        for rejected in self.rejects:
            aside.append((rejected.reject.reason, rejected.reject.detail, rejected.row))
        return {
            "name": self.name,
            "shape": self.shape.model_dump(),
            "bucket": self.bucket,
            "spans": [span.as_json() for span in self.spans],
            "aside": aside,
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any], rows: BinaryIO) -> PlannedShard:
        """Inverse of `as_json`. `rows` is the open file of rows."""
        shard = cls(plain["name"], Bucket(**plain["shape"]), plain["bucket"])
        for key, sha256, start_s, (left, top, right, bottom), offset, conversions in plain["spans"]:
            clip = _read_row(rows, offset).clip
            span = Span(
                key=key,
                source=clip.name,
                video=clip.video,
                caption=clip.caption,
                source_sha256=sha256,
                start_s=start_s,
                crop=(left, top, right, bottom),
                row=offset,
                more_captions=clip.more_captions,
                conversions=tuple(conversions),
            )
            shard.spans.append(span)
        for reason, detail, offset in plain["aside"]:
            clip = _read_row(rows, offset).clip
            reject = Reject(key=clip.name, stage=STAGE, reason=reason, detail=detail)
            shard.rejects.append(RejectedRow(reject, clip.video, offset))
        return shard


def _read_row(rows: BinaryIO, offset: int) -> SourceRow:
    rows.seek(offset)
    return SourceRow.from_json(rows.readline(), offset)
