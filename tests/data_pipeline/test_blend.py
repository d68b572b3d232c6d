"""Blends of data sets and buckets: content of global batches, and how often samples occur."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from landiff.configs import ConfigError
from landiff.data_pipeline.format.shards import ShardError, read_manifest, write_manifest
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.loading.order import BatchOrder, OrderedDataset, interleave
from landiff.data_pipeline.loading.phases import BatchSizes
from tests.data_pipeline.data_sets import keys_of, write_column, write_raw


@pytest.mark.parametrize("counts", [[1], [3, 7], [1, 1, 1], [5, 0, 2], [10**9, 3, 10**8]])
def test_interleaving_takes_every_place_of_every_stream_once_and_evenly(counts):
    total = sum(counts)
    number = min(total * 4, 4000)
    start = 5 * total  # a whole number of periods
    which, within = interleave(np.arange(start, start + number), counts)
    for stream, count in enumerate(counts):
        mine = within[which == stream]
        assert mine.tolist() == list(range(5 * count, 5 * count + len(mine)))
        assert abs(len(mine) - number * count / total) <= len(counts)  # never far ahead or behind


def orders(sources, batch_size=6, **fields):
    sizes = BatchSizes.constant(batch_size)
    return BatchOrder(sources, **({"seed": 1, "window": 2, "batch_sizes": sizes} | fields))


def drawn(order, steps: int) -> list[tuple[int, int, int, int]]:
    taken = []
    for step in range(steps):
        size = order.sizes_at(step).global_batch_size
        source, places = order.locate(step, np.arange(size))
        taken += zip(
            source.tolist(),
            places.epoch.tolist(),
            places.shard.tolist(),
            places.slot.tolist(),
            strict=True,
        )
    return taken


def everything(source: int, counts) -> set[tuple[int, int, int]]:
    """(data set, shard, slot) of all samples of one data set."""
    found = set()
    for shard, count in enumerate(counts):
        found |= {(source, shard, slot) for slot in range(count)}
    return found


def test_at_weight_one_each_sample_of_each_data_set_comes_once_an_epoch():
    first, second = np.array([5, 4, 6]), np.array([2, 1])
    order = orders([OrderedDataset(first, [""] * 3), OrderedDataset(second, [""] * 2)])
    assert order.num_samples == 18
    taken = drawn(order, 9)  # three epochs
    for epoch in range(3):
        part = taken[epoch * 18 : epoch * 18 + 18]
        places = [(source, shard, slot) for source, _, shard, slot in part]
        assert len(places) == len(set(places))
        assert set(places) == everything(0, first) | everything(1, second)


def test_weights_say_how_often_samples_come_in_an_epoch():
    first, second, third = np.array([8, 4]), np.array([6]), np.array([4])
    order = orders(
        [
            OrderedDataset(first, [""] * 2),
            OrderedDataset(second, [""], 0.5),
            OrderedDataset(third, [""], 2.0),
        ],
        batch_size=23,
    )
    assert order.num_samples == 12 + 3 + 8
    two_epochs = drawn(order, 2)
    counts = Counter((source, shard, slot) for source, _, shard, slot in two_epochs)
    assert {counts[key] for key in everything(0, first)} == {2}
    assert {counts[key] for key in everything(1, second)} == {1}
    assert {counts[key] for key in everything(2, third)} == {4}


def test_every_batch_is_of_one_bucket_and_every_bucket_is_read_evenly():
    counts, buckets = np.array([5, 7, 3, 6]), ["wide", "tall", "wide", "tall"]
    order = orders(
        [OrderedDataset(counts, buckets), OrderedDataset(np.array([4]), ["tall"])], batch_size=4
    )
    total = order.num_samples
    assert total == 25
    taken = drawn(order, total)  # 25 batches of 4: each sample four times
    bucket_of = [buckets, ["tall"]]
    by_batch = []
    for first in range(0, 100, 4):
        batch = taken[first : first + 4]
        by_batch.append({bucket_of[source][shard] for source, _, shard, _ in batch})
    assert all(len(found) == 1 for found in by_batch)
    assert sum(found == {"wide"} for found in by_batch) == 8
    assert set(Counter((source, shard, slot) for source, _, shard, slot in taken).values()) == {4}


def data_set(folder, sizes, mark, bucket=None):
    """Raw shards with a column of tokens: 3 per sample in the second shard, 2 in the others."""

    def tokens_of(key: str) -> torch.Tensor:
        return torch.zeros(3 if key in keys_of(1, sizes[1]) else 2, dtype=torch.uint16)

    write_raw(folder, sizes, mark=mark)
    write_column(folder, "tokens", value=tokens_of)
    if bucket:
        manifest = read_manifest(folder)
        shards = [replace(s, bucket=bucket[i]) for i, s in enumerate(manifest.shards)]
        write_manifest(folder, manifest.model_copy(update={"shards": shards}))
    return folder


def taken_from(loader: Loader) -> list[tuple[str, str]]:
    """(source, key) of the samples of the next batch."""
    return [(sample.meta.source, sample.key) for sample in loader.next_batch().samples]


def test_the_loader_blends_resumes_and_refuses_another_blend(tmp_path):
    one, two = data_set(tmp_path / "one", [4, 5], "one"), data_set(tmp_path / "two", [3, 3], "two")

    def loader(weight=1.0, rank=0, size=1):
        config = DataConfig(
            manifest=one,
            blend=[{"manifest": two, "weight": weight}],
            global_batch_size=6,
            read_threads=2,
        )
        return Loader(config, ["tokens"], dp_rank=rank, dp_size=size)

    with loader() as straight:
        assert straight.num_samples == 15
        expected = [taken_from(straight) for _ in range(5)]
        assert set(Counter(itertools.chain.from_iterable(expected)).values()) == {2}
    ranks = [loader(rank=r, size=2) for r in range(2)]
    for one_rank in ranks:
        for _ in range(2):
            one_rank.next_batch()
    state = ranks[0].state_dict()
    with loader() as resumed:
        resumed.load_state_dict(state)
        assert [taken_from(resumed) for _ in range(3)] == expected[2:]
    with loader(weight=0.5) as other, pytest.raises(ConfigError, match="data = "):
        other.load_state_dict(state)
    for one_rank in ranks:
        one_rank.close()


def test_a_blend_of_columns_of_other_encoders_is_refused(tmp_path):
    one, two = data_set(tmp_path / "one", [4, 5], "one"), data_set(tmp_path / "two", [3, 3], "two")
    write_column(two, "tokens", mark="other")
    config = {"manifest": one, "blend": [{"manifest": two}], "global_batch_size": 6}
    with pytest.raises(
        ShardError,
        match=r"data.blend.0: its column 'tokens' was made by test \(fingerprint other\)",
    ):
        Loader(DataConfig(**config), ["tokens"], dp_rank=0, dp_size=1)
    Loader(DataConfig(**config, adopt=True), ["tokens"], dp_rank=0, dp_size=1).close()


def test_micro_batches_of_a_bucketed_data_set_have_one_shape_on_any_number_of_ranks(tmp_path):
    folder = data_set(tmp_path, [4, 5], "one", bucket=["small", "large"])
    for ranks in (1, 2, 3):
        config = DataConfig(manifest=folder, global_batch_size=6, micro_batch_size=6 // ranks)
        for rank in range(ranks):
            with Loader(config, ["tokens"], dp_rank=rank, dp_size=ranks) as loader:
                shapes = []
                for _ in range(9):
                    for micro in loader.next_batch().micro_batches:
                        shapes.append({tuple(s.tensors["tokens"].shape) for s in micro})
                assert all(len(found) == 1 for found in shapes)
                assert len({min(found) for found in shapes}) == 2
