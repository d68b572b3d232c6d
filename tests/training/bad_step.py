"""Whole runs through `fit` whose batch is bad at a random step, for any engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from landiff.data_pipeline.loading.loader import Batch
from landiff.training.checkpoint.run_folder import CHECKPOINTS, EVENTS, STOP, step_folder
from landiff.training.config import TrainConfig
from landiff.training.distributed import World
from landiff.training.loop import fit
from landiff.training.observe.events import read_events
from landiff.training.run import Run
from tests.training.skipping import State, differing, state_of
from tests.training.toy import ToyLoader

LOOP = {"steps": 6, "seed": 3, "save_every": 2, "keep_last": 9, "log_every": 1}


@dataclass(frozen=True)
class BadStep:
    """Which batch is bad, counted from 0, and on which rank."""

    step: int
    rank: int

    @classmethod
    def draw(cls, ranks: int) -> BadStep:
        """Another one in every run of the tests. The last step follows it."""
        return cls(
            random.Random().randrange(0, LOOP["steps"] - 1), random.Random().randrange(ranks)
        )

    @property
    def checkpoint(self) -> int:
        """Step of the last checkpoint before it."""
        return self.step // LOOP["save_every"] * LOOP["save_every"]


@dataclass(frozen=True)
class Trial:
    """One trainer with its options.

    config: of a run folder, with these values of `loop`.
    batches: this rank's part of a global batch. spoil: makes such a batch bad.
    """

    config: Callable[[Path, dict[str, Any]], Any]
    build: Callable[[Any], Any]
    close: Callable[[Any], None]
    optimizers: Callable[[Any], Iterable[torch.optim.Optimizer]]
    batches: Callable[[Any, int], Batch]
    spoil: Callable[[Any, Batch], None]


class Stream(ToyLoader):
    """The batches of a trial, of which one is bad. Can ask the run to stop after it."""

    def __init__(self, config: TrainConfig, world: World, trial: Trial, bad: BadStep) -> None:
        super().__init__(config, world)  # type: ignore[arg-type]
        self.trial = trial
        self.bad = bad
        self.stops = False

    def next_batch(self) -> Batch:
        self.step += 1
        made = self.trial.batches(self.config, self.step - 1)
        if made.step == self.bad.step:
            if self.world.rank == self.bad.rank:
                self.trial.spoil(self.config, made)
            if self.stops:
                (self.config.run / STOP).touch()
        return made


def check_bad_step(trial: Trial, world: World, folder: Path, bad: BadStep) -> dict[str, Any]:
    """What is wrong after a run that skips the step, and after one that rolls back: nothing.

    Names of tensors that differ from those of a run that never saw the batch, from the checkpoint,
    and from an undisturbed run after a stop.
    """

    def complete_state(engine: Any) -> State:
        with engine.weights(ema=False):  # gathers weights that a step has left divided
            return state_of(engine, trial.optimizers(engine))

    def run(name: str, action: str, *, stops: bool = False) -> tuple[State, list[Any]]:
        """State and events of a run, which continues what its folder has."""
        config = trial.config(folder / name, {**LOOP, "on_nonfinite": action})
        engine = trial.build(config)
        stream = Stream(config, world, trial, bad)
        stream.stops = stops
        fit(engine, stream, Run(config.run, config, world), config.loop)
        found = complete_state(engine)
        trial.close(engine)
        events = read_events(config.run / EVENTS)
        return found, [(event["step"], event["kind"], event.get("to")) for event in events]

    def steps(checkpoint: Path | None, first: int) -> tuple[State, State]:
        """State of a checkpoint or a new engine, and after the good steps from `first` on."""
        config = trial.config(folder / "unseen", LOOP)
        engine = trial.build(config)
        if checkpoint is not None:
            engine.load(checkpoint)
        before = complete_state(engine)
        for step in range(first, LOOP["steps"]):
            if step != bad.step:
                engine.train_step(trial.batches(config, step))
        after = complete_state(engine)
        trial.close(engine)
        return before, after

    skipped, skip_events = run("skip", "skip")
    _, unseen = steps(None, 0)
    rolled_back, _ = run("rollback", "rollback", stops=True)
    checkpoint = step_folder(folder / "rollback" / "run" / CHECKPOINTS, bad.checkpoint)
    restored, continued = steps(checkpoint, bad.step + 1)
    resumed, rollback_events = run("rollback", "rollback")
    events = [skip_events, rollback_events]
    expected = [
        [(bad.step + 1, "skip", None)],
        [(bad.step + 1, "rollback", bad.checkpoint)],
    ]
    wrong = {
        "a run with a skipped step, unlike one that never saw the batch": differing(
            skipped, unseen
        ),
        "a run after a rollback, unlike the checkpoint": differing(rolled_back, restored),
        "a resumed run with a rollback, unlike one without the batch": differing(
            resumed, continued
        ),
        "equal although trained": [] if differing(restored, continued) else ["all"],
        "events": [] if world.rank or events == expected else events,
    }
    return {what: found for what, found in wrong.items() if found}
