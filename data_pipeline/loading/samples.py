"""Samples as loaders return them, and the batches of training and validation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from landiff.data_pipeline.format.schema import RawSample


@dataclass(frozen=True)
class Sample:
    """Columns of one clip."""

    key: str
    epoch: int
    index: int  # in the endless stream: step * global batch size + position, see `loader`
    position: int  # in the global batch
    meta: RawSample
    tensors: dict[str, Tensor]  # by column name, e.g. "tokens", "text-minilm"


@dataclass(frozen=True)
class Batch:
    """The part of global batch `step` (from 0) that this data-parallel rank reads."""

    step: int
    global_batch_size: int
    micro_batches: tuple[tuple[Sample, ...], ...]
    bucket: str = ""  # clip shape of all samples; "" if the data do not name it

    @property
    def samples(self) -> Iterator[Sample]:
        """The samples of all micro-batches, in order."""
        return itertools.chain.from_iterable(self.micro_batches)


@dataclass(frozen=True)
class HeldOutBatch:
    """One micro-batch of held-out clips of one data-parallel rank.

    All ranks get equally many batches of equally many samples.

    samples: their `index` is a hash of the key, so that random numbers keyed by it do not depend on
        the step, the rank or the micro-batch.
    others: for each sample a clip of another video with another caption, for losses under a wrong
        condition. None if there is none.
    counted: False for samples that only fill up the batch and must not count.
    first: number of the first clip of all ranks' batches, in the order of the held-out clips. The
        number of a sample is its `position`.
    bucket: clip shape of all samples; "" if the data do not name it.
    """

    samples: tuple[Sample, ...]
    others: tuple[Sample | None, ...]
    counted: tuple[bool, ...]
    first: int = 0
    bucket: str = ""
