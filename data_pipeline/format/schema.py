"""THE shard contract: what a data set looks like on disk.

    <data>/manifest.json            one document per shard set, O(shards) long; what trainers open first
    <data>/raw/000000.tar           raw samples: <key>.mp4 + <key>.json (`RawSample`)
    <data>/raw/000000.json          sidecar of that tar (`Sidecar`): index by offset, checksum, rejects
    <data>/<column>/000000.tar      one folder per column; same shard names, same keys, same order as raw;
                                    members <key>.<stem>.safetensors, where stem is `column_stem(column)`;
                                    the safetensors metadata hold "crc32" of the tensor's bytes
    <data>/<column>/000000.json     sidecar

A shard is committed when its sidecar exists; the sidecar is written after the tar, both by rename. All
documents are JSON, all arrays safetensors; nothing is pickled. Plain `webdataset` reads every tar.

Columns and their tensors (one tensor per sample, named by the stem):

    features        float16 [T, C, h, w]     vision features of the semantic frames
    tokens          uint16  [I + (T-1)*P]    semantic tokens, flat
    latents         bfloat16 [T, C, H, W]    scaled latents, or [T, 2C, H, W] their mean and log-variance
    text-<encoder>  bfloat16 [L, D]          text states; real rows only, or all rows of a padded encoder

Keys hold no dots, since WebDataset cuts a name at the first dot.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from landiff.configs.base import Config

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RAW = "raw"


class Reject(Config):
    """A clip that was set aside: what, where from, why."""

    key: str  # clip key, or the source path where no key exists yet
    stage: str  # "shards", or the name of a column
    reason: str  # short, countable: "empty_caption", "too_short", "corrupt_frame", ...
    detail: str = ""


class RawSample(Config):
    """The JSON part of a raw sample. The clip beside it has exactly these frames."""

    key: str
    caption: str
    more_captions: tuple[str, ...] = ()  # where the source has several
    source: str  # path or id of the video it was cut from
    source_sha256: str
    start_s: float  # where the span starts in the source
    fps: PositiveFloat
    num_frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    motion_score: (
        float  # mean optical flow in frame heights per second (data_pipeline/video/motion.py)
    )
    motion_p95: float = 0.0  # the score's parts, in the same unit
    motion_residual: float = 0.0
    motion_camera: tuple[float, float] = (0.0, 0.0)
    # of the source, absent where there were none: "smpte2084/bt2020" (its colours), "bwdif"
    conversions: tuple[str, ...] = ()
    cuts: NonNegativeInt = 0  # frame pairs that were left out of the score
    video_sha256: str  # of the clip's bytes in this tar

    def caption_number(self, number: int) -> str:
        """0 is `caption`; a clip with fewer gives its last."""
        captions = (self.caption, *self.more_captions)
        return captions[min(number, len(captions) - 1)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class ShardEntry:
    """One committed tar as the manifest lists it. Slots, since a large data set has 10^5 of them for each column."""

    name: str  # "000000"; the tar is <folder>/<name>.tar
    samples: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str
    bucket: str = ""  # raw: frames, height, width of all its clips, e.g. "17x64x64"; a global batch is of one. "": one shape in all
    missing: tuple[NonNegativeInt, ...] = ()  # columns: raw positions of clips set aside here


class Sidecar(Config):
    """What commits one tar: its entry, where each part lies, what was set aside, and what made it."""

    format: Literal[1] = FORMAT_VERSION
    entry: ShardEntry
    rejects: list[Reject] = Field(default_factory=list)
    fingerprint: str  # of the encoder + its inputs (`fingerprint`); raw: of the shards config
    raw_sha256: str = ""  # columns: sha256 of the raw tar it was made from
    dtype: str = ""  # columns: of the tensors in this tar
    shape: list[NonNegativeInt] = Field(
        default_factory=list
    )  # columns: of one sample; 0 where samples differ
    truncated: NonNegativeInt = 0  # text: clips whose caption is longer than the encoder takes
    value_range: tuple[int, int] | None = None  # tokens: the least and the largest code
    index: list[
        tuple[str, dict[str, tuple[int, int]]]
    ]  # [(key, {part: (offset, size)})] in order; last, so that it can be left out


class Column(Config):
    """One column of the manifest."""

    dtype: str
    shape: list[int]  # of one sample; 0 where samples differ (text rows)
    encoder: str  # human name, e.g. "efficientnet-lite0" or "tokenizer@3f2a..."
    fingerprint: str
    config: dict[
        str, Any
    ]  # the resolved column config; "encoders" holds {name: fingerprint} of what made it
    raw_fingerprint: str = ""  # `Manifest.fingerprint` of the raw shards it was made from
    truncated: NonNegativeInt = 0  # text: clips whose caption is longer than the encoder takes
    shards: list[ShardEntry]


class Manifest(Config):
    """The one document that trainers read."""

    format: Literal[1] = FORMAT_VERSION
    fingerprint: str  # of the raw shards: config + every raw sha256
    config: dict[str, Any]  # resolved config of `landiff shards`
    shards: list[ShardEntry]
    columns: dict[str, Column] = Field(default_factory=dict)
    rejects: list[Reject] = Field(default_factory=list)
    reject_counts: dict[str, int] = Field(default_factory=dict)  # "stage/reason" -> clips
    ignored_counts: dict[str, int] = Field(
        default_factory=dict
    )  # kind -> files of the source that no clip uses
    ignored_examples: dict[str, list[str]] = Field(
        default_factory=dict
    )  # kind -> names of the first few

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def column_stem(column: str) -> str:
    """Part name and tensor name of a column: "text-minilm" -> "text"; a stem has no dash."""
    return column.split("-", 1)[0]


def content_fingerprint(*parts: Any) -> str:
    """16 hex digits over any JSON-able values; equal values give equal fingerprints."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
