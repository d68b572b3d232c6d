"""Configs of the data side. Torch-free."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from configs.base import Config


class DataConfig(Config):
    """What a trainer reads, and how it is cut into batches."""

    manifest: Path  # data folder, or its manifest.json
    global_batch_size: PositiveInt  # samples of one optimizer step over all ranks
    micro_batch_size: PositiveInt = 1  # samples of one forward on one rank
    seed: NonNegativeInt = 0  # of the order; the global order is a function of (manifest, seed, epoch)
    shuffle_window: PositiveInt = 16  # shards whose samples are mixed
    prefetch_batches: NonNegativeInt = 2  # read ahead in the background; 0 = in the trainer's own thread
    adopt: bool = False  # accept columns whose fingerprints don't fit; the one way past the refusal
