"""The sample order, without files."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from landiff.data_pipeline.loading.order import Permutation, SampleOrder


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permutation_reaches_every_value_once(n):
    assert sorted(Permutation(n, "key").take(np.arange(n))) == list(range(n))


def test_permutation_is_the_same_everywhere():
    """These numbers must never change: a resumed run depends on them, also with another numpy."""
    small = Permutation(10, "0/0/shards").take(np.arange(10))
    assert small.tolist() == [9, 8, 4, 0, 3, 1, 2, 5, 7, 6]
    large = Permutation(10**12, "k").take(np.array([0, 1, 10**11]))
    assert large.tolist() == [77197082186, 370875781202, 450989077075]


@pytest.mark.parametrize("n", [3, 12, 81])
def test_permutations_send_each_value_everywhere_equally_often(n):
    keys = 405
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, f"{key}").take(np.arange(n))] += 1
    chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum() / (n - 1) ** 2
    # The mean is 1 and the standard deviation sqrt(2) / (n - 1); the draws are seeded.
    assert chi_square < 1 + 4 * 2**0.5 / (n - 1)


def test_every_epoch_holds_each_sample_once_and_differs():
    counts = [5, 0, 7, 1, 12, 3, 9]
    order = SampleOrder(counts, seed=3, window=2)
    n = order.num_samples
    epochs = []
    for epoch in range(3):
        places = order.locate(np.arange(epoch * n, (epoch + 1) * n))
        assert (places.epoch == epoch).all()
        epochs.append(list(zip(places.shard.tolist(), places.slot.tolist(), strict=True)))
        expected = []
        for shard, count in enumerate(counts):
            expected += [(shard, slot) for slot in range(count)]
        assert sorted(epochs[-1]) == expected
    assert epochs[0] != epochs[1] != epochs[2]


def test_samples_are_mixed_inside_windows_of_shards_only():
    order = SampleOrder([10] * 20, seed=0, window=4)
    shard = order.locate(np.arange(200)).shard.reshape(5, 40)
    assert all(len(set(window)) == 4 for window in shard)
    assert all(len(set(window[:10])) > 1 for window in shard)


def test_a_place_does_not_depend_on_how_it_was_reached():
    order = SampleOrder([10] * 20, seed=0, window=4)
    all_at_once = order.locate(np.arange(600))
    for index in (599, 0, 200, 199, 401):
        one = SampleOrder([10] * 20, seed=0, window=4).locate(np.array([index]))
        assert (one.epoch[0], one.shard[0], one.slot[0]) == (
            all_at_once.epoch[index],
            all_at_once.shard[index],
            all_at_once.slot[index],
        )


def test_a_million_samples_over_a_thousand_ranks():
    """The parts of all ranks form a global batch; a seek is fast and needs no table."""
    counts = np.full(1000, 1000)
    ranks, size = 1024, 4096
    step = 100  # of 244 in an epoch
    parts = []
    order = SampleOrder(counts, seed=1, window=16)
    for rank in range(ranks):
        places = order.locate(step * size + np.arange(rank, size, ranks))
        parts.append(places.shard * 1000 + places.slot)
    union = np.concatenate(parts)
    assert len(np.unique(union)) == size
    whole = order.locate(np.arange(step * size, (step + 1) * size))
    assert (np.stack(parts, axis=1).reshape(-1) == whole.shard * 1000 + whole.slot).all()

    tracemalloc.start()
    fresh = SampleOrder(counts, seed=1, window=16)
    begin = time.process_time()
    fresh.locate(np.arange(777_777_777, 777_777_777 + 4))
    seek_s = time.process_time() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seek_s < 0.1 and peak < 1_000_000, (seek_s, peak)  # a table of the samples would be 8 MB
