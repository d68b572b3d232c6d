"""Configs of the data side. Torch-free."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from landiff.configs.base import Config, ConfigError


class SourceConfig(Config):
    """One data set."""

    manifest: Path  # data folder, or its manifest.json; with `remote`, the folder that caches what was fetched
    remote: str = (
        ""  # fsspec URL of the data folder, e.g. s3://bucket/train; "": `manifest` holds everything
    )
    cache_gigabytes: PositiveFloat = (
        100.0  # of shards in `manifest` that `remote` may fill; the least recently used go
    )
    weight: PositiveFloat = (
        1.0  # how often a sample comes in an epoch: 1 exactly once, 0.5 every second epoch, 2 twice
    )


class DataConfig(SourceConfig):
    """What a trainer reads, and how it is cut into batches."""

    blend: tuple[SourceConfig, ...] = ()  # further data sets, mixed evenly with the first
    global_batch_size: PositiveInt  # samples of one optimizer step over all ranks
    micro_batch_size: PositiveInt = 1  # samples of one forward on one rank
    seed: NonNegativeInt = (
        0  # of the order; the global order is a function of (manifest, seed, epoch)
    )
    shuffle_window: PositiveInt = 16  # shards whose samples are mixed
    prefetch_batches: NonNegativeInt = (
        2  # read ahead in the background; 0 = in the trainer's own thread
    )
    read_threads: PositiveInt = Field(
        default=1, le=64
    )  # that share the reading of each batch, and as many to fetch; more for remote data
    checksum: bool = False  # compare every tensor with the CRC-32 it was written with (0.15 s a GB); without, names and sizes only
    adopt: bool = False  # accept columns whose fingerprints don't fit; the one way past the refusal

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All data sets, the first one first."""
        return (self, *self.blend)

    def micro_batches(self, copies: int) -> int:
        """Micro-batches of one data-parallel copy in one step.

        Raises ConfigError where the global batch does not divide, with the nearest sizes and copies that do.
        """
        batch, micro = self.global_batch_size, self.micro_batch_size
        unit = micro * copies
        if batch % unit == 0:
            return batch // unit
        below = batch // unit * unit
        sizes = [below, below + unit] if below else [unit]
        fit = [number for number in range(1, batch // micro + 1) if batch % (micro * number) == 0]
        fewer = [number for number in fit if number < copies]
        more = [number for number in fit if number > copies]
        others = [*fewer[-1:], *more[:1]]
        text = (
            f"data.global_batch_size = {batch} is not a multiple of data-parallel ranks * "
            "data.micro_batch_size = "
            f"{copies} * {micro}; the nearest that are: {' or '.join(map(str, sizes))}"
        )
        if others:
            text += f"; or run {' or '.join(map(str, others))} data-parallel ranks"
        raise ConfigError(text)
