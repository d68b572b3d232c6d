"""Global sample order: a pure function of (shard sizes, seed, epoch) without a table of samples.

Shards are permuted, and then the samples within every window of consecutive shards. Reads therefore
stay in a few files, and the sample at any position of any epoch is found directly: with one table
of the shards per epoch and a binary search.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from landiff.data_pipeline.loading.phases import BatchSizes

Ints = NDArray[np.int64]
ROUNDS = 6  # of the Feistel network; 4 suffice for large n, small n needs more
MIN_BITS = 3  # of half a number; with fewer, a network over 64 values favours some orders
EPOCHS_KEPT = 2  # a global batch may span two epochs


class Permutation:
    """Keyed permutation of range(n) in constant memory.

    A Feistel network over a power of four, applied repeatedly until the result is in the range.
    """

    def __init__(self, n: int, key: str) -> None:
        """Permutation of range(n), determined by `key`."""
        assert 0 <= n < 2**62, n
        self.n = n
        self._bits = np.uint64(max(MIN_BITS, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._bits)) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def take(self, indices: Ints) -> Ints:
        """Images of `indices`, an array of at least one dimension with values in [0, n)."""
        values = self._network(np.asarray(indices).astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left = values >> self._bits
        right = values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of splitmix64: every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Places:
    """Locations of samples, as parallel arrays."""

    epoch: Ints
    shard: Ints  # position in the manifest's list of shards
    slot: Ints  # position in the shard, without rejected clips


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in order, and the ends of shards and windows in samples."""

    shards: Ints
    shard_ends: Ints
    window_ends: Ints


class SampleOrder:
    """Endless stream of the samples of one data set: epochs in which every sample occurs once."""

    def __init__(
        self, counts: Sequence[int] | Ints, *, seed: int, window: int, name: str = ""
    ) -> None:
        """Order of the samples of shards.

        Args:
            counts: Samples per shard.
            seed: Seed of the order.
            window: Number of shards whose samples are mixed.
            name: Part of the random key: orders with different names differ.
        """
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self._key = f"{seed}/{name}" if name else str(seed)
        self.window = window
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, indices: Ints) -> Places:
        """Places of samples in the stream. Index i is sample i mod n of epoch i div n."""
        assert self.num_samples > 0
        indices = np.asarray(indices, dtype=np.int64)
        epochs, within = np.divmod(indices, self.num_samples)
        shard = np.empty_like(indices)
        slot = np.empty_like(indices)
        for epoch, chosen in _groups(epochs):
            shard[chosen], slot[chosen] = self._locate(epoch, within[chosen])
        return Places(epochs, shard, slot)

    def _locate(self, epoch: int, within: Ints) -> tuple[Ints, Ints]:
        """(shard, slot) of the samples at the positions `within` one epoch."""
        table = self._epoch(epoch)
        windows = np.searchsorted(table.window_ends, within, side="right")
        mixed = np.empty_like(within)
        for window, chosen in _groups(windows):
            start = int(table.window_ends[window - 1]) if window else 0
            size = int(table.window_ends[window]) - start
            permutation = Permutation(size, f"{self._key}/{epoch}/window/{window}")
            mixed[chosen] = start + permutation.take(within[chosen] - start)
        place = np.searchsorted(table.shard_ends, mixed, side="right")
        shard = table.shards[place]
        return shard, mixed - (table.shard_ends[place] - self.counts[shard])

    def _epoch(self, epoch: int) -> _Epoch:
        """The table of one epoch; the latest ones are kept."""
        table = self._epochs.get(epoch)
        if table is None:
            table = self._make_epoch(epoch)
            self._epochs[epoch] = table
            while len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return table

    def _make_epoch(self, epoch: int) -> _Epoch:
        num_shards = len(self.counts)
        permutation = Permutation(num_shards, f"{self._key}/{epoch}/shards")
        shards = permutation.take(np.arange(num_shards))
        shard_ends = np.cumsum(self.counts[shards])
        ends = np.arange(self.window, num_shards + self.window, self.window)
        last_shards = np.minimum(ends, num_shards) - 1  # of each window
        return _Epoch(shards, shard_ends, shard_ends[last_shards])


def _groups(values: Ints) -> Iterator[tuple[int, Ints | slice]]:
    """Each distinct value with its positions. Fast for one value, as in most batches."""
    if values.size and (values == values[0]).all():
        yield int(values[0]), slice(None)
        return
    for value in np.unique(values):
        yield int(value), np.flatnonzero(values == value)


def interleave(indices: Ints, counts: Sequence[int]) -> tuple[Ints, Ints]:
    """Merge endless streams evenly: (stream, index in that stream) for each of `indices`.

    Any sum(counts) consecutive items contain counts[i] items of stream i. Each stream keeps its
    order.
    """
    which = np.zeros_like(indices)
    within = np.array(indices)
    if len(counts) == 1:
        return which, within
    rest = np.array(indices)
    total = sum(counts)
    undecided = np.ones(len(indices), dtype=bool)
    for stream, count in enumerate(counts):
        periods, position = np.divmod(rest, total)
        before = position * count // total
        chosen = undecided & ((position + 1) * count // total > before)
        which[chosen] = stream
        within[chosen] = (periods * count + before)[chosen]
        undecided &= ~chosen
        rest = rest - periods * count - before
        total -= count
        if not undecided.any():
            break
    return which, within


def counts_before(index: int, counts: Sequence[int]) -> list[int]:
    """How many of the first `index` items that `interleave` merges are of each stream."""
    found = []
    rest = index
    total = sum(counts)
    for count in counts:
        periods, position = divmod(rest, total)
        before = periods * count + position * count // total
        found.append(before)
        rest -= before
        total -= count
    return found


@dataclass(frozen=True)
class OrderedDataset:
    """One data set as the order needs it."""

    counts: Ints  # samples per shard
    buckets: Sequence[str]  # of each shard
    weight: float = 1.0
    names: Sequence[str] | None = None  # of each shard's bucket in random keys. None: `buckets`


@dataclass(frozen=True)
class _Part:
    """The shards of one bucket of one data set."""

    source: int
    shards: Ints
    order: SampleOrder
    epoch_samples: int  # in an epoch of the blend


@dataclass(frozen=True)
class BucketSizes:
    """Bucket and sizes of one global batch. factor: as in `balance_tokens`."""

    bucket: str
    global_batch_size: int
    micro_batch_size: int
    factor: int = 1


class BatchOrder:
    """Global batches from several data sets with several buckets.

    Each batch is of one bucket, so that every micro-batch of every rank has the same shape.
    Buckets alternate by their number of batches in an epoch. Within a bucket, data sets are mixed
    evenly by weight * number of samples. Each pair (bucket, data set) has its own epochs, in which
    every sample occurs once.
    """

    def __init__(
        self,
        sources: Sequence[OrderedDataset],
        *,
        seed: int,
        window: int,
        batch_sizes: BatchSizes,
        name: str = "",
        wanted: Sequence[str] | None = None,
        factors: Mapping[str, int] | None = None,
    ) -> None:
        """`window` and `name` are those of `SampleOrder`. Steps count from 0 in this order.

        batch_sizes: of buckets without a factor.
        wanted: the buckets that are read. None reads all.
        factors: how many times larger batches of a bucket are.
        """
        self._batch_sizes = batch_sizes
        self._factors: list[int] = []
        self._names: list[str] = []
        self._buckets: list[list[_Part]] = []
        buckets: set[str] = set()
        for source in sources:
            buckets.update(source.buckets)
        if wanted is not None:
            buckets.intersection_update(wanted)
        for bucket in sorted(buckets):
            parts = _parts_of(bucket, sources, seed=seed, window=window, name=name)
            if parts:
                self._buckets.append(parts)
                self._names.append(bucket)
                self._factors.append((factors or {}).get(bucket, 1))
        self.num_samples = 0
        self._turns: list[int] = []  # of each bucket in a period, in proportion to its batches
        for parts, factor in zip(self._buckets, self._factors, strict=True):
            samples = sum(part.epoch_samples for part in parts)
            self.num_samples += samples
            self._turns.append(max(1, round(samples / factor)))

    def sizes_at(self, step: int) -> BucketSizes:
        """Bucket and batch sizes of global batch `step`."""
        number = self._bucket_at(step)
        level = self._batch_sizes.at(step)
        factor = self._factors[number]
        return BucketSizes(
            self._names[number],
            global_batch_size=factor * level.global_batch_size,
            micro_batch_size=factor * level.micro_batch_size,
            factor=factor,
        )

    def _bucket_at(self, step: int) -> int:
        """Number of the bucket of global batch `step`."""
        buckets, _ = interleave(np.array([step], dtype=np.int64), self._turns)
        return int(buckets[0])

    def locate(self, step: int, positions: Ints) -> tuple[Ints, Places]:
        """(data set, places) of the samples at `positions` of global batch `step`."""
        bucket = self._bucket_at(step)
        parts = self._buckets[bucket]
        which, within = interleave(
            self._samples_before(step, bucket) + np.asarray(positions, dtype=np.int64),
            [part.epoch_samples for part in parts],
        )
        source = np.empty_like(within)
        places = Places(np.empty_like(within), np.empty_like(within), np.empty_like(within))
        for number, chosen in _groups(which):
            part = parts[number]
            found = part.order.locate(within[chosen])
            source[chosen] = part.source
            places.epoch[chosen] = found.epoch
            places.shard[chosen] = part.shards[found.shard]
            places.slot[chosen] = found.slot
        return source, places

    def _samples_before(self, step: int, bucket: int) -> int:
        """Samples of one bucket in all batches before `step`."""
        samples = 0
        turns = 0  # batches of the bucket in the levels before
        levels = [level for level in self._batch_sizes.levels if level.first_step <= step]
        ends = [level.first_step for level in levels[1:]] + [step]
        for level, end in zip(levels, ends, strict=True):
            turns_until_end = counts_before(end, self._turns)[bucket]
            samples += (turns_until_end - turns) * level.global_batch_size
            turns = turns_until_end
        return samples * self._factors[bucket]


def _parts_of(
    bucket: str, sources: Sequence[OrderedDataset], *, seed: int, window: int, name: str
) -> list[_Part]:
    """The shards of one bucket in all data sets that have any samples in it."""
    parts = []
    for number, source in enumerate(sources):
        is_in_bucket = np.array([name == bucket for name in source.buckets], dtype=bool)
        shards = np.flatnonzero(is_in_bucket)
        samples = int(source.counts[shards].sum())
        if not samples:
            continue
        key_name = (source.names or source.buckets)[shards[0]]
        # The first data set, the unnamed bucket and the first order add nothing to the random key.
        names = [name] if name else []
        if number:
            names.append(f"source {number}")
        if key_name:
            names.append(f"bucket {key_name}")
        order = SampleOrder(source.counts[shards], seed=seed, window=window, name="/".join(names))
        epoch_samples = max(1, round(samples * source.weight))
        parts.append(_Part(number, shards, order, epoch_samples))
    return parts
