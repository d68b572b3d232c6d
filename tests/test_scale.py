"""Plans of what 1,024 ranks read, compute and write, without the ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from landiff.configs import load
from landiff.data_pipeline.loading.order import BatchOrder, OrderedDataset
from landiff.data_pipeline.loading.phases import BatchSizes
from landiff.model_zoo.convert.formats.zero.partitions import (
    trainable_of_stage_2,
    trainable_of_stage_3,
)
from landiff.model_zoo.convert.lazy import Stored
from landiff.training.checkpoint.dist_files import Place, boxes, metadata_of
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.layout import check_batch, data_rank, model_copies
from landiff.training.lm.batch import Span
from landiff.training.lm.config import CHUNKS, LMTrainConfig

RANKS = 1024


def places(order: BatchOrder, step: int, positions: np.ndarray) -> list[tuple[int, ...]]:
    source, found = order.locate(step, positions)
    columns = [source, found.epoch, found.shard, found.slot]
    return list(zip(*[column.tolist() for column in columns], strict=True))


def test_ranks_divide_every_batch_of_many_clips():
    """Ten million clips in 20,000 shards: each rank finds its own without what comes before."""
    shards = OrderedDataset(np.full(20_000, 500), [""] * 20_000)
    sizes = BatchSizes.constant(2 * RANKS)
    order = BatchOrder([shards], seed=1, window=64, batch_sizes=sizes)
    step = 4_000
    whole = places(order, step, np.arange(2 * RANKS))
    assert len(set(whole)) == 2 * RANKS
    divided = {}
    for rank in (0, 1, 511, RANKS - 1):
        own = np.arange(rank, 2 * RANKS, RANKS)
        divided |= dict(zip(own.tolist(), places(order, step, own), strict=True))
    for position, place in divided.items():
        assert whole[position] == place


def test_ranks_belong_to_copies_of_the_model():
    lm = load(LMTrainConfig, "landiff/lm", ["data.micro_batch_size=1", "parallel.tensor=2"])
    assert model_copies(lm, RANKS) == 512 and check_batch(lm, RANKS) == 1
    config = load(DiffusionTrainConfig, "landiff/diffusion-control", ["sequence_parallel=4"])
    found = [data_rank(config, rank, RANKS) for rank in range(RANKS)]
    assert found[0] == (0, 256) and found[-1] == (255, 256)
    assert [copy for copy, _ in found] == [rank // 4 for rank in range(RANKS)]
    assert check_batch(config, RANKS) == 1


@pytest.mark.parametrize(("ranks", "samples"), [(8, 4), (512, 4), (512, 1)])
def test_context_parallel_ranks_divide_a_row(ranks, samples):
    """Every token has one rank and attends to all before it in its sample.

    Of a row with one sample, all ranks compute equally many pairs of queries and keys.
    """
    length = CHUNKS * ranks * 16
    bounds = (0, length)
    if samples > 1:
        bounds = (0, length // 3, length // 3 + 40, length - 8, length)
    starts = np.zeros(length, dtype=int)
    for start, end in itertools.pairwise(bounds):
        starts[start:end] = start
    chunks = CHUNKS * ranks
    seen = np.zeros(length, dtype=int)
    pairs = []
    for rank in range(ranks):
        work = 0
        for chunk in (rank, chunks - 1 - rank):
            span = Span.of(bounds, chunk * 16, (chunk + 1) * 16)
            seen[span.start : span.end] += 1
            queries = np.diff((0, *span.query_ends))
            keys = np.diff((0, *span.key_ends))
            position = span.start
            key = span.first_key
            for num_queries, num_keys in zip(queries, keys, strict=True):
                assert key == starts[position]
                position += num_queries
                key += num_keys
                assert key == position  # keys and queries of a sample end together
                work += num_queries * num_keys
            assert position == key == span.end
        pairs.append(work)
    assert (seen == 1).all()
    assert samples > 1 or len(set(pairs)) == 1


def test_ranks_write_each_element_of_a_tensor_once():
    shape = (37, 11, 5)
    numel = 37 * 11 * 5
    counts = torch.zeros(shape, dtype=torch.int64)
    found = []
    ends = [rank * numel // RANKS for rank in range(RANKS + 1)]
    for rank in range(RANKS):
        position = 0
        for offsets, sizes in boxes(shape, ends[rank], ends[rank + 1]):
            box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            counts[box] += 1
            path = f"__{rank}_0.distcp"
            found.append(Place("w", path, position, 4, torch.float32, offsets, sizes, shape))
            position += 4
    assert (counts == 1).all()
    assert len(metadata_of(found).state_dict_metadata["w"].chunks) == len(found)


def read(piece: Stored, vectors: dict[str, np.ndarray]) -> np.ndarray:
    return vectors[str(piece.path)][piece.offset : piece.offset + piece.shape[0]]


@pytest.mark.parametrize("stage", [2, 3])
def test_parameters_are_found_in_the_parts_of_all_ranks(stage):
    shapes = {"a": torch.Size([50, 40]), "b": torch.Size([7]), "c": torch.Size([3000])}
    values = {}
    for number, (name, shape) in enumerate(shapes.items()):
        values[name] = np.arange(shape.numel()) + 10_000 * number
    flat = np.concatenate(list(values.values()))
    vectors = {}
    shards = []
    size = -(-len(flat) // RANKS)
    for rank in range(RANKS):
        if stage == 2:
            own, mapping = part_of_stage_2(flat, values, rank * size, (rank + 1) * size)
            shards.append({"param_slice_mappings": [mapping]})
        else:
            parts = []
            for value in values.values():
                length = -(-len(value) // RANKS)
                part = value[rank * length : (rank + 1) * length]
                parts.append(np.pad(part, (0, length - len(part))))
            own = np.concatenate(parts)
            shards.append({})
        vectors[str(rank)] = own
    stored = [
        [Stored(Path(path), 0, torch.float32, (len(own),), (1,), 0)]
        for path, own in vectors.items()
    ]
    find = trainable_of_stage_2 if stage == 2 else trainable_of_stage_3
    found = find([shapes], shards, stored)
    for name, value in values.items():
        pieces = [read(piece, vectors) for piece in found[name].pieces]
        np.testing.assert_array_equal(np.concatenate(pieces), value)


def part_of_stage_2(flat, values, start, end):
    """Elements [start, end) of the flat vector, and where the parameters lie in it."""
    mapping = {}
    first = 0
    for name, value in values.items():
        begin = max(start, first)
        stop = min(end, first + len(value))
        if begin < stop:
            mapping[name] = SimpleNamespace(start=begin - start, numel=stop - begin)
        first += len(value)
    return flat[start:end], mapping
