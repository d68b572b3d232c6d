"""A bad feature on one rank stops the tokenizer's training on both before the update."""

import math

import pytest
import torch

from landiff.model_zoo.health import non_finite
from landiff.training.tokenizer.engine import TokenizerEngine
from tests.distributed import run_distributed
from tests.training.tokenizer.tiny import batch, config


def diverge(world, folder, precision, value):
    engine = TokenizerEngine(config(folder, precision=precision), world)
    engine.train_step(batch(0, world.rank, world.size))
    before = [parameter.detach().clone() for parameter in engine.tokenizer.parameters()]
    bad = batch(1, world.rank, world.size)
    if world.rank == 1:
        bad.micro_batches[0][0].tensors["features"][0, 0] = value
    assert engine.train_step(bad).skipped
    same = [
        torch.equal(old, new)
        for old, new in zip(before, engine.tokenizer.parameters(), strict=True)
    ]
    return all(same)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_feature_stops_all_ranks_before_the_update(tmp_path, precision, value):
    assert run_distributed(diverge, 2, tmp_path, precision, value) == [True, True]


def poisoned_buffer(world, folder):
    engine = TokenizerEngine(config(folder), world)
    engine.train_step(batch(0))
    assert non_finite(engine.local_weights()) == []
    engine.tokenizer.quantizer._codebook.embed_avg[0, 3] = math.nan
    return non_finite(engine.local_weights())


def test_the_moving_averages_of_the_codebook_are_checked_too(tmp_path):
    assert run_distributed(poisoned_buffer, 1, tmp_path) == [["quantizer._codebook.embed_avg"]]
