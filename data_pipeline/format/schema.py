"""The on-disk format of a data set.

    <data>/manifest.json         the document that trainers read first: shards and columns
    <data>/raw/000000.tar        raw samples: <key>.mp4 and <key>.json (`RawSample`)
    <data>/raw/000000.json       sidecar of that tar (`Sidecar`): offsets, checksum, rejects
    <data>/<column>/000000.tar   a folder per column, with the shard names, keys and order of raw
    <data>/<column>/000000.json  sidecar of that tar

A tar of a column has members <key>.<stem>.safetensors with stem `column_stem(column)`. Their
metadata contain "crc32" of the tensor's bytes.

A shard is committed when its sidecar exists. The sidecar is written after the tar, both with an
atomic rename. All documents are JSON and all arrays safetensors; nothing is pickled. Plain
`webdataset` reads every tar.

Columns and their tensors (one tensor per sample, named by the stem):

    features        float16  [T, C, h, w]    vision features of the semantic frames
    tokens          uint16   [I + (T-1)*P]   semantic tokens, I of an I frame, P of a P frame
    latents         bfloat16 [T, C, H, W]    scaled latents
                             [T, 2C, H, W]   or their mean and log-variance
    captions-<name> uint8    [N]             captions: a JSON list of texts, UTF-8
    embedding-<name> float16 [C]             mean vision features, normalized to unit length
    score-<name>    float32  [1]             a number for conditions of trainers
    text-<encoder>  bfloat16 [L, D]          text states; real rows, or all rows if padded

Keys contain no dots, because WebDataset cuts a name at the first dot.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from landiff.configs.base import Config

FORMAT_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
RAW = "raw"


class Reject(Config):
    """A rejected clip, with the stage and the reason."""

    key: str = Field(description="Key of the clip, or the path of its source if it has no key yet.")
    stage: str = Field(description='"shards", or the name of a column.')
    reason: str = Field(description='Countable reason, such as "empty_caption" or "too_short".')
    detail: str = Field(default="", description="Further details for a human reader.")


class RawSample(Config):
    """The JSON part of a raw sample. The clip in the same tar has exactly these frames."""

    key: str = Field(description="Key of the sample, unique in the data set.")
    caption: str = Field(description="Text of the clip.")
    more_captions: tuple[str, ...] = Field(
        default=(), description="Further captions, if the source has several."
    )
    source: str = Field(description="Path or id of the video that the clip was cut from.")
    source_sha256: str = Field(description="SHA-256 of that video.")
    start_s: float = Field(description="Start of the span in the source, in seconds.")
    fps: PositiveFloat = Field(description="Frames per second of the clip.")
    num_frames: PositiveInt = Field(description="Number of frames of the clip.")
    height: PositiveInt = Field(description="Height in pixels.")
    width: PositiveInt = Field(description="Width in pixels.")
    motion_score: float = Field(
        description="Mean optical flow in frame heights per second (data_pipeline/video/motion.py)."
    )
    motion_p95: float = Field(
        default=0.0, description="95th percentile over frame pairs, in frame heights per second."
    )
    motion_residual: float = Field(
        default=0.0, description="Mean flow minus camera motion, in frame heights per second."
    )
    motion_camera: tuple[float, float] = Field(
        default=(0.0, 0.0), description="Camera motion (x, y), in frame heights per second."
    )
    conversions: tuple[str, ...] = Field(
        default=(),
        description='Conversions of the source, e.g. its colours "smpte2084/bt2020" or "bwdif".',
    )
    cuts: NonNegativeInt = Field(
        default=0, description="Frame pairs across a cut, which the motion score leaves out."
    )
    video_sha256: str = Field(description="SHA-256 of the clip's bytes in this tar.")

    def caption_number(self, number: int) -> str:
        """Caption `number`; 0 is `caption`. A clip with fewer captions returns its last."""
        captions = (self.caption, *self.more_captions)
        return captions[min(number, len(captions) - 1)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class ShardEntry:
    """One committed tar in the manifest.

    Has slots, because a large data set has 10^5 entries per column.
    """

    name: str  # "000000"; the tar is <folder>/<name>.tar
    samples: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str
    bucket: str = ""  # raw: frames, height, width of its clips, "17x64x64"; "" for a single shape
    missing: tuple[NonNegativeInt, ...] = ()  # columns: raw positions of clips rejected here


class Sidecar(Config):
    """The document that commits one tar."""

    format: Literal[1] = Field(default=FORMAT_VERSION, description="Version of the format.")
    entry: ShardEntry = Field(description="Entry of this tar in the manifest.")
    rejects: list[Reject] = Field(default_factory=list, description="Clips rejected in this shard.")
    fingerprint: str = Field(
        description="Raw: fingerprint of the shards config. Columns: of the encoder and its inputs."
    )
    raw_sha256: str = Field(
        default="", description="Columns: SHA-256 of the raw tar it was computed from."
    )
    dtype: str = Field(default="", description="Columns: data type of the tensors in this tar.")
    shape: list[NonNegativeInt] = Field(
        default_factory=list,
        description="Columns: shape of one sample's tensor; 0 for dimensions that differ.",
    )
    truncated: NonNegativeInt = Field(
        default=0, description="Text: clips whose caption is longer than the encoder accepts."
    )
    value_range: tuple[int, int] | None = Field(
        default=None, description="Tokens: the smallest and the largest code."
    )
    # The last field, so that a reader can skip it.
    index: list[tuple[str, dict[str, tuple[int, int]]]] = Field(
        description="(key, {part: (offset, size)}) of each sample, in order."
    )


class Column(Config):
    """One column in the manifest."""

    dtype: str = Field(description="Data type of the tensors.")
    shape: list[int] = Field(
        description="Shape of one sample's tensor; 0 for dimensions that differ (text rows)."
    )
    encoder: str = Field(description='Name, e.g. "efficientnet-lite0" or "tokenizer@3f2a...".')
    fingerprint: str = Field(description="Fingerprint of the encoder and its inputs.")
    config: dict[str, Any] = Field(
        description='Resolved config of the column; "encoders" maps names to fingerprints.'
    )
    raw_fingerprint: str = Field(
        default="", description="Fingerprint of the raw shards it was computed from."
    )
    truncated: NonNegativeInt = Field(
        default=0, description="Text: clips whose caption is longer than the encoder accepts."
    )
    shards: list[ShardEntry] = Field(description="Its shards, in the order of the raw shards.")


class Manifest(Config):
    """Contents of a data folder: the document that trainers read first."""

    format: Literal[1] = Field(default=FORMAT_VERSION, description="Version of the format.")
    fingerprint: str = Field(description="Fingerprint of the config and all raw SHA-256 sums.")
    config: dict[str, Any] = Field(description="Resolved config of `landiff shards`.")
    shards: list[ShardEntry] = Field(description="The raw shards, in order.")
    columns: dict[str, Column] = Field(default_factory=dict, description="Columns by name.")
    rejects: list[Reject] = Field(default_factory=list, description="Rejected clips.")
    reject_counts: dict[str, int] = Field(
        default_factory=dict, description='Number of rejected clips by "stage/reason".'
    )
    ignored_counts: dict[str, int] = Field(
        default_factory=dict, description="Number of ignored files of the source, by kind."
    )
    ignored_examples: dict[str, list[str]] = Field(
        default_factory=dict, description="Names of the first ignored files, by kind."
    )

    @property
    def num_samples(self) -> int:
        """Number of raw samples."""
        return sum(shard.samples for shard in self.shards)


def column_stem(column: str) -> str:
    """Part and tensor name of a column, up to its first dash: "text-minilm" -> "text"."""
    return column.split("-", 1)[0]


def content_fingerprint(*parts: Any) -> str:
    """16 hex digits of a hash over JSON values. Equal values give equal fingerprints."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
