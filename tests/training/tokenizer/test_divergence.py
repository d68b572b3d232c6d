"""A bad feature on one rank leaves tokenizer, codebook and optimizer of both as they were."""

import math
import random

import pytest
import torch

from landiff.model_zoo.health import non_finite
from landiff.training.loop import fit
from landiff.training.observe.events import read_events
from landiff.training.run import Run
from landiff.training.tokenizer.engine import TokenizerEngine
from tests.distributed import run_distributed
from tests.training.skipping import check_skip_and_rollback, differing, state_of
from tests.training.tokenizer.tiny import MODEL, batch, config
from tests.training.toy import ToyLoader, alone

EMA = {"decay": 0.9}


def spoil(bad, value):
    bad.micro_batches[0][0].tensors["features"][0, 0] = value


def diverge(world, folder, precision, value):
    engine = TokenizerEngine(config(folder, precision=precision, ema=EMA), world)

    def spoil_last_rank(bad):
        if world.rank == world.size - 1:
            spoil(bad, value)

    def batches(step):
        return batch(step, world.rank, world.size, micro_batches=2)

    return check_skip_and_rollback(
        engine, lambda: [engine.optimizer], world, folder, batches, spoil_last_rank
    )


@pytest.mark.parametrize(("precision", "value"), [("fp32", math.nan), ("bf16", math.inf)])
def test_a_bad_feature_on_one_rank_leaves_no_trace(tmp_path, precision, value):
    for found in run_distributed(diverge, 2, tmp_path, precision, value):
        assert not any(found.values()), found


class Source(ToyLoader):
    """Batches of `tiny`, of which one is bad."""

    bad = -1

    def next_batch(self):
        self.step += 1
        made = batch(self.step - 1)
        if made.step == self.bad:
            spoil(made, math.nan)
        return made


def train(folder, steps, bad):
    """Train, or continue, until `steps`. Returns (events, weights, buffers and averages)."""
    loop = {"steps": steps, "save_every": 2, "keep_last": 1, "on_nonfinite": "rollback"}
    settings = config(folder, loop=loop, ema=EMA)
    engine = TokenizerEngine(settings, alone())
    source = Source(settings, alone())
    source.bad = bad
    fit(engine, source, Run(folder, settings, alone()), settings.loop)
    events = [(event["step"], event["to"]) for event in read_events(folder / "events.jsonl")]
    return events, state_of(engine, [])


def test_a_run_with_a_rollback_resumes_bit_for_bit(tmp_path):
    bad = random.Random().randrange(2, 6)  # any step after the first checkpoint
    events, straight = train(tmp_path / "straight", 8, bad)
    assert events == [(bad + 1, bad // 2 * 2)], bad
    for stop in (bad - 1, bad, bad + 1, bad + 2):
        train(tmp_path / f"{stop}", stop, bad)
        assert train(tmp_path / f"{stop}", 8, bad)[0] == events, (bad, stop)
        _, resumed = train(tmp_path / f"{stop}", 8, bad)  # loads the last checkpoint
        assert differing(resumed, straight) == [], (bad, stop)


def test_a_bad_first_batch_neither_starts_the_codebook_nor_measures_the_features(tmp_path):
    model = MODEL.model_copy(update={"normalize_features": True})
    skipping = TokenizerEngine(config(tmp_path, model), alone())
    bad = batch(0)
    spoil(bad, math.nan)
    assert skipping.train_step(bad).skipped
    skipping.train_step(batch(1))
    unseen = TokenizerEngine(config(tmp_path, model), alone())
    unseen.train_step(batch(1))
    found = state_of(skipping, [skipping.optimizer])
    expected = state_of(unseen, [unseen.optimizer])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def poisoned_buffer(world, folder):
    engine = TokenizerEngine(config(folder), world)
    engine.train_step(batch(0))
    assert non_finite(engine.local_weights()) == []
    engine.tokenizer.quantizer._codebook.embed_avg[0, 3] = math.nan
    return non_finite(engine.local_weights())


def test_the_moving_averages_of_the_codebook_are_checked_too(tmp_path):
    assert run_distributed(poisoned_buffer, 1, tmp_path) == [["quantizer._codebook.embed_avg"]]


def test_a_collapsing_codebook_raises_alarms(tmp_path):
    settings = config(tmp_path, alarms={"from_step": 1})
    engine = TokenizerEngine(settings, alone())
    engine.train_step(batch(0))
    equal = batch(1)
    first = equal.micro_batches[0][0].tensors["features"]
    for sample in equal.samples:
        sample.tensors["features"] = torch.zeros_like(first)
    with torch.no_grad():
        engine.tokenizer.quantizer._codebook.embed.zero_()
    result = engine.train_step(equal)
    broken = {rule.name for rule in result.alarms if rule.broken(float(result.metrics[rule.tag]))}
    assert {"code usage", "perplexity"} <= broken
    assert {rule.tag for rule in result.alarms} <= set(result.metrics)
