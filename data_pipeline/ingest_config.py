"""Config of `landiff shards`. Torch-free."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from configs.base import Config

Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]


class DecoderJobConfig(Config):
    """How the work is done. None of it changes a byte of the result."""

    workers: PositiveInt = 2  # threads, each with a decoder process
    timeout_s: PositiveFloat = 120.0  # for one video
    memory_limit_mb: PositiveInt = 3072  # of one decoder process


class ColumnsConfig(Config):
    """Names of the columns of a CSV or the keys of a JSONL."""

    file: str = "file"
    caption: str = "caption"
    start_s: str = "start_s"  # optional in the file
    end_s: str = "end_s"  # optional in the file


class EncodingConfig(Config):
    """x264 settings of the clips in the shards."""

    crf: NonNegativeInt = 14  # lower is better; at 14 the loss is small against that of halving the chroma
    preset: Preset = "slow"


class ShardsConfig(Config):
    """Which videos become which clips.

    `source` is "packaged" (the clips that come with the project), a folder (its captions.jsonl or
    captions.csv, else every video with a caption in the .txt beside it), a .csv or .jsonl with captions and
    spans, or WebDataset tars of clips (a .tar, a folder of them, or names with {000000..000123}).
    """

    source: str
    num_frames: PositiveInt
    fps: PositiveFloat
    height: PositiveInt
    width: PositiveInt
    max_spans: PositiveInt = 1  # clips cut from one video or span, one after the other
    samples_per_shard: PositiveInt = 256
    max_pixels: PositiveInt = 4096 * 2304  # of a frame of the source; larger ones are set aside
    columns: ColumnsConfig = ColumnsConfig()
    encoding: EncodingConfig = EncodingConfig()
    job: DecoderJobConfig = DecoderJobConfig()

    @field_validator("height", "width")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even (yuv420p)")
        return value

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to write into one folder."""
        return self.model_dump(mode="json", exclude={"job", "source", "columns"})

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: all but how the work was done."""
        return self.model_dump(mode="json", exclude={"job"})
