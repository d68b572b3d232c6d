"""Runs that begin with a checkpoint of another run."""

import json
import math
import shutil

import pytest
import torch

from landiff.configs.base import ConfigError
from landiff.configs.files import write_text
from landiff.configs.problems import problems_of
from landiff.training.checkpoint.errors import CheckpointError
from landiff.training.checkpoint.parent import find_parent
from landiff.training.checkpoint.run_folder import EVENTS, read_metrics, step_folder
from landiff.training.config import LoopConfig, OptimConfig
from landiff.training.loop import fit
from landiff.training.observe.events import read_events
from landiff.training.run import Run
from tests.training.toy import BadLoader, ToyConfig, ToyEngine, alone, train

CONSTANT = OptimConfig(lr=0.05, warmup_steps=2)
ANNEALED = OptimConfig(lr=0.05, warmup_steps=2, decay="wsd", decay_steps=4)


def settings(folder, name, steps, optim=CONSTANT, parent=None, **loop):
    loop_config = LoopConfig(steps=steps, log_every=1, save_every=4, keep_last=9, **loop)
    return ToyConfig(run=folder / name, parent=parent, loop=loop_config, optim=optim)


def problems(config):
    return [str(problem) for problem in problems_of(lambda: find_parent(config))]


@pytest.fixture
def parent(tmp_path):
    """A finished run of 8 steps with checkpoints of steps 4 and 8."""
    train(settings(tmp_path, "parent", 8), alone())
    return tmp_path / "parent"


def test_an_anneal_continues_weights_moments_and_data_of_its_parent(tmp_path, parent):
    _, straight = train(settings(tmp_path, "straight", 12, ANNEALED), alone())
    state, annealed = train(settings(tmp_path, "anneal", 12, ANNEALED, parent), alone())
    assert state.step == 12
    assert annealed.seen == straight.seen[8 * 4 :]
    assert torch.equal(annealed.weight, straight.weight)
    assert torch.equal(annealed.momentum, straight.momentum)
    lines = read_metrics(tmp_path / "anneal" / "metrics.jsonl")
    rates = [line["train/lr"] for line in lines]
    assert rates == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    recorded = json.loads((tmp_path / "anneal" / "parent.json").read_text())
    assert recorded["checkpoint"] == str(parent / "checkpoints" / "step_00000008")
    assert recorded["step"] == 8


def test_a_restart_begins_with_the_recorded_checkpoint_although_newer_ones_exist(tmp_path, parent):
    config = settings(tmp_path, "anneal", 12, ANNEALED, parent)
    train(config, alone())
    shutil.rmtree(config.run / "checkpoints")  # as if it had died before its first save
    (config.run / "done").unlink()
    train(settings(tmp_path, "parent", 10), alone())
    _, again = train(config, alone())
    assert again.seen[0] == 8 * 4


def test_an_own_checkpoint_comes_before_the_parents(tmp_path, parent):
    config = settings(tmp_path, "anneal", 12, ANNEALED, parent)
    train(config, alone())
    _, longer = train(settings(tmp_path, "anneal", 14, ANNEALED, parent), alone())
    assert longer.seen[0] == 12 * 4


@pytest.mark.parametrize("name", ["parent", "parent/checkpoints/step_00000008"])
def test_a_run_or_one_of_its_checkpoints_can_be_the_parent(tmp_path, parent, name):
    assert problems(settings(tmp_path, "anneal", 12, parent=tmp_path / name)) == []


def test_an_unfit_parent_is_refused_before_ranks_start(tmp_path, parent):
    def refused(path=parent, steps=12):
        (text,) = problems(settings(tmp_path, "anneal", steps, parent=path))
        return text

    assert "gone does not exist; the nearest" in refused(tmp_path / "gone")
    missing = parent / "checkpoints" / "step_00000006"
    assert "does not exist; " in refused(missing) and "holds the steps 4, 8" in refused(missing)
    assert "loop.steps = 8 counts from step 0, and parent =" in refused(steps=8)
    folder = step_folder(parent / "checkpoints", 8)
    state = (folder / "state.json").read_text()
    write_text(folder / "state.json", state + " ")
    assert "is damaged (state.json has" in refused(folder)
    write_text(folder / "state.json", state)
    (folder / "toy.safetensors").unlink()
    assert "step_00000008 is damaged (" in refused()


def test_a_parent_with_a_flipped_bit_is_refused_by_the_ranks(tmp_path, parent):
    path = parent / "checkpoints" / "step_00000008" / "toy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"toy\.safetensors differs from what was written"):
        train(settings(tmp_path, "anneal", 12, parent=parent), alone())


def test_another_parent_for_the_same_run_is_refused(tmp_path, parent):
    config = settings(tmp_path, "anneal", 12, ANNEALED, parent)
    train(config, alone())
    shutil.rmtree(config.run / "checkpoints")
    train(settings(tmp_path, "other", 8), alone())
    changed = config.model_copy(update={"parent": tmp_path / "other"})
    assert f"but {config.run} began with {parent}" in problems(changed)[0]
    with pytest.raises(ConfigError, match="began with"):
        train(changed, alone())


def test_before_its_first_save_a_run_rolls_back_to_its_parent(tmp_path, parent):
    config = settings(tmp_path, "anneal", 11, ANNEALED, parent, on_nonfinite="rollback")
    engine = ToyEngine(config, alone())
    loader = BadLoader(config, alone(), {9: math.nan})
    fit(engine, loader, Run(config.run, config, alone()), config.loop)
    (event,) = read_events(config.run / EVENTS)
    assert (event["step"], event["to"]) == (10, 8)
    expected = ToyEngine(config, alone())
    expected.load(parent / "checkpoints" / "step_00000008")
    expected.train_step(BadLoader(config, alone(), skips=range(10)).next_batch())
    assert torch.equal(engine.weight, expected.weight)
