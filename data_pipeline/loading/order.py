"""The global order of samples: a pure function of (shard sizes, seed, epoch), with no table of samples.

Shards are permuted, and the samples of every window of consecutive shards are permuted among themselves:
reads stay near a few files, and any place of any epoch is found without walking there. Cost of a seek:
one table of the shards per epoch, then a binary search.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ROUNDS = 6  # of the Feistel network; 4 already pass for large n, small n want a few more
MIN_BITS = 3  # of half a number: a network over less than 64 values favours some orders
EPOCHS_KEPT = 2  # a global batch may straddle two


class Permutation:
    """A keyed permutation of range(n) that needs no memory: Feistel network over a power of four, walking
    the cycle until it is back inside the range."""

    def __init__(self, n: int, key: str) -> None:
        assert 0 <= n < 2**62, n
        self.n = n
        self._bits = np.uint64(max(MIN_BITS, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._bits)) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def take(self, indices: Ints) -> Ints:
        """Where each of `indices` (all in [0, n), at least one-dimensional) goes."""
        values = self._network(np.asarray(indices).astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Places:
    """Where some samples of the stream lie: parallel arrays."""

    epoch: Ints
    shard: Ints  # position in the manifest's list of shards
    slot: Ints  # among the samples of that shard that take part


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in their order, and where they and their windows end."""

    shards: Ints
    shard_ends: Ints
    window_ends: Ints


class Order:
    """The endless stream of samples: epoch after epoch, each holding every sample once."""

    def __init__(
        self, counts: Sequence[int] | Ints, *, seed: int, window: int, name: str = ""
    ) -> None:
        """`counts` samples per shard; `window` shards whose samples are mixed. Orders of other names differ."""
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self._key = f"{seed}{name and '/'}{name}"
        self.window = window
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, indices: Ints) -> Places:
        """The places of samples `indices` of the stream (index i is sample i mod n of epoch i div n)."""
        assert self.num_samples > 0
        indices = np.asarray(indices, dtype=np.int64)
        epochs, within = np.divmod(indices, self.num_samples)
        shard, slot = np.empty_like(indices), np.empty_like(indices)
        for epoch, chosen in _groups(epochs):
            shard[chosen], slot[chosen] = self._locate(epoch, within[chosen])
        return Places(epochs, shard, slot)

    def _locate(self, epoch: int, within: Ints) -> tuple[Ints, Ints]:
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
        table = self._epochs.get(epoch)
        if table is None:
            num_shards = len(self.counts)
            shards = Permutation(num_shards, f"{self._key}/{epoch}/shards").take(
                np.arange(num_shards)
            )
            shard_ends = np.cumsum(self.counts[shards])
            last = (
                np.minimum(
                    np.arange(self.window, num_shards + self.window, self.window), num_shards
                )
                - 1
            )
            table = _Epoch(shards, shard_ends, shard_ends[last])
            self._epochs[epoch] = table
            while len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return table


def _groups(values: Ints) -> Iterator[tuple[int, Ints | slice]]:
    """Each of `values` once, and where it stands. A batch mostly lies in one epoch and one window."""
    if values.size and (values == values[0]).all():
        yield int(values[0]), slice(None)
        return
    for value in np.unique(values):
        yield int(value), np.flatnonzero(values == value)


def interleave(indices: Ints, counts: Sequence[int]) -> tuple[Ints, Ints]:
    """Merge endless streams evenly: (which stream, index in it) for each of `indices`.

    Of every sum(counts) in a row, counts[i] come from stream i, each stream in its own order.
    """
    which, within = np.zeros_like(indices), np.array(indices)
    if len(counts) == 1:
        return which, within
    rest, total = np.array(indices), sum(counts)
    undecided = np.ones(len(indices), dtype=bool)
    for stream, count in enumerate(counts):
        periods, at = np.divmod(rest, total)
        before = at * count // total
        mine = undecided & ((at + 1) * count // total > before)
        which[mine], within[mine] = stream, (periods * count + before)[mine]
        undecided &= ~mine
        rest, total = rest - periods * count - before, total - count
        if not undecided.any():
            break
    return which, within


@dataclass(frozen=True)
class BlendSource:
    """One data set as the order sees it."""

    counts: Ints  # samples per shard
    buckets: Sequence[str]  # of each shard
    weight: float = 1.0


@dataclass(frozen=True)
class _Part:
    """The shards of one bucket of one source."""

    source: int
    shards: Ints
    order: Order
    share: int  # samples an epoch


class BatchOrder:
    """Global batch k of several data sets with several buckets.

    Each batch is of one bucket, so that every micro-batch of every rank has one shape; buckets take turns by their
    number of samples. Within a bucket, sources are mixed evenly by weight * number of samples. Each (bucket,
    source) runs through its own epochs, each sample once in each.
    """

    def __init__(
        self, sources: Sequence[BlendSource], *, seed: int, window: int, batch_size: int
    ) -> None:
        self.batch_size = batch_size
        self._buckets: list[list[_Part]] = []
        for bucket in sorted({bucket for source in sources for bucket in source.buckets}):
            parts = []
            for number, source in enumerate(sources):
                shards = np.flatnonzero(np.array([b == bucket for b in source.buckets], dtype=bool))
                samples = int(source.counts[shards].sum())
                if samples:
                    name = "/".join(
                        [f"source {number}"] * bool(number) + [f"bucket {bucket}"] * bool(bucket)
                    )
                    order = Order(source.counts[shards], seed=seed, window=window, name=name)
                    parts.append(
                        _Part(number, shards, order, max(1, round(samples * source.weight)))
                    )
            if parts:
                self._buckets.append(parts)
        self._shares = [sum(part.share for part in parts) for parts in self._buckets]
        self.num_samples = sum(self._shares)

    def locate(self, step: int, positions: Ints) -> tuple[Ints, Places]:
        """(source, places) of the samples at `positions` of global batch `step`."""
        (bucket,), (turn,) = interleave(np.array([step], dtype=np.int64), self._shares)
        parts = self._buckets[bucket]
        which, within = interleave(
            turn * self.batch_size + np.asarray(positions, dtype=np.int64),
            [part.share for part in parts],
        )
        places = Places(np.empty_like(within), np.empty_like(within), np.empty_like(within))
        source = np.empty_like(within)
        for number, chosen in _groups(which):
            part = parts[number]
            found = part.order.locate(within[chosen])
            source[chosen], places.epoch[chosen] = part.source, found.epoch
            places.shard[chosen], places.slot[chosen] = part.shards[found.shard], found.slot
        return source, places
