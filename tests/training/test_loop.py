"""The training loop: resumes exactly, stops on request, repeats no step."""

import os
import signal
from dataclasses import dataclass

import pytest
import torch

from landiff.training.checkpoint.run_folder import finished_step, read_metrics
from landiff.training.config import LoopConfig
from landiff.training.loop import due, fit
from landiff.training.run import Run
from tests.distributed import run_distributed
from tests.training.toy import ToyConfig, ToyEngine, ToyLoader, alone, train


def config(folder, steps=6, **loop):
    return ToyConfig(run=folder, loop=LoopConfig(steps=steps, log_every=1, **loop))


def losses(folder):
    return [(line["step"], line["train/loss"]) for line in read_metrics(folder / "metrics.jsonl")]


def test_due_counts_finished_steps_and_zero_means_never():
    assert [step for step in range(1, 7) if due(step, 3)] == [3, 6]
    assert not any(due(step, 0) for step in range(1, 7))


def test_resume_equals_uninterrupted(tmp_path):
    _, straight = train(config(tmp_path / "a", 6), alone())
    train(config(tmp_path / "b", 3), alone())
    state, resumed = train(config(tmp_path / "b", 6), alone())
    assert state.step == 6
    assert torch.equal(resumed.weight, straight.weight)
    assert resumed.seen == straight.seen[12:]
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_finished_run_returns_at_once_and_a_longer_one_goes_on(tmp_path):
    train(config(tmp_path), alone())
    assert finished_step(tmp_path) == 6
    state, engine = train(config(tmp_path), alone())
    assert (state.step, engine.seen) == (6, [])
    assert finished_step(tmp_path) == 6
    state, engine = train(config(tmp_path, 8), alone())
    assert (state.step, len(engine.seen)) == (8, 8)
    assert finished_step(tmp_path) == 8


@dataclass
class Interrupted(ToyEngine):
    """Asks for a stop during its third step."""

    how: str = "file"

    def train_step(self, batch):
        if batch.step == 2 and self.how == "file":
            (self.config.run / "stop").touch()
        elif batch.step == 2 and self.world.rank == self.world.size - 1:
            os.kill(os.getpid(), signal.Signals[self.how])
        return super().train_step(batch)


def test_stop_file_saves_and_ends_and_the_next_run_goes_on(tmp_path):
    settings, world = config(tmp_path), alone()
    state = fit(
        Interrupted(settings, world),
        ToyLoader(settings, world),
        Run(tmp_path, settings, world),
        settings.loop,
    )
    assert state.step == 3
    assert (tmp_path / "checkpoints" / "step_00000003").is_dir()
    assert finished_step(tmp_path) is None
    assert not (tmp_path / "stop").exists()
    assert train(settings, world)[0].step == 6


def stopped_by_signal(world, folder):
    steps = []
    for name in ("SIGTERM", "SIGUSR1"):
        settings = config(folder / name)
        run = Run(settings.run, settings, world)
        steps.append(
            fit(
                Interrupted(settings, world, how=name),
                ToyLoader(settings, world),
                run,
                settings.loop,
            ).step
        )
        world.stop_signalled = False
    return steps


def test_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    assert run_distributed(stopped_by_signal, 2, tmp_path) == [[3, 3], [3, 3]]


def resumed_on(world, folder):
    state, engine = train(config(folder, 6), world)
    return state.step, engine.seen, engine.weight


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    _, straight = train(config(tmp_path / "a", 6), alone())
    train(config(tmp_path / "b", 3), alone())
    results = run_distributed(resumed_on, 2, tmp_path / "b")
    assert sorted(results[0][1] + results[1][1]) == straight.seen[12:]
    for step, _, weight in results:
        assert step == 6
        torch.testing.assert_close(
            weight, straight.weight, rtol=1e-6, atol=0
        )  # another order of summation


@pytest.mark.parametrize(("every", "expected"), [(0, []), (2, [2, 4, 6])])
def test_previews_reach_tensorboard_as_gifs(tmp_path, every, expected):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(tmp_path, preview_every=every), alone())
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    images = events.Images("preview/noise") if expected else []
    assert [image.step for image in images] == expected
    assert all(image.encoded_image_string.startswith(b"GIF89a") for image in images)
