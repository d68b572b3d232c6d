"""Config of the data that a trainer reads. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from landiff.configs.base import Config, ConfigError, refuse_values
from landiff.data_pipeline.format.buckets import BucketName
from landiff.data_pipeline.loading.where import Where


class SourceConfig(Config):
    """One data set."""

    manifest: Path = Field(
        description="Data folder, or its manifest.json. With `remote`, the folder that caches "
        "downloaded shards."
    )
    remote: str = Field(
        default="",
        description="fsspec URL of the data folder, e.g. s3://bucket/train. Empty if the data are "
        "local, in `manifest`.",
    )
    cache_gigabytes: PositiveFloat = Field(
        default=100.0,
        description="Maximum size of the cache of a remote data folder in GB (10^9 bytes). The "
        "least recently used shards are deleted first.",
    )
    weight: PositiveFloat = Field(
        default=1.0,
        description=(
            "How often each sample occurs in an epoch of the blend: 1 is once, 0.5 is once in two "
            "epochs, 2 is twice."
        ),
    )
    where: str | None = Field(
        default=None,
        description=(
            "Condition on metadata and score columns, such as `motion > 0.2 and aesthetic >= 4`. "
            "Only clips that meet it are trained on. null: all clips."
        ),
    )

    @field_validator("where")
    @classmethod
    def _parses(cls, where: str | None) -> str | None:
        if where:
            try:
                Where(where)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return where


class ValidationConfig(Config):
    """Which clips are held out of training, and how many of them are validated.

    Exactly one of `fraction`, `clips`, `clips_file` and `data_set` is set. All clips of a held-out
    video are excluded from training, in all data sets of a blend.
    """

    fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=(
            "Fraction of source videos that are held out, chosen by a hash of each video. The "
            "choice does not change when data are added. Of very few videos, at least one is held "
            "out."
        ),
    )
    clips: tuple[str, ...] = Field(
        default=(),
        description=(
            "Keys of clips, or names of source videos as in `source` of the raw samples. Other "
            "clips of the same videos are used neither for training nor for validation."
        ),
    )
    clips_file: Path | None = Field(
        default=None, description="Text file with one entry of `clips` per line."
    )
    data_set: SourceConfig | None = Field(
        default=None,
        description=(
            "A separate data set with the same columns. Clips of its videos are excluded from "
            "training."
        ),
    )
    max_clips: PositiveInt = Field(
        default=256,
        description=(
            "Maximum number of clips used for validation: those with the lowest hash of their key."
        ),
    )

    @model_validator(mode="after")
    def _one_way(self, info: ValidationInfo) -> ValidationConfig:
        values = {
            "fraction": self.fraction,
            "clips": self.clips,
            "clips_file": self.clips_file,
            "data_set": self.data_set,
        }
        given = [name for name, value in values.items() if value]
        if len(given) != 1:
            refuse_values(
                info,
                [
                    f"set exactly one of {', '.join(values)}, not "
                    f"{' and '.join(given) or 'none of them'}"
                ],
            )
        if self.data_set is not None and self.data_set.where:
            refuse_values(
                info, ["data_set.where is not supported: make a data set of the wanted clips"]
            )
        return self

    def read_clips(self) -> set[str]:
        """The entries of `clips` or `clips_file`. Raises ConfigError."""
        if self.clips_file is None:
            return set(self.clips)
        try:
            lines = self.clips_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.validation.clips_file = {self.clips_file} cannot be read: {error}"
            ) from None
        return {line.strip() for line in lines if line.strip()}

    def split_values(self) -> dict[str, Any]:
        """The values that determine which clips are held out of training."""
        return self.model_dump(mode="json", exclude={"max_clips"})


class RampConfig(Config):
    """A global batch size that grows in equal parts."""

    start: PositiveInt = Field(description="Global batch size of the first step.")
    increment: PositiveInt = Field(
        description="Number of samples by which the global batch size grows in each increment."
    )
    steps: PositiveInt = Field(
        description=(
            "Step at which `global_batch_size` is reached. Each batch size is used for the same "
            "number of steps."
        )
    )


class DataConfig(SourceConfig):
    """Data sets of a trainer, batch sizes, and the order of samples."""

    blend: tuple[SourceConfig, ...] = Field(
        default=(), description="Further data sets, mixed evenly with the first by weight."
    )
    global_batch_size: PositiveInt = Field(
        description="Number of samples per optimizer step over all ranks."
    )
    micro_batch_size: PositiveInt = Field(
        default=1, description="Number of samples per forward pass on one rank."
    )
    buckets: tuple[BucketName, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Clip shapes to train on, as frames x height x width: [1x480x720, 49x480x720]. All "
            "clips of a global batch have the same shape. null: all clips, which must have the "
            "model's shape."
        ),
    )
    balance_tokens: bool = Field(
        default=False,
        description=(
            "Use larger batches for smaller clips. `global_batch_size` and `micro_batch_size` are "
            "those of the bucket with the most tokens. For another bucket both are multiplied by "
            "the ratio of tokens per clip, rounded down. Needs `buckets`."
        ),
    )
    ramp: RampConfig | None = Field(
        default=None,
        description="Growth of the global batch size up to `global_batch_size`. null: it is "
        "constant.",
    )
    captions: dict[str, PositiveFloat] | None = Field(
        default=None,
        description=(
            "Text columns of alternative captions with their weights, such as {text-minilm: 0.7, "
            "text-minilm-short: 0.3}. One is chosen at random for each clip and epoch. They must "
            "include the trainer's text column, which validation uses. null: only that column."
        ),
    )
    seed: NonNegativeInt = Field(
        default=0,
        description="Seed of the sample order, which depends only on manifest, seed and epoch.",
    )
    shuffle_window: PositiveInt = Field(
        default=16, description="Number of shards whose samples are shuffled together."
    )
    prefetch_batches: NonNegativeInt = Field(
        default=2,
        description=(
            "Number of batches to read ahead in background threads. 0 reads in the trainer's "
            "thread."
        ),
    )
    read_threads: PositiveInt = Field(
        default=1,
        le=64,
        description=(
            "Number of threads that read the samples of a batch in parallel, and number of threads "
            "that download shards. Use more for remote data."
        ),
    )
    checksum: bool = Field(
        default=False,
        description=(
            "Verify the CRC-32 of every tensor (0.15 s per GB). Without it, only names and sizes "
            "are checked."
        ),
    )
    adopt: bool = Field(
        default=False, description="Use columns even if their fingerprints do not match."
    )
    validation: ValidationConfig | None = Field(
        default=None,
        description=(
            "Clips that are held out of training and evaluated every `loop.val_every` steps. null "
            "trains on all clips."
        ),
    )

    @model_validator(mode="after")
    def _buckets_fit(self, info: ValidationInfo) -> DataConfig:
        problems = []
        if self.balance_tokens and self.buckets is None:
            problems.append("balance_tokens needs buckets, the clip shapes that are balanced")
        if len(set(self.buckets or ())) < len(self.buckets or ()):
            problems.append(f"buckets names a shape twice: {', '.join(self.buckets or ())}")
        refuse_values(info, problems)
        return self

    @model_validator(mode="after")
    def _ramp_fits(self, info: ValidationInfo) -> DataConfig:
        ramp = self.ramp
        if ramp is None:
            return self
        growth = self.global_batch_size - ramp.start
        if growth < 0 or growth % ramp.increment:
            refuse_values(
                info,
                [
                    f"ramp.start = {ramp.start} does not reach global_batch_size = "
                    f"{self.global_batch_size} in parts of ramp.increment = {ramp.increment}; "
                    "their difference must be a multiple of the increment"
                ],
            )
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All data sets, this one first."""
        return (self, *self.blend)

    def micro_batches(self, copies: int) -> int:
        """Micro-batches per step of each of `copies` data-parallel ranks, at the end of a ramp.

        Raises ConfigError, with the nearest valid numbers, if the global batch does not divide.
        """
        require_micro_batches(self.global_batch_size, self.micro_batch_size, copies)
        return self.global_batch_size // (self.micro_batch_size * copies)


def require_micro_batches(batch: int, micro: int, copies: int) -> None:
    """Raise ConfigError unless `copies` data-parallel ranks divide a global batch evenly.

    `micro`: samples of one micro-batch. The message names the nearest valid numbers.
    """
    unit = micro * copies
    if batch % unit == 0:
        return
    below = batch // unit * unit
    sizes = [below, below + unit] if below else [unit]
    valid = [number for number in range(1, batch // micro + 1) if batch % (micro * number) == 0]
    fewer = [number for number in valid if number < copies]
    more = [number for number in valid if number > copies]
    others = [*fewer[-1:], *more[:1]]
    text = (
        f"data.global_batch_size = {batch} is not a multiple of data-parallel ranks * "
        f"data.micro_batch_size = {copies} * {micro}; the nearest that are: "
        f"{' or '.join(map(str, sizes))}"
    )
    if others:
        text += f"; or run {' or '.join(map(str, others))} data-parallel ranks"
    raise ConfigError(text)
