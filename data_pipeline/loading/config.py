"""Config of the data that a trainer reads. Torch-free."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from landiff.configs.base import Config, ConfigError


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
        description="How often each sample occurs in an epoch of the blend: 1 is once, 0.5 every "
        "second epoch, 2 twice.",
    )


class DataConfig(SourceConfig):
    """What a trainer reads, and how it is divided into batches."""

    blend: tuple[SourceConfig, ...] = Field(
        default=(), description="Further data sets, mixed evenly with the first by weight."
    )
    global_batch_size: PositiveInt = Field(
        description="Samples of one optimizer step over all ranks."
    )
    micro_batch_size: PositiveInt = Field(
        default=1, description="Samples of one forward pass on one rank."
    )
    seed: NonNegativeInt = Field(
        default=0,
        description="Seed of the sample order, which depends only on manifest, seed and epoch.",
    )
    shuffle_window: PositiveInt = Field(
        default=16, description="Number of shards whose samples are mixed."
    )
    prefetch_batches: NonNegativeInt = Field(
        default=2,
        description="Batches that are read ahead in background threads. 0 reads in the trainer's "
        "thread.",
    )
    read_threads: PositiveInt = Field(
        default=1,
        le=64,
        description="Threads that read each batch together, and as many that download shards. "
        "Remote data need more.",
    )
    checksum: bool = Field(
        default=False,
        description="Compare every tensor with its stored CRC-32 (0.15 s per GB). Without it, only "
        "names and sizes are checked.",
    )
    adopt: bool = Field(
        default=False, description="Use columns even if their fingerprints do not agree."
    )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All data sets, this one first."""
        return (self, *self.blend)

    def micro_batches(self, copies: int) -> int:
        """Micro-batches per step of each of `copies` data-parallel ranks.

        Raises ConfigError, with the nearest valid numbers, if the global batch does not divide.
        """
        batch = self.global_batch_size
        micro = self.micro_batch_size
        unit = micro * copies
        if batch % unit == 0:
            return batch // unit
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
