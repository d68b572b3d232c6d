"""Interface between precompute tasks and the producers of columns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from landiff.data_pipeline.format.schema import ShardEntry
from landiff.data_pipeline.precompute.clips import Clip, Result
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.precompute.units import ColumnCard
from landiff.data_pipeline.precompute.write import StageTimer
from landiff.model_zoo.device import pick_device

MAX_ENCODE_THREADS = 8  # default limit on a CPU; each thread holds a batch of frames
GPU_ENCODE_THREADS = 2  # one batch is copied to the GPU while the other is encoded

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
    encode_threads: int  # batches that are copied to the device or encoded at the same time
    copies: torch.cuda.Stream | None = None  # of the copies to a GPU
    turn: threading.Lock = field(default_factory=threading.Lock)  # of the encoders on a GPU

    @classmethod
    def of(cls, config: PrecomputeConfig) -> ProducerContext:
        """Choose the device and the number of encoding threads for a config."""
        device = pick_device(config.device)
        copies = None
        threads = GPU_ENCODE_THREADS
        if device.type == "cpu":
            threads = min(torch.get_num_threads(), MAX_ENCODE_THREADS)
        elif device.type == "cuda":
            copies = torch.cuda.Stream(device)
        return cls(config, device, StageTimer(), config.encode_threads or threads, copies)

    @property
    def running_encoders(self) -> int:
        """Number of batches whose encoder may run at the same time."""
        return self.encode_threads if self.device.type == "cpu" else 1

    @contextmanager
    def encoding(self, stage: str) -> Iterator[None]:
        """Add the time of an encoder in the `with` block to `stage`.

        On a GPU, waits until no other thread's encoder runs, since two at once need the memory of
        two batches and are not faster. Inputs are stacked outside of the block, so that they are
        copied while the encoder of another batch runs.
        """
        if self.device.type == "cpu":
            with self.timer(stage):
                yield
            return
        with self.turn, self.timer(stage):
            yield
            if self.copies is not None:  # the time of a stage is that of its kernels
                torch.cuda.current_stream(self.device).synchronize()

    def stack(self, inputs: Sequence[np.ndarray] | Sequence[Tensor]) -> Tensor:
        """Stack videos or features of one shape on the device, [B, ...].

        To a GPU they are copied from pinned memory, in a stream of its own. PyTorch keeps pinned
        memory that is released for later batches, so each encoding thread has a buffer.
        """
        with self.timer("stack"):
            tensors = [torch.as_tensor(value) for value in inputs]
            if self.copies is None or tensors[0].is_cuda:
                return torch.stack(tensors).to(self.device)
            shape = (len(tensors), *tensors[0].shape)
            stacked = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=True)
            torch.stack(tensors, out=stacked)
            with torch.cuda.stream(self.copies):
                copied = stacked.to(self.device, non_blocking=True)
            self.copies.synchronize()
            # `copies` may use this memory for another batch only after the encoder has read it
            copied.record_stream(torch.cuda.current_stream(self.device))
            return copied


BuildProducers = Callable[[Sequence[str], ProducerContext], Mapping[str, Producer]]
