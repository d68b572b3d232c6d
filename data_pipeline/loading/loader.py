"""Samples in a global order that depends on (manifest, seed, epoch) alone, with exact resume.

Global batch k is samples k * G .. (k + 1) * G - 1 of the endless stream (order.py), whatever the number of
ranks; rank r of n takes every n-th of them, so micro-batch m of all ranks together is one stretch of the
global batch. What must survive a restart is one number: how many samples were handed out.

A blend of data sets and buckets of shapes change what global batch k holds (`order.BatchOrder`), nothing else.
The tensors of a batch share memory that is used again when the last of them is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.column_checks import check_blend, require_encoder
from landiff.data_pipeline.format.columns import AlignedColumns
from landiff.data_pipeline.format.schema import (
    FORMAT_VERSION,
    Manifest,
    RawSample,
    content_fingerprint,
)
from landiff.data_pipeline.format.shards import ShardError, read_manifest
from landiff.data_pipeline.format.tensors import Buffers
from landiff.data_pipeline.loading.config import DataConfig, SourceConfig
from landiff.data_pipeline.loading.fetch_ahead import FetchAhead
from landiff.data_pipeline.loading.order import BatchOrder, BlendSource
from landiff.data_pipeline.loading.position import check_position
from landiff.data_pipeline.loading.remote import ROOM, open_remote

__all__ = ["Batch", "Loader", "Sample", "open_manifest", "require_encoder"]


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


class Loader:
    """Hands out this rank's share of one global batch after another, for ever.

    Tensor- and pipeline-parallel peers pass the same `dp_rank` and get equal batches.
    """

    def __init__(
        self, config: DataConfig, columns: Sequence[str], *, dp_rank: int, dp_size: int
    ) -> None:
        """Raises ConfigError where the ranks don't divide the global batch, ShardError where the data don't fit."""
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        config.micro_batches(dp_size)
        self.config = config
        self._sets = [_open(source, config, columns) for source in config.sources]
        self.manifest = self._sets[0].manifest
        if not config.adopt:
            check_blend([one.manifest for one in self._sets], columns)
        sources = [
            BlendSource(one.counts, [s.bucket for s in one.manifest.shards], source.weight)
            for one, source in zip(self._sets, config.sources, strict=True)
        ]
        self._order = BatchOrder(
            sources,
            seed=config.seed,
            window=config.shuffle_window,
            batch_size=config.global_batch_size,
        )
        if not self.num_samples:
            raise ShardError(
                f"{config.manifest} holds no clip that has all of {', '.join(columns) or 'raw'}; see reject_counts in its manifest"
            )
        self._positions = np.arange(dp_rank, config.global_batch_size, dp_size)
        self._pool = (
            ThreadPoolExecutor(config.read_threads, thread_name_prefix="loader")
            if config.prefetch_batches
            else None
        )
        self._buffers = Buffers((config.prefetch_batches + 3) * config.read_threads)
        self._ahead: deque[list[Future[list[Sample]]]] = deque()
        self._step = 0
        rooms = [
            int(ROOM * one.remote.max_bytes) if one.remote is not None else 0 for one in self._sets
        ]
        self._fetch_ahead = (
            FetchAhead(self._sets, rooms, self._order, self._positions, config.read_threads)
            if any(rooms) and self._pool
            else None
        )

    @property
    def num_samples(self) -> int:
        """Samples of one epoch: clips that every wanted column has, times their data sets' weights."""
        return self._order.num_samples

    def next_batch(self) -> Batch:
        """This rank's share of the next global batch. Raises ShardError with file and key of a damaged sample."""
        if self._pool is None:
            samples = self._read(self._step, self._positions)
        else:
            while len(self._ahead) <= self.config.prefetch_batches:
                step = self._step + len(self._ahead)
                self._ahead.append(
                    [self._pool.submit(self._read, step, some) for some in self._shares()]
                )
            try:
                samples = [sample for some in self._ahead.popleft() for sample in some.result()]
            except BaseException:
                self._forget_ahead()
                raise
        size = self.config.micro_batch_size
        micro_batches = tuple(tuple(samples[i : i + size]) for i in range(0, len(samples), size))
        batch = Batch(self._step, self.config.global_batch_size, micro_batches)
        self._step += 1
        if self._fetch_ahead is not None:
            self._fetch_ahead.reached(self._step)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What was handed out, and of what: JSON-able, equal on all ranks."""
        return {
            "format": FORMAT_VERSION,
            "consumed_samples": self._step * self.config.global_batch_size,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last batch of `state`, on any number of ranks.

        Raises ConfigError where the state is of another data set, seed or batch size.
        """
        check_position(state, self._identity())
        step, rest = divmod(state["consumed_samples"], self.config.global_batch_size)
        if rest:
            raise ConfigError(
                f"consumed_samples = {state['consumed_samples']} is not a multiple of data.global_batch_size = "
                f"{self.config.global_batch_size}; the checkpoint's loader state is damaged"
            )
        self._forget_ahead()
        self._step = step
        if self._fetch_ahead is not None:
            self._fetch_ahead.reached(step)

    def close(self) -> None:
        """End the background threads and close the files."""
        for one in self._sets:
            if one.remote is not None:
                one.remote.closed = True
        self._forget_ahead()
        if self._fetch_ahead is not None:
            self._fetch_ahead.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        for one in self._sets:
            one.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self.manifest.fingerprint
            if len(self._sets) == 1
            else content_fingerprint(*self._identities()),
            "num_samples": self.num_samples,
            "exclusions": self._sets[0].exclusions
            if len(self._sets) == 1
            else content_fingerprint(*(one.exclusions for one in self._sets)),
            "seed": self.config.seed,
            "shuffle_window": self.config.shuffle_window,
            "global_batch_size": self.config.global_batch_size,
        }

    def _identities(self) -> list[tuple[str, float]]:
        return [
            (one.manifest.fingerprint, source.weight)
            for one, source in zip(self._sets, self.config.sources, strict=True)
        ]

    def _forget_ahead(self) -> None:
        for futures in self._ahead:
            for future in futures:
                future.cancel()
        self._ahead.clear()

    def _shares(self) -> list[np.ndarray]:
        """This rank's positions, for each thread a stretch of them."""
        return [
            some for some in np.array_split(self._positions, self.config.read_threads) if some.size
        ]

    def _read(self, step: int, positions: np.ndarray) -> list[Sample]:
        """Samples of global batch `step`, all in one piece of memory."""
        sources, places = self._order.locate(step, positions)
        where = list(
            zip(sources.tolist(), places.shard.tolist(), places.slot.tolist(), strict=True)
        )
        sizes = [self._sets[source].size(shard, slot) for source, shard, slot in where]
        memory, begin, samples = self._buffers.take(sum(sizes)), 0, []
        first = step * self.config.global_batch_size
        for (source, shard, slot), size, epoch, position in zip(
            where, sizes, places.epoch.tolist(), positions.tolist(), strict=True
        ):
            meta, tensors = self._sets[source].read(shard, slot, memory[begin:])
            samples.append(
                Sample(
                    key=meta.key,
                    epoch=epoch,
                    index=first + position,
                    position=position,
                    meta=meta,
                    tensors=tensors,
                )
            )
            begin += size
        return samples


def open_manifest(config: DataConfig) -> Manifest:
    """The manifest of the first data set, fetched where it is remote."""
    open_remote(config)
    return read_manifest(config.manifest)


def _open(source: SourceConfig, config: DataConfig, columns: Sequence[str]) -> AlignedColumns:
    remote = open_remote(source)
    manifest = read_manifest(source.manifest)
    data = source.manifest.parent if source.manifest.suffix == ".json" else source.manifest
    opened = AlignedColumns(
        data,
        manifest,
        columns,
        adopt=config.adopt,
        keep=2 * config.shuffle_window + 2,
        checksum=config.checksum,
        remote=remote,
    )
    if remote is not None:
        largest = [
            sorted((s.bytes for s in manifest.columns[name].shards), reverse=True)[
                : config.shuffle_window
            ]
            for name in columns
        ]
        remote.check_room(sum(map(sum, largest)))
    return opened
