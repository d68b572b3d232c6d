"""Times within a step, on the host and on a device."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from landiff.training.distributed import World
from landiff.training.observe.config import ProfileConfig
from landiff.training.observe.profiling import Profiler
from landiff.training.observe.step_times import StepClock, StepTimes


def one_step(clock: StepClock, model: nn.Module, *, update: bool = True) -> StepTimes:
    """A step of two micro-batches."""
    x_BD = torch.ones(2, 8, device=clock.device)
    clock.start()
    for _ in range(2):
        model(x_BD).sum().backward()
    if update:
        clock.update()
        model.weight.grad.zero_()
    return clock.stop()


def test_the_parts_of_a_step_add_up_and_only_its_first_forward_is_observed():
    model = nn.Linear(8, 8)
    clock = StepClock(torch.device("cpu"), model)
    model(torch.ones(2, 8))  # a preview or validation, outside of a step
    times = one_step(clock, model)
    marks = [times.start, times.forward_start, times.forward_end, times.update, times.end]
    assert marks == sorted(marks) and len(set(marks)) == 5
    parts = times.forward_backward_s + times.optimizer_s
    assert parts == pytest.approx(times.end - times.start)
    assert times.first_forward_s < times.forward_backward_s


def test_a_skipped_step_has_no_update_and_the_next_one_is_measured_again():
    model = nn.Linear(8, 8)
    clock = StepClock(torch.device("cpu"), model)
    assert one_step(clock, model, update=False).optimizer_s == 0
    assert one_step(clock, model).optimizer_s > 0


def test_a_step_that_raised_leaves_nothing_behind():
    model = nn.Linear(8, 8)
    clock = StepClock(torch.device("cpu"), model)
    clock.start()
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 5))
    assert one_step(clock, model).first_forward_s > 0


@pytest.mark.gpu
def test_events_of_the_device_and_a_snapshot_of_its_memory(tmp_path):
    device = torch.device("cuda", 0)
    world = World(0, 1, 0, device, "nccl")
    model = nn.Linear(8, 8).to(device)
    clock = StepClock(device, model)
    profiler = Profiler(tmp_path, ProfileConfig(start=2, steps=1), world)
    for step in (1, 2, 3):
        profiler.begin(step)
        times = one_step(clock, model)
        assert times.forward_backward_s > 0 and times.optimizer_s > 0
    (snapshot,) = (tmp_path / "tensorboard").glob("memory_rank_0000.*.pickle")
    assert "device_traces" in pickle.loads(snapshot.read_bytes())
    assert len(list((tmp_path / "tensorboard").glob("*.pt.trace.json.gz"))) == 1
