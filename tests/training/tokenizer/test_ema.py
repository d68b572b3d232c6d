"""The moving average of the tokenizer: a plain reference, checkpoints, and forward passes."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from landiff.configs import ConfigError
from landiff.configs.loader import write_config
from landiff.model_zoo.convert.known_formats import Options, open_source
from landiff.training.tokenizer.engine import TokenizerEngine
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.tokenizer.tiny import batch, config
from tests.training.toy import alone

EMA = {"decay": 0.9, "every": 2, "from_step": 7}
STEPS = 50


def engine_of(folder, ema, world=None):
    return TokenizerEngine(config(folder, ema=ema), world or alone())


def parameters(engine):
    return [parameter.detach().clone() for parameter in engine.tokenizer.parameters()]


def train(engine, steps):
    """Trains, and averages the parameters as docs/training.md says."""
    average = parameters(engine)
    for step in steps:
        engine.train_step(batch(step, engine.world.rank, engine.world.size))
        finished = step + 1
        if finished <= EMA["from_step"]:
            average = parameters(engine)
        elif finished % EMA["every"] == 0:
            kept = EMA["decay"] ** EMA["every"]
            pairs = zip(average, parameters(engine), strict=True)
            average = [kept * old + (1 - kept) * new for old, new in pairs]
    return average


def assert_close(engine, average):
    for ours, expected in zip(engine.ema.averages, average, strict=True):
        # float32 rounding of 50 updates, each of which forgets a fifth of the errors before
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-7)


def train_on(world, folder):
    engine = engine_of(folder, EMA, world)
    average = train(engine, range(STEPS))
    assert_close(engine, average)
    return engine.ema.averages


def test_it_equals_a_plain_reference_over_50_steps(tmp_path):
    train_on(alone(), tmp_path)
    first, second = run_distributed(train_on, 2, tmp_path)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_training_is_the_same_with_and_without_it(tmp_path):
    with_it, without = engine_of(tmp_path, EMA), engine_of(tmp_path, None)
    train(with_it, range(5))
    train(without, range(5))
    assert all(map(torch.equal, parameters(with_it), parameters(without)))


def test_resume_is_bit_equal(tmp_path):
    straight = engine_of(tmp_path, EMA)
    train(straight, range(10))
    saving.save(straight, tmp_path)
    resumed = engine_of(tmp_path, EMA)
    resumed.load(tmp_path)
    for engine in (straight, resumed):
        train(engine, range(10, 14))
    assert all(map(torch.equal, straight.ema.averages, resumed.ema.averages))


def test_a_checkpoint_without_it_starts_it_and_one_with_it_drops_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    without = engine_of(tmp_path, None)
    train(without, range(3))
    saving.save(without, tmp_path)
    assert not (tmp_path / "ema.safetensors").exists()
    started = engine_of(tmp_path, EMA)
    started.load(tmp_path)
    assert "holds no moving average" in caplog.text
    assert all(map(torch.equal, started.ema.averages, parameters(without)))
    saving.save(started, tmp_path)
    assert (
        load_file(tmp_path / "ema.safetensors").keys()
        == dict(started.tokenizer.named_parameters()).keys()
    )
    engine_of(tmp_path, None).load(tmp_path)
    assert "ema = null: the moving average in checkpoint" in caplog.text


def test_forward_passes_read_it_inside_the_context_only(tmp_path):
    engine = engine_of(tmp_path, EMA)
    train(engine, range(12))
    before = {name: tensor.clone() for name, tensor in engine.tokenizer.state_dict().items()}
    averages = [average.clone() for average in engine.ema.averages]
    with engine.weights(True):
        assert all(map(torch.equal, parameters(engine), averages))
        assert not all(map(torch.equal, parameters(engine), engine.ema.averages))
    with engine.weights(False):
        for name, tensor in engine.tokenizer.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    assert all(map(torch.equal, engine.ema.averages, averages))


def test_a_conversion_takes_it_unless_told_otherwise(tmp_path):
    run = tmp_path / "run"
    engine = engine_of(run, EMA)
    train(engine, range(12))
    run.mkdir()
    saving.save(engine, run)
    write_config(run / "config.yaml", engine.config)
    (run / "state.json").write_text('{"step": 12}')
    raw = {name: tensor.clone() for name, tensor in engine.tokenizer.state_dict().items()}
    with engine.weights(True):
        averages = {name: tensor.clone() for name, tensor in engine.tokenizer.state_dict().items()}
    for choice, kind, expected in ((None, "ema", averages), ("raw", "raw", raw)):
        source = open_source(run, Options(weights=choice))
        assert source.weights == kind
        (part,) = source.parts
        for name, tensor in expected.items():
            assert torch.equal(part.tensors[name], tensor), name
    (run / "ema.safetensors").unlink()
    assert open_source(run).weights == "raw"
    with pytest.raises(ConfigError, match="--weights ema: .* holds no moving average"):
        open_source(run, Options(weights="ema"))
