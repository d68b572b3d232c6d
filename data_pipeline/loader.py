"""Samples in a global order that depends on (manifest, seed, epoch) alone, with exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from data_pipeline.schema import RawSample


@dataclass(frozen=True)
class Sample:
    """One clip's columns. `index` is its place in the endless stream of samples: step * global batch + position."""

    key: str
    epoch: int
    index: int
    position: int  # in the global batch
    meta: RawSample
    tensors: dict[str, Tensor]  # by column name, e.g. "tokens", "text-minilm"


@dataclass(frozen=True)
class Batch:
    """This data-parallel rank's share of global batch `step` (0-based), cut into micro-batches."""

    step: int
    global_batch_size: int
    micro_batches: tuple[tuple[Sample, ...], ...]

    @property
    def samples(self) -> Iterator[Sample]:
        return (sample for micro in self.micro_batches for sample in micro)
