"""Config of `landiff precompute`. Imports no torch.

    data: data
    zoo: zoo
    columns:
      tokens: {tokenizer: tokenizer, encoder: {kind: efficientnet-lite0}}
      latents: {encoder: {kind: dct}}
      text-minilm: {encoder: {kind: minilm}}

The name of a column up to the first dash is its kind: features, tokens, latents, text, captions,
embedding or score.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from landiff.configs.base import Config
from landiff.data_pipeline.format.schema import RAW, column_stem
from landiff.model_zoo.frozen.config import CodecConfig, TextConfig, VisionConfig, VlmConfig


class FeaturesColumn(Config):
    """Vision features of the semantic frames."""

    kind: Literal["features"] = Field(
        default="features",
        description="Kind of the column. It follows from the column's name and need not be set.",
    )
    encoder: VisionConfig = Field(description="Frozen vision encoder that computes the features.")
    frame_stride: PositiveInt = Field(
        default=4,
        description="Video frames per semantic frame after the first. "
        "Set it to the temporal compression of the codec.",
    )


class TokensColumn(Config):
    """Semantic tokens: vision features encoded by a tokenizer of the zoo.

    Stored features are used instead of the videos if the column `features` is there and has the
    same encoder.
    """

    kind: Literal["tokens"] = Field(
        default="tokens",
        description="Kind of the column. It follows from the column's name and need not be set.",
    )
    tokenizer: str = Field(
        description="Tokenizer as a zoo reference: NAME, NAME@FINGERPRINT or a path."
    )
    encoder: VisionConfig = Field(
        description="Frozen vision encoder that the tokenizer was trained with."
    )
    frame_stride: PositiveInt = Field(
        default=4,
        description="Video frames per semantic frame after the first. "
        "Set it to the temporal compression of the codec.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Precision of the tokenizer. bf16 runs float32 weights under autocast, "
        "as the released model does.",
    )


class LatentsColumn(Config):
    """Latents of the whole clip.

    Stores the codec's posterior mean, one fixed sample of the posterior, or mean and log-variance.
    From mean and log-variance the trainer samples anew in every epoch; they take twice the
    disk space.
    """

    kind: Literal["latents"] = Field(
        default="latents",
        description="Kind of the column. It follows from the column's name and need not be set.",
    )
    encoder: CodecConfig = Field(description="Frozen codec that computes the latents.")
    sample_seed: NonNegativeInt | None = Field(
        default=None,
        description="Seed of one fixed posterior sample per clip, with noise keyed by seed and "
        "clip. null stores the posterior mean.",
    )
    moments: bool = Field(
        default=False,
        description="Store posterior mean and log-variance, [T, 2C, H, W], instead of latents.",
    )

    @model_validator(mode="after")
    def _mean_sample_or_moments(self) -> LatentsColumn:
        """Reject `moments` together with `sample_seed`."""
        if self.moments and self.sample_seed is not None:
            raise ValueError(
                "moments = true stores mean and log-variance, "
                f"sample_seed = {self.sample_seed} stores one sample; leave one out"
            )
        return self


class TextColumn(Config):
    """Text states of the captions: real rows only, or all rows of a padded encoder."""

    kind: Literal["text"] = Field(
        default="text",
        description="Kind of the column. It follows from the column's name and need not be set.",
    )
    encoder: TextConfig = Field(description="Frozen text encoder that computes the text states.")
    caption: NonNegativeInt = Field(
        default=0,
        description="Index of the caption to encode, counted from 0. "
        "The last caption is used for clips that have fewer.",
    )
    captions: str | None = Field(
        default=None,
        description="Column with the captions to encode, such as captions-qwen. null: the captions "
        "of the raw shards.",
    )


class CaptionFileConfig(Config):
    """Captions that were made elsewhere."""

    kind: Literal["file"] = Field(default="file", description="Kind of the captions.")
    path: Path = Field(
        description="JSONL or parquet file with one row for each clip. Parquet needs the extra "
        "[parquet]."
    )
    key: str = Field(default="key", description="Column with the key of the clip or its source.")
    by: Literal["key", "source"] = Field(
        default="key",
        description=(
            "Whether `key` identifies clips (their `key` in the raw samples) or videos (`source`)."
        ),
    )
    captions: tuple[str, ...] = Field(
        default=("caption",),
        min_length=1,
        description="Columns with captions, each a string or a list of strings.",
    )


class CaptionsColumn(Config):
    """Captions of the clips, for text columns: written by a model, or made elsewhere."""

    kind: Literal["captions"] = Field(
        default="captions",
        description="Kind of the column. It follows from the column's name and need not be set.",
    )
    encoder: Annotated[VlmConfig | CaptionFileConfig, Field(discriminator="kind")] = Field(
        description="Origin of the captions: a vision-language model, or a file."
    )


class EmbeddingColumn(Config):
    """One vector of each clip, by which near duplicates are found."""

    kind: Literal["embedding"] = Field(
        default="embedding",
        description="Kind of the column. It follows from the column's name and need not be set.",
    )
    encoder: VisionConfig = Field(description="Frozen vision encoder whose features are averaged.")
    frame_stride: PositiveInt = Field(
        default=4, description="Video frames per semantic frame after the first."
    )


class MeasureScore(Config):
    """A measure of the frames."""

    kind: Literal["measure"] = Field(default="measure", description="Kind of the score.")
    measure: Literal["brightness", "static", "text_area"] = Field(
        description=(
            "Measurement: mean luma from 0 to 1, fraction of frames that are equal to the previous "
            "frame, or fraction of the frame area covered by recognized text, which needs the "
            "extra [text]."
        )
    )


class NetworkScore(Config):
    """A small trained head on the embedding: aesthetic score, NSFW, watermark for instance."""

    kind: Literal["network"] = Field(default="network", description="Kind of the score.")
    path: Path = Field(
        description="Linear layers in a safetensors file, named 0.weight, 0.bias, 2.weight, ..., "
        "or weight and bias of one layer. Names may have a prefix."
    )
    encoder: VisionConfig = Field(
        description="Frozen vision encoder on whose averaged features the head was trained."
    )
    frame_stride: PositiveInt = Field(
        default=4, description="Video frames per semantic frame after the first."
    )
    activation: Literal["none", "relu", "gelu"] = Field(
        default="none", description="Activation function between the layers."
    )
    output: Literal["identity", "sigmoid", "softmax"] = Field(
        default="identity", description="Function applied to the outputs of the last layer."
    )
    index: NonNegativeInt = Field(default=0, description="Index of the output that is the score.")


class DuplicateScore(Config):
    """Largest cosine similarity of the embedding to that of an earlier clip."""

    kind: Literal["duplicate"] = Field(default="duplicate", description="Kind of the score.")
    embedding: str = Field(description="Finished column of embeddings, such as embedding-lite0.")


class ScoreColumn(Config):
    """A number of each clip, for conditions such as `data.where=aesthetic > 4`."""

    kind: Literal["score"] = Field(
        default="score",
        description="Kind of the column. It follows from the column's name and need not be set.",
    )
    head: Annotated[MeasureScore | NetworkScore | DuplicateScore, Field(discriminator="kind")] = (
        Field(description="What computes the score.")
    )


ColumnConfig = Annotated[
    FeaturesColumn
    | TokensColumn
    | LatentsColumn
    | TextColumn
    | CaptionsColumn
    | EmbeddingColumn
    | ScoreColumn,
    Field(discriminator="kind"),
]
KINDS = ("features", "tokens", "latents", "text", "captions", "embedding", "score")


class PrecomputeConfig(Config):
    """Columns to compute for the raw shards of a data folder."""

    data: Path = Field(description="Data folder with the raw shards. Columns are written to it.")
    zoo: Path = Field(description="Folder of zoo entries in which tokenizers are looked up.")
    columns: dict[str, ColumnConfig] = Field(
        description="Columns to compute, by name. A name starts with the kind of the column: "
        "features, tokens, latents, text, captions, embedding or score, with a suffix after a "
        "dash, such as text-minilm."
    )
    device: str = Field(
        default="auto",
        description='Device of the encoders, such as "cpu" or "cuda:1". '
        '"auto" uses a GPU if there is one.',
    )
    batch_size: PositiveInt = Field(
        default=8, description="Number of clips per forward pass of an encoder."
    )
    decoder: Literal["decord", "pyav"] = Field(
        default="decord",
        description="Library that decodes the clips of raw shards. "
        "It is part of the fingerprint of columns computed from frames.",
    )
    decode_threads: PositiveInt = Field(
        default=2, description="Number of clips that are decoded at the same time."
    )
    encode_threads: PositiveInt | None = Field(
        default=None,
        description=(
            "Number of batches processed at the same time. On a GPU, one of them is encoded while "
            "the others are copied to it. null: 2 on a GPU, and on a CPU the number of torch "
            "threads, at most 8."
        ),
    )
    compile_blocks: bool = Field(
        default=False,
        description=(
            "Compile the blocks of Theia, T5, MiniLM and the tokenizer with torch.compile, which "
            "needs a compiler. Faster on CUDA, but the start takes minutes longer. Results differ "
            "by rounding, so do not change it while a column is being computed. Does not affect "
            "other encoders."
        ),
    )
    max_bad_fraction: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description=(
            "Maximum fraction of a column's clips that may be rejected. If more are rejected, the "
            "job stops."
        ),
    )
    redo: tuple[str, ...] = Field(
        default=(),
        description=(
            "Columns to recompute if they were computed by a different encoder. Other columns are "
            "never replaced."
        ),
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _kind_from_name(cls, columns: Any) -> Any:
        """Set the kind of each column from its name."""
        if not isinstance(columns, dict):
            return columns
        with_kinds = {}
        unknown = []
        for name, column in columns.items():
            kind = column_stem(str(name))
            if kind not in KINDS:
                unknown.append(_unknown_kind(str(name), kind))
            if isinstance(column, dict):
                column = {"kind": kind, **column}
            with_kinds[name] = column
        if unknown:
            raise ValueError("; ".join(unknown))
        return with_kinds

    @model_validator(mode="after")
    def _names(self) -> PrecomputeConfig:
        """Check that column names match their kinds and can be folder names."""
        if not self.columns:
            raise ValueError(
                "columns is empty: name at least one of features, tokens, latents, text-<encoder>"
            )
        for name, column in self.columns.items():
            if column.kind != column_stem(name):
                raise ValueError(
                    f"columns.{name} is of kind {column.kind}; "
                    f"its name must begin with {column.kind!r}"
                )
            letters = name.replace("-", "").replace("_", "").replace(".", "")
            if name == RAW or name.startswith(".") or not letters.isalnum():
                raise ValueError(
                    f"columns.{name}: the name of a column is a folder name; "
                    "use letters, digits, dash, dot and underscore"
                )
        unknown = sorted(set(self.redo) - set(self.columns))
        if unknown:
            raise ValueError(
                f"redo names {', '.join(unknown)}; columns has {', '.join(self.columns)}"
            )
        return self


def column_groups(config: PrecomputeConfig) -> list[list[str]]:
    """Group the columns that are computed together.

    Columns of captions come first, for the text columns that encode them. Each of both is its own
    group, so that only one large model is in memory. All other columns need frames and form the
    last group, so that each clip is decoded once.
    """
    groups: list[list[str]] = []
    with_frames: list[str] = []
    for name, column in config.columns.items():
        if isinstance(column, CaptionsColumn):
            groups.append([name])
    for name, column in config.columns.items():
        if isinstance(column, TextColumn):
            groups.append([name])
        elif not isinstance(column, CaptionsColumn):
            with_frames.append(name)
    if with_frames:
        groups.append(with_frames)
    return groups


def _unknown_kind(name: str, kind: str) -> str:
    """Error message for a column whose name does not begin with a kind."""
    suggestion = ""
    near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
    if near:
        suggestion = f"did you mean {name.replace(kind, near[0], 1)!r}? "
    return (
        f"columns.{name}: the name of a column begins with its kind, {', '.join(KINDS)}, "
        f"with a dash before any suffix; {suggestion}e.g. text-minilm, latents-vae"
    )
