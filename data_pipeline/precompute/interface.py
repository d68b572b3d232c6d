"""Interface between precompute tasks and the producers of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from landiff.data_pipeline.format.schema import ShardEntry
from landiff.data_pipeline.precompute.clips import Clip, Result
from landiff.data_pipeline.precompute.config import CaptionsColumn, PrecomputeConfig, TextColumn
from landiff.data_pipeline.precompute.units import ColumnCard
from landiff.data_pipeline.precompute.write import StageTimer
from landiff.model_zoo.device import pick_device

MAX_ENCODE_THREADS = 8  # default limit on a CPU; each thread holds a batch of frames

# Results of one batch that several columns use, by the fingerprint of what was computed. A batch
# is encoded by one thread, so the cache needs no lock.
BatchCache = dict[str, list[Result]]


class Encode(Protocol):
    """Encodes batches of one shard. Called from several threads, each time with another batch."""

    def __call__(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Return one result for each clip. `cache` is shared by all columns of this batch."""
        ...


@runtime_checkable
class CountsTruncated(Protocol):
    """An `Encode` that counts captions longer than the text encoder accepts."""

    @property
    def truncated(self) -> int:
        """Number of clips with a truncated caption, valid after the last batch."""
        ...


class Producer(Protocol):
    """Computes one column from clips."""

    card: ColumnCard

    def prepare(self, entry: ShardEntry) -> bool:
        """Choose the input of a shard's encoding. Returns whether it needs decoded frames.

        Called once for each shard before `begin`, in the same order and several shards ahead.
        """
        ...

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        """Return the encoder of a shard.

        `clips` are all clips that will be encoded, without frames: usually those of the shard.
        Batches start in order but may finish in any order.
        """
        ...

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """Measure a stored tensor for `landiff precompute verify`.

        Returns values by name. A positive "bad_values" is reported as a problem.
        """
        ...

    def collapse(self, counts: np.ndarray) -> str:
        """Describe what is wrong with a histogram of the column's codes.

        Returns "" if nothing is wrong, and for columns without codes.
        """
        ...


def prepare_shard(producers: Iterable[Producer], entry: ShardEntry) -> bool:
    """Prepare every producer for a shard. Returns whether any of them needs decoded frames."""
    needs_frames = False
    for producer in producers:
        if producer.prepare(entry):
            needs_frames = True
    return needs_frames


@dataclass(frozen=True)
class ProducerContext:
    """Config, device and timer that all producers of a task use."""

    config: PrecomputeConfig
    device: torch.device
    timer: StageTimer
    encode_threads: int  # batches that are encoded at the same time

    @classmethod
    def of(cls, config: PrecomputeConfig) -> ProducerContext:
        """Choose the device and the number of encoding threads for a config."""
        device = pick_device(config.device)
        threads = 1  # a GPU runs one batch after another
        if device.type == "cpu":
            threads = min(torch.get_num_threads(), MAX_ENCODE_THREADS)
        return cls(config, device, StageTimer(), config.encode_threads or threads)

    def stack(self, videos: list[np.ndarray]) -> Tensor:
        """Stack videos of one shape into a uint8 tensor [B, T, H, W, 3] on the device."""
        return torch.from_numpy(np.stack(videos)).to(self.device)


BuildProducers = Callable[[Sequence[str], ProducerContext], Mapping[str, Producer]]


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
