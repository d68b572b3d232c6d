"""The global order of samples: a pure function of (shard sizes, seed, epoch), with no table of samples.

Shards are permuted, and the samples of every window of consecutive shards are permuted among themselves:
reads stay near a few files, and any place of any epoch is found without walking there. Cost of a seek:
one table of the shards per epoch, then a binary search.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
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

    def __init__(self, counts: Sequence[int] | Ints, *, seed: int, window: int) -> None:
        """`counts` samples per shard; `window` shards whose samples are mixed."""
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self.seed = seed
        self.window = window
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, indices: Ints) -> Places:
        """The places of samples `indices` of the stream (index i is sample i mod n of epoch i div n)."""
        assert self.num_samples > 0
        indices = np.asarray(indices, dtype=np.int64)
        epochs, within = np.divmod(indices, self.num_samples)
        shard, slot = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = np.flatnonzero(epochs == epoch)
            shard[chosen], slot[chosen] = self._locate(int(epoch), within[chosen])
        return Places(epochs, shard, slot)

    def _locate(self, epoch: int, within: Ints) -> tuple[Ints, Ints]:
        table = self._epoch(epoch)
        windows = np.searchsorted(table.window_ends, within, side="right")
        mixed = np.empty_like(within)
        for window in np.unique(windows):
            chosen = np.flatnonzero(windows == window)
            start = int(table.window_ends[window - 1]) if window else 0
            size = int(table.window_ends[window]) - start
            permutation = Permutation(size, f"{self.seed}/{epoch}/window/{window}")
            mixed[chosen] = start + permutation.take(within[chosen] - start)
        place = np.searchsorted(table.shard_ends, mixed, side="right")
        shard = table.shards[place]
        return shard, mixed - (table.shard_ends[place] - self.counts[shard])

    def _epoch(self, epoch: int) -> _Epoch:
        table = self._epochs.get(epoch)
        if table is None:
            num_shards = len(self.counts)
            shards = Permutation(num_shards, f"{self.seed}/{epoch}/shards").take(np.arange(num_shards))
            shard_ends = np.cumsum(self.counts[shards])
            last = np.minimum(np.arange(self.window, num_shards + self.window, self.window), num_shards) - 1
            table = _Epoch(shards, shard_ends, shard_ends[last])
            self._epochs[epoch] = table
            while len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return table
