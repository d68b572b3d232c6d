"""Config of `landiff precompute`. Torch-free.

    data: data
    zoo: zoo
    columns:
      tokens: {tokenizer: tokenizer, encoder: {kind: efficientnet-lite0}}
      latents: {encoder: {kind: dct}}
      text-minilm: {encoder: {kind: minilm}}

What a column holds follows from its name up to the first dash: features, tokens, latents or text.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from landiff.configs.base import Config
from landiff.data_pipeline.format.schema import RAW, column_stem
from landiff.model_zoo.frozen.config import CodecConfig, TextConfig, VisionConfig


class FeaturesColumn(Config):
    """Vision features of the semantic frames."""

    kind: Literal["features"] = "features"
    encoder: VisionConfig
    frame_stride: PositiveInt = (
        4  # video frames per semantic frame after the first: the codec's compression
    )


class TokensColumn(Config):
    """Semantic tokens: vision features through a tokenizer of the zoo.

    The column `features` is used instead of the videos where it comes from the same encoder.
    """

    kind: Literal["tokens"] = "tokens"
    tokenizer: str  # zoo reference: name, name@fingerprint or path
    encoder: VisionConfig
    frame_stride: PositiveInt = 4
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of the tokenizer; bf16: float32 weights under autocast, as in the release",
    )


class LatentsColumn(Config):
    """Latents of the whole clip: the codec's mean, one fixed sample of its posterior, or its mean and log-variance.

    Of mean and log-variance the trainer draws another sample in every epoch; they take twice the room.
    """

    kind: Literal["latents"] = "latents"
    encoder: CodecConfig
    sample_seed: NonNegativeInt | None = (
        None  # None: the mean; else noise keyed by (seed, clip key)
    )
    moments: bool = False  # [T, 2C, H, W]: the mean, then the log-variance

    @model_validator(mode="after")
    def _one_of_them(self) -> LatentsColumn:
        if self.moments and self.sample_seed is not None:
            raise ValueError(
                f"moments = true stores mean and log-variance, sample_seed = {self.sample_seed} one sample of them; leave one out"
            )
        return self


class TextColumn(Config):
    """Text states of the captions: real rows only, or all rows of a padded encoder."""

    kind: Literal["text"] = "text"
    encoder: TextConfig
    caption: NonNegativeInt = (
        0  # which of a clip's captions, counted from 0; a clip with fewer gives its last
    )


ColumnConfig = Annotated[
    FeaturesColumn | TokensColumn | LatentsColumn | TextColumn, Field(discriminator="kind")
]
KINDS = ("features", "tokens", "latents", "text")


class PrecomputeConfig(Config):
    """Which columns to compute for the raw shards of `data`, and how."""

    data: Path
    zoo: Path
    columns: dict[str, ColumnConfig]
    device: str = "auto"  # "auto": the GPU where there is one; else "cpu", "cuda:1", ...
    batch_size: PositiveInt = 8  # clips that go through an encoder together
    decoder: Literal["decord", "pyav"] = (
        "decord"  # of the clips in raw shards; part of the fingerprint of what it feeds
    )
    decode_threads: PositiveInt = 2
    encode_threads: PositiveInt | None = (
        None  # batches that are encoded at once; None: 1 on a GPU; on a CPU as many as torch has threads, 8 at most
    )
    max_bad_fraction: float = Field(
        default=0.05, ge=0, le=1
    )  # of the clips of a column; more set aside stop the job
    redo: tuple[str, ...] = ()  # columns to make anew where another encoder made what is there

    @field_validator("columns", mode="before")
    @classmethod
    def _kind_from_name(cls, columns: Any) -> Any:
        if not isinstance(columns, dict):
            return columns
        for name in map(str, columns):
            if column_stem(name) not in KINDS:
                near = difflib.get_close_matches(column_stem(name), KINDS, n=1, cutoff=0.5)
                meant = (
                    f"did you mean {name.replace(column_stem(name), near[0], 1)!r}? "
                    if near
                    else ""
                )
                raise ValueError(
                    f"columns.{name}: the name of a column begins with what it holds, "
                    f"{', '.join(KINDS)}, and a dash "
                    f"where more follows; {meant}e.g. text-minilm, latents-vae"
                )
        return {
            name: {"kind": column_stem(str(name)), **column} if isinstance(column, dict) else column
            for name, column in columns.items()
        }

    @model_validator(mode="after")
    def _names(self) -> PrecomputeConfig:
        if not self.columns:
            raise ValueError(
                "columns is empty: name at least one of features, tokens, latents, text-<encoder>"
            )
        for name, column in self.columns.items():
            if column.kind != column_stem(name):
                raise ValueError(
                    f"columns.{name} is of kind {column.kind}; its name must begin with {column.kind!r}"
                )
            if (
                name == RAW
                or not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
                or name.startswith(".")
            ):
                raise ValueError(
                    f"columns.{name}: a column names a folder; use letters, digits, dash, dot and underscore"
                )
        unknown = sorted(set(self.redo) - set(self.columns))
        if unknown:
            raise ValueError(
                f"redo names {', '.join(unknown)}; columns has {', '.join(self.columns)}"
            )
        return self
