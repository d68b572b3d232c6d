"""Validation in the loop: when it runs, where its numbers go, and that it changes nothing."""

import io
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG

from landiff.training.checkpoint.run_folder import read_metrics
from landiff.training.config import EmaConfig, LoopConfig
from landiff.training.diffusion import validation as diffusion
from landiff.training.lm import validation as lm
from landiff.training.loop import fit, validation_due
from landiff.training.observe.metrics import StepProgress
from landiff.training.run import Run
from landiff.training.tokenizer import validation as tokenizer
from tests.distributed import run_distributed
from tests.training.toy import (
    ToyConfig,
    ToyEngine,
    ToyLoader,
    alone,
    held_out_samples,
    train,
    validation_metrics,
)


def config(folder, steps=5, **loop):
    return ToyConfig(run=folder, loop=LoopConfig(steps=steps, **loop))


def validated(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}


def test_it_is_due_every_few_steps_and_after_the_last():
    loop = LoopConfig(steps=5, val_every=2)
    assert [step for step in range(1, 6) if validation_due(step, loop)] == [2, 4, 5]
    assert not any(validation_due(step, LoopConfig(steps=5)) for step in range(1, 6))


def test_its_numbers_stand_in_the_line_of_their_step_and_in_tensorboard(tmp_path):
    train(config(tmp_path, val_every=2, log_every=3), alone())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 3, 4, 5]
    assert all("train/loss" in line for line in lines)
    losses = validated(tmp_path)
    assert list(losses) == [2, 4, 5]
    assert len(set(losses.values())) == 3
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("val/loss")
    assert [event.step for event in scalars] == [2, 4, 5]
    assert [event.value for event in scalars] == pytest.approx(list(losses.values()))


def test_tensorboard_gets_one_layout_of_charts(tmp_path):
    train(config(tmp_path, steps=2), alone())
    train(config(tmp_path, steps=4), alone())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors(CONFIG_SUMMARY_TAG)[-1].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["loss", "optimizer", "speed"]
    assert list(layout.category[0].chart[0].multiline.tag) == ["train/loss", "val(_ema)?/loss"]


@pytest.mark.parametrize("module", [tokenizer, lm, diffusion])
def test_every_chart_has_tags_that_are_regular_expressions(module):
    for charts in module.CHARTS.values():
        for tags in charts.values():
            assert tags and all(re.compile(tag) for tag in tags)


def test_the_terminal_line_shows_the_last_validation(tmp_path):
    settings, stream = config(tmp_path, val_every=4, log_every=1), io.StringIO()
    run = Run(tmp_path, settings, alone())
    run.metrics.progress = StepProgress(stream, every_s=0)
    fit(ToyEngine(settings, alone()), ToyLoader(settings, alone()), run, settings.loop)
    lines = stream.getvalue().splitlines()
    losses = validated(tmp_path)
    assert [" val " in line for line in lines] == [False, False, False, True, True]
    assert f"  val {losses[5]:.4f}  " in lines[-1]


def test_training_is_bit_equal_with_and_without_it_and_resumes_with_it(tmp_path):
    _, plain = train(config(tmp_path / "a"), alone())
    _, engine = train(config(tmp_path / "b", val_every=1), alone())
    assert torch.equal(engine.weight, plain.weight)
    train(config(tmp_path / "c", steps=3, val_every=1), alone())
    train(config(tmp_path / "c", val_every=1), alone())
    assert validated(tmp_path / "c") == validated(tmp_path / "b")


def test_the_moving_average_is_validated_too_and_changes_nothing(tmp_path):
    _, plain = train(config(tmp_path / "a", val_every=1), alone())
    settings = config(tmp_path / "b", val_every=1)
    settings = settings.model_copy(update={"ema": EmaConfig(decay=0.5)})
    _, engine = train(settings, alone())
    assert torch.equal(engine.weight, plain.weight)
    assert validated(tmp_path / "b") == validated(tmp_path / "a")
    last = read_metrics(tmp_path / "b" / "metrics.jsonl")[-1]
    with engine.weights(ema=True):
        expected = validation_metrics(engine, held_out_samples(), 0, 1)
    assert last["val_ema/loss"] == expected["loss"] != last["val/loss"]


def train_on(world, folder):
    train(config(folder, val_every=1), world)
    return validated(folder)


def test_ranks_validate_every_clip_once(tmp_path):
    one = train_on(alone(), tmp_path / "1")
    three = run_distributed(train_on, 3, tmp_path / "3")
    # The engine checks the number of clips. Float32 gradients are summed in another order.
    assert three[0] == pytest.approx(one, rel=1e-5)
