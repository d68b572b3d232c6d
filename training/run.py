"""Lifecycle of a run: one training job in its run folder, over any number of restarts.

    Run(...)            write the config, clear requests of an earlier attempt
    resume              load the newest checkpoint, drop metrics logged after it; before the first
                        step of a run that may roll back, save a checkpoint to return to
    settle              after each step: record the guard's decision, roll back if required
    stop_requested      after each step: end early?
    checkpoints.save    see training/checkpoint/store.py
    end                 close the metrics, record that the run is done

training/checkpoint/run_folder.py lists the files of the folder. training/loop.py calls these
methods.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from landiff.configs.files import write_text
from landiff.configs.loader import write_config
from landiff.training.checkpoint.errors import NonFiniteError
from landiff.training.checkpoint.run_folder import CHECKPOINTS, CONFIG, DONE, STOP, finished_step
from landiff.training.checkpoint.store import CheckpointStore
from landiff.training.config import TrainConfig
from landiff.training.distributed import World
from landiff.training.engine import BatchSource, Engine, StepResult, TrainState
from landiff.training.observe.alarms import AlarmWatch
from landiff.training.observe.events import EventLog
from landiff.training.observe.heartbeat import Heartbeat
from landiff.training.observe.metrics import Metrics
from landiff.training.observe.profiling import Profiler
from landiff.training.observe.trackers import Trackers

log = logging.getLogger(__name__)


class Run:
    """One run folder, with its checkpoints, heartbeat and metrics. All ranks build it together."""

    def __init__(self, folder: Path, config: TrainConfig, world: World) -> None:
        """Prepare `folder` for training with `config`."""
        self.folder = folder
        self.world = world
        self.total_steps = config.loop.steps
        self.phase_starts = {phase.from_step for phase in config.phases}
        self.has_ema = config.ema is not None
        if world.rank == 0:
            write_config(folder / CONFIG, config)
            self._stop_file.unlink(missing_ok=True)  # meant for an earlier attempt
            if (finished_step(folder) or 0) < self.total_steps:
                (folder / DONE).unlink(missing_ok=True)  # loop.steps was raised
        self.checkpoints = CheckpointStore(folder / CHECKPOINTS, config, world)
        self.heartbeat = Heartbeat(
            folder, world.rank, config.loop.hang_timeout_s, world_size=world.size
        )
        world.heartbeat = self.heartbeat
        self.profiler = Profiler(folder, config.loop.profile, world)
        trackers = None
        if world.rank == 0 and config.trackers:
            trackers = Trackers(folder, config)
        self.metrics = Metrics(folder, self.total_steps, world, trackers=trackers, config=config)
        self.events = EventLog(folder, world.rank)
        self.alarms = AlarmWatch(self.events)
        world.stop_file = self._stop_file

    @property
    def _stop_file(self) -> Path:
        return self.folder / STOP

    def resume(self, engine: Engine, loader: BatchSource) -> TrainState:
        """Restore engine and loader from the newest checkpoint, if any. Returns the state.

        A run that may roll back has a checkpoint to return to from its first step on.
        """
        state = self.checkpoints.load_latest(engine, loader) or TrainState()
        engine.guard.state = state.guard
        self.world.step = state.step
        self.checkpoints.save_start(state, engine, loader)
        self.metrics.resume(state, engine.charts)
        self.events.resume(state.step)
        self.alarms.resume()
        self.world.start_times.end("checkpoint")
        return state

    def log(self, state: TrainState, result: StepResult) -> None:
        """Log the numbers of a step, and check them against the alarms. Collective."""
        scalars = self.metrics.log(state, result)
        self.alarms.check(state.step, result.alarms, scalars)

    def settle(self, state: TrainState, engine: Engine, result: StepResult) -> None:
        """Record the guard's decision in step `state.step`, and roll back if required.

        A checkpoint that is being written is committed here, and its failure raised.

        A rollback loads weights, optimizer and moving averages of the last healthy checkpoint.
        `state.step`, the schedule and the position in the data do not go back.
        """
        state.healthy = state.guard.suspect_steps == 0
        if state.step in self.phase_starts:
            state.guard.forget_windows()  # other data have other losses
        result.metrics |= engine.guard.metrics()
        result.metrics |= self.checkpoints.advance(state, engine)
        event = engine.guard.event
        if event is None:
            return
        record: dict[str, Any] = event.as_json()
        checkpoint = None
        if event.action == "rollback":
            checkpoint = record["to"] = self.checkpoints.roll_back(state, engine)
        self.events.add(state.step, record)
        log.warning("step %d: %s", state.step, event.describe(checkpoint))

    def stop_requested(self) -> bool:
        """Whether a rank received SIGTERM or SIGUSR1, or a `stop` file exists. Equal on all ranks.

        The ranks have agreed on it in the step itself, see `World.agree`.
        """
        return self.world.stopping

    def end(self, state: TrainState) -> None:
        """Close profile and metrics, remove the stop request, and write `done` after the last step.

        Raises NonFiniteError if no step of the run has updated the weights.
        """
        self.profiler.close()
        self.metrics.close()
        if state.step >= self.total_steps and state.guard.skipped and not state.guard.updates:
            raise NonFiniteError(
                f"none of the {state.step} steps of the run has changed the weights: "
                f"{state.guard.skipped} were skipped, since loss or gradient norm were not finite "
                f"or spiked, and {state.guard.undone} undone by rollbacks; see {self.events.path}. "
                "The run is not done"
            )
        if self.world.rank == 0:
            self._stop_file.unlink(missing_ok=True)
            if state.step >= self.total_steps:
                write_text(self.folder / DONE, f"{state.step}\n")
        self.world.barrier()
