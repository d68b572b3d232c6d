"""Metrics of the tokenizer on held-out clips."""

from __future__ import annotations

import math

import pytest
import torch

from landiff.training.tokenizer.engine import TokenizerEngine
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.tokenizer.tiny import MODEL, batch, config
from tests.training.toy import alone, validation_metrics

CLIPS = list(batch(100, global_batch_size=7).samples)


def trained(folder, world, **changes):
    engine = TokenizerEngine(config(folder, **changes), world)
    for step in range(4):
        engine.train_step(batch(step, world.rank, world.size))
    return engine


def measured(world, folder, micro_batch_size):
    engine = TokenizerEngine(config(folder), world)
    engine.load(folder)
    return validation_metrics(engine, CLIPS, world.rank, world.size, micro_batch_size)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A checkpoint, and the metrics of one process that computes all clips together."""
    folder = tmp_path_factory.mktemp("one")
    saving.save(trained(folder, alone()), folder)
    return folder, measured(alone(), folder, len(CLIPS))


def test_a_process_measures_the_same_numbers_twice_and_in_other_micro_batches(one):
    folder, metrics = one
    assert measured(alone(), folder, len(CLIPS)) == metrics
    for micro_batch_size in (1, 3):
        found = measured(alone(), folder, micro_batch_size)
        assert found == pytest.approx(metrics, rel=1e-5)  # float32 matrix products of other sizes


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_measures_the_same(one, ranks):
    folder, metrics = one
    for found in run_distributed(measured, ranks, folder, 2):
        assert found == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_metrics_are_those_of_the_definition(tmp_path, normalize):
    model = MODEL.model_copy(update={"normalize_features": normalize})
    engine = trained(tmp_path, alone(), model=model)
    metrics = validation_metrics(engine, CLIPS, 0, 1, 2)
    tokenizer = engine.tokenizer.eval()
    features_BTChw = torch.stack([clip.tensors["features"] for clip in CLIPS]).float()
    with torch.no_grad():
        output = tokenizer(features_BTChw)
        decoded_BTChw = output.decoded
    if normalize:
        features_BTChw = tokenizer.normalize(features_BTChw)
        decoded_BTChw = tokenizer.normalize(decoded_BTChw)
    close = {"rel": 1e-5}  # float32 means in another order
    assert metrics["loss"] == pytest.approx(float(output.loss), **close)
    assert metrics["commitment"] == pytest.approx(float(output.commitment), **close)
    assert metrics["reconstruction"] == pytest.approx(float(output.reconstruction), **close)
    error_BTChw = decoded_BTChw - features_BTChw
    variance = features_BTChw.var(dim=(0, 1, 3, 4), correction=0).mean()
    unexplained = float(error_BTChw.square().mean() / variance)
    assert metrics["variance_unexplained"] == pytest.approx(unexplained, **close)
    iframe = float(error_BTChw[:, 0].square().mean())
    assert metrics["reconstruction_iframe"] == pytest.approx(iframe, **close)
    cosine = torch.cosine_similarity(decoded_BTChw, features_BTChw, dim=2)
    assert metrics["cosine_pframe"] == pytest.approx(float(cosine[:, 1:].mean()), **close)
    share = torch.bincount(output.indices.flatten(), minlength=16).double() / output.indices.numel()
    entropy = -float(torch.special.xlogy(share, share).sum())
    assert metrics["codebook_perplexity"] == pytest.approx(math.exp(entropy))
    assert metrics["codebook_dead_codes"] == int((share == 0).sum())
    constant = [len(set(row)) == 1 for row in output.indices[:, :4].T.tolist()]
    pframe = output.indices[:, 4:].reshape(-1, 2).T.tolist()
    constant += [len(set(row)) == 1 for row in pframe]
    assert metrics["position_constant"] == sum(constant)


def test_validation_changes_neither_weights_nor_draws(tmp_path):
    engine = trained(tmp_path, alone())
    other = trained(tmp_path, alone())
    generator = torch.get_rng_state()
    validation_metrics(engine, CLIPS, 0, 1, 2)
    assert torch.equal(torch.get_rng_state(), generator)
    assert engine.tokenizer.training
    for each in (engine, other):
        each.train_step(batch(4))
    for name, tensor in engine.tokenizer.state_dict().items():
        assert torch.equal(tensor, other.tokenizer.state_dict()[name]), name
