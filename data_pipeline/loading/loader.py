"""Loads samples in a global order that depends only on (manifest, seed, epoch), with exact resume.

Global batch k holds samples k * G .. (k + 1) * G - 1 of the endless stream (order.py), for any
number of ranks. Rank r of n reads every n-th sample from the r-th on, so that micro-batch m of all
ranks together is a contiguous part of the global batch. A checkpoint stores one number: the
samples that were returned.

A blend of data sets, and buckets of clip shapes, change only content and size of global batch k
(`order.BatchOrder`). The tensors of a batch share memory that is reused when the last of them is
freed.

Random numbers of a sample are keyed by its index, which counts `global_batch_size` samples in every
step. With `balance_tokens` a batch may have more: the further samples have indices from `EXTRA` on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.buckets import bucket_names, check_buckets
from landiff.data_pipeline.format.column_checks import (
    check_blend,
    check_captions,
    main_caption,
    require_encoder,
    with_captions,
)
from landiff.data_pipeline.format.columns import AlignedColumns
from landiff.data_pipeline.format.schema import (
    FORMAT_VERSION,
    Manifest,
    content_fingerprint,
)
from landiff.data_pipeline.format.shards import ShardError, read_manifest
from landiff.data_pipeline.format.tensors import Buffers
from landiff.data_pipeline.loading.config import DataConfig, SourceConfig, require_micro_batches
from landiff.data_pipeline.loading.fetch_ahead import FetchAhead
from landiff.data_pipeline.loading.held_out import HeldOutClips
from landiff.data_pipeline.loading.order import BatchOrder, OrderedDataset
from landiff.data_pipeline.loading.phases import OrderPlan, order_plans, single_phase
from landiff.data_pipeline.loading.position import check_position, data_fingerprint
from landiff.data_pipeline.loading.remote import RANK_PART, Remote, data_folder, open_remote
from landiff.data_pipeline.loading.samples import Batch, Sample
from landiff.data_pipeline.loading.selection import (
    CaptionChoice,
    ConditionedSet,
    find_selection,
    selection_fingerprint,
)
from landiff.data_pipeline.loading.split import Ranks, Split, find_split
from landiff.data_pipeline.loading.where import conditions

EXTRA = 1 << 48  # first index of the samples beyond `global_batch_size`, in steps of itself

__all__ = ["Batch", "Loader", "Sample", "open_manifest", "require_encoder"]


class Loader:
    """Returns this rank's part of each global batch, in order and indefinitely.

    Tensor- and pipeline-parallel ranks with the same `dp_rank` get equal batches.
    """

    def __init__(
        self,
        config: DataConfig,
        columns: Sequence[str],
        *,
        dp_rank: int,
        dp_size: int,
        ranks: Ranks | None = None,
        plan: OrderPlan | None = None,
        first: Loader | None = None,
    ) -> None:
        """Open the data sets for data-parallel rank `dp_rank` of `dp_size`.

        `ranks`: the processes that divide the search for held-out clips and build their loaders
        together. None: this process searches alone.
        `plan`: the order of samples, if it is one of several of a run; see `PhasedLoader`.
        `first`: the loader of the first one, whose held-out videos are held out here too.

        Raises ConfigError if the ranks do not divide the global batch, ShardError if the data do
        not agree with the config.
        """
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self.plan = plan or order_plans(single_phase(config))[0]
        self._sizes = self.plan.sizes.after(self.plan.first_step)
        for level in self._sizes.levels:
            require_micro_batches(level.global_batch_size, level.micro_batch_size, dp_size)
        self.config = config
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._captions: CaptionChoice | None = None
        if config.captions is not None:
            main = main_caption(config.captions, columns)
            self._captions = CaptionChoice(config.captions, main, config.seed)
        own_columns = columns
        columns = with_captions(columns, config.captions)
        self._remotes: list[Remote | None] = []
        self._sets: list[AlignedColumns] = []
        self._open_sets(columns, own_columns)
        self.manifest = self._sets[0].manifest
        self._files = list(self._sets)  # to close
        self.held_out = HeldOutClips()
        self._split: Split | None = None
        if config.validation is not None:
            self._hold_out(columns, ranks, first)
        self._selected = find_selection(self._conditions(), ranks, adopt=config.adopt)
        for number, positions in enumerate(self._selected):
            if positions:
                self._sets[number] = self._sets[number].without(positions)
        self._order = BatchOrder(
            self._ordered_datasets(),
            seed=config.seed,
            window=config.shuffle_window,
            batch_sizes=self._sizes,
            name=f"phase {self.plan.index}" if self.plan.index else "",
            wanted=config.buckets,
            factors=self.plan.factors,
        )
        if not self.num_samples:
            raise ShardError(
                f"{config.manifest} holds no clip that has all of {', '.join(columns) or 'raw'}; "
                "see reject_counts in its manifest"
            )
        self._buffers = Buffers((config.prefetch_batches + 3) * config.read_threads)
        self._ahead: deque[list[Future[list[Sample]]]] = deque()
        self._step = 0  # in this order
        self._pool: ThreadPoolExecutor | None = None
        self._fetch_ahead: FetchAhead | None = None
        if config.prefetch_batches:
            self._pool = ThreadPoolExecutor(config.read_threads, thread_name_prefix="loader")
            self._fetch_ahead = self._start_fetch_ahead()

    @property
    def num_samples(self) -> int:
        """Samples of one epoch: clips that have all columns, times their data set's weight."""
        return self._order.num_samples

    def next_batch(self) -> Batch:
        """This rank's part of the next global batch.

        Raises ShardError with file and key of a damaged sample.
        """
        if self._pool is None:
            samples = self._read(self._step, self._positions(self._step))
        else:
            samples = self._next_prefetched(self._pool)
        sizes = self._order.sizes_at(self._step)
        size = sizes.micro_batch_size
        micro_batches = tuple(tuple(samples[i : i + size]) for i in range(0, len(samples), size))
        step = self.plan.first_step + self._step
        batch = Batch(step, sizes.global_batch_size, micro_batches, sizes.bucket)
        self._step += 1
        if self._fetch_ahead is not None:
            self._fetch_ahead.reached(self._step)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position in the data and their identity: JSON values, equal on all ranks."""
        step = self.plan.first_step + self._step
        state = {
            "format": FORMAT_VERSION,
            "consumed_samples": self.plan.sizes.samples_before(step),
            **self.identity(),
        }
        for name in ("validation", "selection"):
            if not state[name]:
                del state[name]  # as in states from before there was one
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch of `state`, on any number of ranks.

        Raises ConfigError if the state belongs to another data set, seed or batch size.
        """
        check_position(state, self.identity())
        step = self.plan.sizes.step_of(state["consumed_samples"])
        if step is None:
            raise ConfigError(
                f"consumed_samples = {state['consumed_samples']} is not a multiple of "
                f"data.global_batch_size = {self.config.global_batch_size}; the checkpoint's "
                "loader state is damaged"
            )
        self.seek(step)

    def seek(self, step: int) -> None:
        """Continue with the batch of `step`."""
        self._cancel_prefetch()
        self._step = step - self.plan.first_step
        if self._fetch_ahead is not None:
            self._fetch_ahead.reached(self._step)

    def close(self) -> None:
        """End the background threads and close the files."""
        for remote in self._remotes:
            if remote is not None:
                remote.closed = True
        self._cancel_prefetch()
        if self._fetch_ahead is not None:
            self._fetch_ahead.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        for dataset in self._files:
            dataset.close()

    def __enter__(self) -> Loader:
        """Return this loader."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the loader."""
        self.close()

    def _open_sets(self, columns: Sequence[str], own_columns: Sequence[str]) -> None:
        """Open the data sets with all columns. Raises ShardError if they do not fit each other.

        own_columns: those of the caller, without columns that hold further captions.
        """
        config = self.config
        for source in config.sources:
            remote = open_remote(source)
            self._remotes.append(remote)
            self._sets.append(_open(source, remote, config, columns))
        manifests = [dataset.manifest for dataset in self._sets]
        if not config.adopt:
            check_blend(manifests, columns)
        if config.captions is not None:
            for manifest in manifests:
                check_captions(manifest, config.captions, own_columns, adopt=config.adopt)
        if config.buckets is not None:
            check_buckets(manifests, config.buckets)

    def _hold_out(self, columns: Sequence[str], ranks: Ranks | None, first: Loader | None) -> None:
        """Find the held-out clips, and take them out of the data sets. Collective over `ranks`."""
        self._split = self._find_split(columns, ranks, first)
        self.held_out = HeldOutClips(
            self._files,
            self._split.clips,
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
            micro_batch_size=self.config.micro_batch_size,
        )
        for number, positions in enumerate(self._split.positions):
            self._sets[number] = self._sets[number].without(positions)

    def _find_split(
        self, columns: Sequence[str], ranks: Ranks | None, first: Loader | None
    ) -> Split:
        """Find the held-out clips. Collective over `ranks`. Opens the validation data set."""
        validation = self.config.validation
        assert validation is not None
        separate = None
        if validation.data_set is not None:
            remote = open_remote(validation.data_set)
            self._remotes.append(remote)
            separate = _open(validation.data_set, remote, self.config, columns)
            self._files.append(separate)
            if not self.config.adopt:
                check_blend([self.manifest, separate.manifest], columns, "data.validation.data_set")
        first_split = first._split if first is not None else None
        return find_split(validation, self._sets, separate, ranks, first_split, self.plan.validated)

    def _conditions(self) -> list[ConditionedSet | None]:
        """The data sets with their conditions."""
        found: list[ConditionedSet | None] = []
        named = conditions([source.where for source in self.config.sources])
        for number, (name, where) in enumerate(named):
            if where is None:
                found.append(None)
                continue
            folder = data_folder(self.config.sources[number])
            remote = self._remotes[number]
            found.append(ConditionedSet(name, where, self._sets[number], folder, remote))
        return found

    def _ordered_datasets(self) -> list[OrderedDataset]:
        datasets = []
        for dataset, source in zip(self._sets, self.config.sources, strict=True):
            names = [shard.bucket for shard in dataset.manifest.shards]
            buckets = names
            if self.config.buckets is not None:
                buckets = bucket_names(dataset.manifest)
            datasets.append(OrderedDataset(dataset.counts, buckets, source.weight, names))
        return datasets

    def _start_fetch_ahead(self) -> FetchAhead | None:
        """Start downloads if any data set is remote."""
        cache_bytes = []
        for remote in self._remotes[: len(self._sets)]:
            cache_bytes.append(int(RANK_PART * remote.max_bytes) if remote is not None else 0)
        if not any(cache_bytes):
            return None
        return FetchAhead(
            self._sets,
            cache_bytes,
            self._order,
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
            end_step=self._end_step,
            threads=self.config.read_threads,
        )

    @property
    def _end_step(self) -> int | None:
        """First step in this order that belongs to the next order, or None."""
        if self.plan.end_step is None:
            return None
        return self.plan.end_step - self.plan.first_step

    def _positions(self, step: int) -> np.ndarray:
        """This rank's positions in the global batch of a step."""
        batch_size = self._order.sizes_at(step).global_batch_size
        return np.arange(self._dp_rank, batch_size, self._dp_size)

    def identity(self) -> dict[str, Any]:
        """What determines the order of samples; must be the same after a restart."""
        data = data_fingerprint([dataset.manifest for dataset in self._sets], self.config)
        exclusions = self._sets[0].exclusions
        if len(self._sets) > 1:
            exclusions = content_fingerprint(*[dataset.exclusions for dataset in self._sets])
        split = self._split.fingerprint if self._split is not None else ""
        return {
            "data": data,
            "validation": split,
            "num_samples": self.num_samples,
            "exclusions": exclusions,
            "selection": selection_fingerprint(self._selected),
            "seed": self.config.seed,
            "shuffle_window": self.config.shuffle_window,
            "global_batch_size": self.config.global_batch_size,
        }

    def _next_prefetched(self, pool: ThreadPoolExecutor) -> list[Sample]:
        """Samples of the next batch; keeps the queue of the following batches full."""
        while len(self._ahead) <= self.config.prefetch_batches:
            step = self._step + len(self._ahead)
            if self._ahead and step == self._end_step:
                break
            reads = [pool.submit(self._read, step, part) for part in self._thread_positions(step)]
            self._ahead.append(reads)
        samples: list[Sample] = []
        try:
            for read in self._ahead.popleft():
                samples += read.result()
        except BaseException:
            self._cancel_prefetch()
            raise
        return samples

    def _cancel_prefetch(self) -> None:
        for reads in self._ahead:
            for read in reads:
                read.cancel()
        self._ahead.clear()

    def _thread_positions(self, step: int) -> list[np.ndarray]:
        """This rank's positions in a global batch, in a contiguous part for each thread."""
        parts = np.array_split(self._positions(step), self.config.read_threads)
        return [part for part in parts if part.size]

    def _read(self, step: int, positions: np.ndarray) -> list[Sample]:
        """Samples at `positions` of global batch `step`, all in one block of memory."""
        sources, places = self._order.locate(step, positions)
        located = list(
            zip(sources.tolist(), places.shard.tolist(), places.slot.tolist(), strict=True)
        )
        sizes = [self._sets[source].size(shard, slot) for source, shard, slot in located]
        memory = self._buffers.take(sum(sizes))
        begin = 0
        samples = []
        first = self.plan.sizes.samples_before(self.plan.first_step + step)
        regular = self._sizes.at(step).global_batch_size
        for (source, shard, slot), size, epoch, position in zip(
            located, sizes, places.epoch.tolist(), positions.tolist(), strict=True
        ):
            meta, tensors = self._sets[source].read(shard, slot, memory[begin:])
            if self._captions is not None:
                tensors = self._captions(tensors, epoch, meta.key)
            samples.append(
                Sample(
                    key=meta.key,
                    epoch=epoch,
                    index=first + position % regular + position // regular * EXTRA,
                    position=position,
                    meta=meta,
                    tensors=tensors,
                )
            )
            begin += size
        return samples


def open_manifest(config: DataConfig) -> Manifest:
    """The manifest of the first data set, downloaded if it is remote."""
    open_remote(config)
    return read_manifest(config.manifest)


def _open(
    source: SourceConfig, remote: Remote | None, config: DataConfig, columns: Sequence[str]
) -> AlignedColumns:
    """Open one data set. Raises ShardError if its cache is too small for a window of shards."""
    manifest = read_manifest(source.manifest)
    opened = AlignedColumns(
        data_folder(source),
        manifest,
        columns,
        adopt=config.adopt,
        keep=2 * config.shuffle_window + 2,
        checksum=config.checksum,
        remote=remote,
    )
    if remote is not None:
        remote.check_cache_size(_window_bytes(manifest, config, columns))
    return opened


def _window_bytes(manifest: Manifest, config: DataConfig, columns: Sequence[str]) -> int:
    """Largest size of the shards that are read at the same time: a window of each bucket."""
    buckets = [shard.bucket for shard in manifest.shards]
    if config.buckets is not None:
        buckets = bucket_names(manifest)
    sizes: dict[str, list[int]] = {}
    for number, bucket in enumerate(buckets):
        if config.buckets is None or bucket in config.buckets:
            size = sum(manifest.columns[name].shards[number].bytes for name in columns)
            sizes.setdefault(bucket, []).append(size)
    total = 0
    for of_bucket in sizes.values():
        total += sum(sorted(of_bucket, reverse=True)[: config.shuffle_window])
    return total
