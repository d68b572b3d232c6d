"""Skipped steps and rollbacks: what they leave unchanged, what they record, when they end a run."""

import json
import math
import re

import pytest
import torch

from landiff.training.checkpoint.errors import NonFiniteError
from landiff.training.checkpoint.files import CheckpointState, latest_whole
from landiff.training.checkpoint.run_folder import (
    committed_steps,
    finished_step,
    read_metrics,
    step_folder,
)
from landiff.training.config import LoopConfig
from landiff.training.guard import Guard, robust_score
from landiff.training.loop import fit
from landiff.training.observe.events import read_events
from landiff.training.run import Run
from tests.training.toy import BadLoader, ToyConfig, ToyEngine, alone

QUICK_STOPS = {1, 8, 13, 14}  # around the bad steps of the test below
STOPS = [
    pytest.param(step, marks=[] if step in QUICK_STOPS else [pytest.mark.long])
    for step in range(1, 20)
]
SPIKES = {"window": 8, "threshold": 20.0}


def config(folder, steps=12, **loop):
    return ToyConfig(run=folder, loop=LoopConfig(steps=steps, log_every=1, save_every=2, **loop))


def train(settings, bad=None, skips=()):
    """Returns (engine, state) at the end of the run."""
    world = alone()
    engine = ToyEngine(settings, world)
    run = Run(settings.run, settings, world)
    state = fit(engine, BadLoader(settings, world, bad, skips), run, settings.loop)
    return engine, state


def events(folder):
    found = []
    for event in read_events(folder / "events.jsonl"):
        found.append((event["step"], event["kind"], event["cause"], event.get("to")))
    return found


def state_of(folder, step):
    return json.loads((step_folder(folder / "checkpoints", step) / "state.json").read_text())


def test_a_skipped_step_leaves_the_weights_of_a_run_that_never_saw_the_batch(tmp_path):
    skipped, state = train(config(tmp_path / "a"), {5: math.nan})
    assert (state.step, state.guard.skipped, state.guard.updates) == (12, 1, 11)
    # This run has one step less, and the batches that follow keep their numbers.
    unseen, _ = train(config(tmp_path / "b", steps=11), skips=[5])
    assert torch.equal(skipped.weight, unseen.weight)
    assert torch.equal(skipped.momentum, unseen.momentum)
    assert events(tmp_path / "a") == [(6, "skip", "not finite", None)]
    assert finished_step(tmp_path / "a") == 12
    assert state_of(tmp_path / "a", 10)["healthy"] is True


def test_a_checkpoint_within_a_streak_is_not_healthy_and_the_last_healthy_one_stays(tmp_path):
    settings = config(tmp_path, steps=6, keep_last=1)
    train(settings, {4: math.nan, 5: math.inf})
    assert state_of(tmp_path, 6)["healthy"] is False
    assert committed_steps(tmp_path / "checkpoints") == [4, 6]
    assert latest_whole(tmp_path / "checkpoints") == step_folder(tmp_path / "checkpoints", 4)


def test_too_many_skips_in_a_row_end_the_run_and_name_the_steps(tmp_path):
    bad = dict.fromkeys(range(3, 12), math.nan)
    with pytest.raises(NonFiniteError, match=r"the last of them 4, 5, 6, 7; at most 3 in a row"):
        train(config(tmp_path), bad)
    assert finished_step(tmp_path) is None


def test_too_many_skips_in_all_end_the_run(tmp_path):
    bad = dict.fromkeys(range(1, 30, 2), math.nan)
    settings = config(tmp_path, steps=100, max_skipped_fraction=0.05)
    with pytest.raises(NonFiniteError, match=r"6 steps were skipped.*at most 5 of 100 \(loop.max"):
        train(settings, bad)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_run_that_only_skips_ends_with_an_error(tmp_path, action):
    settings = config(tmp_path, steps=3, on_nonfinite=action)
    with pytest.raises(NonFiniteError, match="none of the 3 steps of the run has changed"):
        train(settings, dict.fromkeys(range(3), math.nan))
    assert finished_step(tmp_path) is None


def test_a_rollback_returns_to_the_last_healthy_checkpoint_and_goes_on_after_the_batch(tmp_path):
    settings = config(tmp_path, steps=7, keep_last=9, on_nonfinite="rollback")
    engine, state = train(settings, {5: math.nan})  # step 6, after the checkpoint of step 4
    expected = ToyEngine(settings, alone())
    expected.load(step_folder(tmp_path / "checkpoints", 4))
    loader = BadLoader(settings, alone(), skips=range(6))
    expected.train_step(loader.next_batch())
    assert torch.equal(engine.weight, expected.weight)
    assert torch.equal(engine.momentum, expected.momentum)
    assert (state.step, state.guard.rollbacks, state.guard.undone) == (7, 1, 1)
    assert state.guard.updates == 5
    assert events(tmp_path) == [(6, "rollback", "not finite", 4)]


def test_before_the_first_save_a_rollback_returns_to_the_initial_weights(tmp_path):
    settings = config(tmp_path, steps=4, keep_last=9, on_nonfinite="rollback")
    engine, state = train(settings, {1: math.nan})
    expected = ToyEngine(settings, alone())
    loader = BadLoader(settings, alone(), skips=range(2))
    for _ in range(2):
        expected.train_step(loader.next_batch())
    assert torch.equal(engine.weight, expected.weight)
    assert (state.guard.rollbacks, state.guard.undone, state.guard.updates) == (1, 1, 2)
    assert events(tmp_path) == [(2, "rollback", "not finite", 0)]
    assert committed_steps(tmp_path / "checkpoints") == [0, 2, 4]


def test_a_run_that_keeps_returning_to_one_checkpoint_ends(tmp_path):
    settings = ToyConfig(
        run=tmp_path, loop=LoopConfig(steps=1000, save_every=10, on_nonfinite="rollback")
    )
    bad = dict.fromkeys(range(11, 100, 2), math.nan)
    bad |= dict.fromkeys(range(19, 100, 10), math.nan)  # no later checkpoint is healthy
    with pytest.raises(NonFiniteError, match="the checkpoint of step 10 4 times"):
        train(settings, bad)


@pytest.mark.parametrize(("action", "skipped"), [("report", 0), ("skip", 1), ("rollback", 1)])
def test_a_spike_is_reported_skipped_or_rolled_back(tmp_path, caplog, action, skipped):
    settings = config(tmp_path, steps=15, spikes={**SPIKES, "action": action})
    _, state = train(settings, {14: 1e4})
    target = 14 if action == "rollback" else None
    kind = "spike" if action == "report" else action
    assert events(tmp_path) == [(15, kind, "spike", target)]
    effect = {
        "report": "the step was trained on",
        "skip": "the weights were not updated",
        "rollback": "training continues from the weights of step 14",
    }[action]
    number = r"-?[\d.e+]+ \([+-][\d.]+ deviations from the median\)"
    line = f"step 15: spike: loss {number}, gradient norm {number}; {effect}"
    assert re.fullmatch(line, caplog.messages[-1]), caplog.messages
    assert (state.guard.spikes, state.guard.skipped) == (1, skipped)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[14]["guard/loss_score"] > SPIKES["threshold"]
    assert lines[-1]["guard/skipped_steps"] == skipped


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_run_that_is_stopped_anywhere_ends_as_an_undisturbed_one(tmp_path, action, stop):
    spikes = {**SPIKES, "action": action}
    bad = {0: math.nan, 7: math.inf, 12: 1e4, 13: math.nan}

    def settings(folder, steps=20):
        loop = {"on_nonfinite": action, "keep_last": 1, "max_skipped_fraction": 1.0}
        return config(folder, steps, spikes=spikes, **loop)

    straight, state = train(settings(tmp_path / "a"), bad)
    stopped = settings(tmp_path / "b")
    world = alone()
    world.stop_signalled = False
    engine = ToyEngine(stopped, world)
    loader = BadLoader(stopped, world, bad)
    original = loader.next_batch

    def next_batch():
        world.stop_signalled = loader.step + 1 == stop
        return original()

    loader.next_batch = next_batch
    fit(engine, loader, Run(stopped.run, stopped, world), stopped.loop)
    resumed, resumed_state = train(stopped, bad)
    assert torch.equal(resumed.weight, straight.weight)
    assert torch.equal(resumed.momentum, straight.momentum)
    assert resumed_state == state
    assert events(tmp_path / "b") == events(tmp_path / "a")


def test_the_score_counts_robust_deviations_above_the_median():
    window = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert robust_score(3.0, window) == 0
    assert robust_score(3.0 + 1.4826, window) == pytest.approx(1.0, abs=1e-12)
    assert robust_score(2.0, window) < 0
    assert robust_score(1.1, [1.0] * 9) == pytest.approx(10.0)  # at least 1 % of the median


def test_the_guard_of_one_process_names_no_step():
    guard = Guard(LoopConfig(steps=4, on_nonfinite="stop"))
    with pytest.raises(NonFiniteError, match="loss = nan, grad_norm = 1: training"):
        guard.decide(torch.tensor(math.nan), 1.0)


def test_a_new_phase_is_not_compared_with_the_one_before(tmp_path):
    phases = [{"from_step": 14, "optim": {"lr": 0.05}}]
    settings = config(tmp_path, steps=17, spikes={**SPIKES, "action": "skip"})
    settings = ToyConfig(**settings.model_dump() | {"phases": phases})
    _, state = train(settings, {14: 1e4})  # would be a spike among the steps before it
    assert events(tmp_path) == []
    (window,) = state.guard.windows.values()
    assert len(window.losses) == len(window.grad_norms) == 3


def test_a_step_is_compared_with_steps_of_its_own_clip_shape():
    """Videos have 50 times the loss of images: neither is a spike, an image with theirs is."""
    guard = Guard(LoopConfig(steps=100, spikes={"window": 8, "threshold": 6.0, "action": "skip"}))
    for step in range(40):
        guard.bucket, loss = ("1x8x8", 1.0) if step % 2 else ("17x8x8", 50.0)
        assert guard.decide(loss + 0.01 * (step % 5), 1.0)
    guard.bucket = "1x8x8"
    assert not guard.decide(50.0, 1.0)
    assert guard.event.cause == "spike"


def test_checkpoints_with_one_window_for_all_shapes_are_still_read():
    document = {"step": 3, "kind": "ToyConfig", "loader": {}, "manifest": "", "columns": {}}
    guard = {"losses": [1.0], "grad_norms": [2.0], "updates": 3}
    state = CheckpointState(**document, world_size=1, versions={}, guard=guard)
    assert (state.guard.updates, state.guard.windows) == (3, {})
