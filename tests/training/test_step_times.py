"""Times within a step, on the host and on a device."""

from __future__ import annotations

import io
import logging
import pickle
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from landiff.data_pipeline.loading.loader import Batch
from landiff.training.checkpoint.run_folder import METRICS, read_metrics
from landiff.training.distributed import World
from landiff.training.engine import StepResult, TrainState
from landiff.training.observe.config import ProfileConfig
from landiff.training.observe.metrics import Metrics
from landiff.training.observe.profiling import Profiler
from landiff.training.observe.step_times import StartTimes, StepClock, StepTimes
from tests.distributed import run_distributed


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


def test_the_start_begins_with_the_process_and_each_part_ends_once():
    times = StartTimes()
    begin = time.monotonic()
    times.end("imports")
    process_s = time.process_time()  # of one thread at most, and the tests were imported before
    assert times.seconds["imports"] > 0.5 * min(process_s, 1.0)
    time.sleep(0.05)
    times.end("model")
    assert 0.05 <= times.seconds["model"] <= time.monotonic() - begin
    before = dict(times.seconds)
    times.end("model")  # as that of the next step would
    assert times.seconds == before


def start_of_rank(world: World, folder: Path) -> tuple[dict[str, float], str]:
    """Two logged steps of a rank. Rank 1 builds its model slowly, rank 0 has its data late."""
    text = io.StringIO()
    logging.getLogger("landiff").addHandler(logging.StreamHandler(text))
    time.sleep(1.0 if world.rank == 1 else 0.0)
    world.start_times.end("model")
    metrics = Metrics(folder, 2, world, io.StringIO())
    metrics.resume(TrainState(0))
    for step in (1, 2):
        with metrics.timing("data"):
            time.sleep(0.3 if world.rank == 0 else 0.0)
        result = StepResult(torch.tensor(1.0), torch.tensor(1.0), 0.1)
        metrics.count(Batch(step - 1, 1, ()), result)
        metrics.log(TrainState(step), result)
    metrics.close()
    return world.start_times.seconds, text.getvalue()


def test_the_first_line_has_the_slowest_rank_of_each_part_of_the_start(tmp_path):
    (own, text), (other, other_text) = run_distributed(start_of_rank, 2, tmp_path)
    first, second = read_metrics(tmp_path / METRICS)
    found = {tag: value for tag, value in first.items() if tag.startswith("start/")}
    parts = ["imports", "process_groups", "model", "first_batch", "first_step"]
    assert found == {f"start/{part}_s": max(own[part], other[part]) for part in parts}
    assert other["model"] >= 1.0 and other["model"] > own["model"]
    assert own["first_batch"] >= 0.3
    assert not any(tag.startswith("start/") for tag in second)
    (line,) = [line for line in text.splitlines() if "the start took" in line]
    assert f"model {found['start/model_s']:.1f}, first batch" in line
    assert "the start took" not in other_text


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
