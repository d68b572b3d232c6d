"""One shard to be: which spans of which videos it will hold, and what was set aside on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, BinaryIO

from data_pipeline.ingest_config import Bucket, ShardsConfig
from data_pipeline.plan_rows import Row
from data_pipeline.schema import Reject, fingerprint
from data_pipeline.video import VideoFile

STAGE = "shards"
# What says nothing about the state of the clip
HARMLESS = frozenset(("empty_caption", "long_caption", "duplicate", "too_short", "too_large"))


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
class Unit:
    """One future shard."""

    name: str
    shape: Bucket
    bucket: str  # of the shard's entry: the shape's name, "" where all shards have one shape
    spans: list[Span] = field(default_factory=list)
    aside: list[SetAside] = field(default_factory=list)

    def fingerprint(self, config: ShardsConfig) -> str:
        """Of everything the shard is made from."""
        return fingerprint(config.identity(), [(s.key, s.caption, *s.more_captions) for s in self.spans],
                           [(a.reject.key, a.reject.reason) for a in self.aside])

    def as_json(self) -> dict[str, Any]:
        """Without what the rows say."""
        return {
            "name": self.name, "shape": self.shape.model_dump(), "bucket": self.bucket,
            "spans": [(s.key, s.source_sha256, s.start_s, s.crop, s.row) for s in self.spans],
            "aside": [(a.reject.reason, a.reject.detail, a.row) for a in self.aside],
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any], rows: BinaryIO) -> Unit:
        """`rows`: the open file of rows."""
        unit = cls(plain["name"], Bucket(**plain["shape"]), plain["bucket"])
        for key, sha256, start, crop, offset in plain["spans"]:
            clip = _row(rows, offset).clip
            unit.spans.append(Span(key, clip.name, clip.video, clip.caption, sha256, start, tuple(crop), offset, clip.more_captions))
        for reason, detail, offset in plain["aside"]:
            clip = _row(rows, offset).clip
            unit.aside.append(SetAside(Reject(key=clip.name, stage=STAGE, reason=reason, detail=detail), clip.video, offset))
        return unit


def _row(rows: BinaryIO, offset: int) -> Row:
    rows.seek(offset)
    return Row.from_json(rows.readline(), offset)
