"""Lifecycle of a run: one training job in its run folder, over any number of restarts.

    Run(...)            write the config, clear requests of an earlier attempt
    resume              load the newest checkpoint, drop metrics logged after it
    stop_requested      after each step: end early?
    checkpoints.save    see training/checkpoint/store.py
    end                 close the metrics, record that the run is done

training/checkpoint/run_folder.py lists the files of the folder. training/loop.py calls these
methods.
"""

from __future__ import annotations

from pathlib import Path

from landiff.configs.files import write_text
from landiff.configs.loader import write_config
from landiff.training.checkpoint.run_folder import CHECKPOINTS, CONFIG, DONE, STOP, finished_step
from landiff.training.checkpoint.store import CheckpointStore
from landiff.training.config import TrainConfig
from landiff.training.distributed import World
from landiff.training.engine import BatchSource, Engine, TrainState
from landiff.training.observe.heartbeat import Heartbeat
from landiff.training.observe.metrics import Metrics
from landiff.training.observe.profiling import Profiler
from landiff.training.observe.trackers import Trackers


class Run:
    """One run folder, with its checkpoints, heartbeat and metrics. All ranks build it together."""

    def __init__(self, folder: Path, config: TrainConfig, world: World) -> None:
        """Prepare `folder` for training with `config`."""
        self.folder = folder
        self.world = world
        self.total_steps = config.loop.steps
        if world.rank == 0:
            write_config(folder / CONFIG, config)
            self._stop_file.unlink(missing_ok=True)  # meant for an earlier attempt
            if (finished_step(folder) or 0) < self.total_steps:
                (folder / DONE).unlink(missing_ok=True)  # loop.steps was raised
        self.checkpoints = CheckpointStore(folder / CHECKPOINTS, config, world)
        self.heartbeat = Heartbeat(
            folder, world.rank, config.loop.hang_timeout_s, world_size=world.size
        )
        self.profiler = Profiler(folder, config.loop.profile, world)
        trackers = None
        if world.rank == 0 and config.trackers:
            trackers = Trackers(folder, config)
        self.metrics = Metrics(folder, self.total_steps, world, trackers=trackers)

    @property
    def _stop_file(self) -> Path:
        return self.folder / STOP

    def resume(self, engine: Engine, loader: BatchSource) -> TrainState:
        """Restore engine and loader from the newest checkpoint, if any. Returns the state."""
        state = self.checkpoints.load_latest(engine, loader) or TrainState()
        self.metrics.resume(state)
        return state

    def stop_requested(self) -> bool:
        """Whether a rank received SIGTERM or SIGUSR1, or a `stop` file exists. Equal on all ranks.

        One all-reduce of 4 bytes between CPUs per step (0.1 ms on one node, about 1 ms over
        hundreds). It does not wait for the device.
        """
        file_exists = self.world.rank == 0 and self._stop_file.exists()
        return self.world.any_true(self.world.stop_signalled or file_exists)

    def end(self, state: TrainState) -> None:
        """Close profile and metrics, remove the stop request, write `done` after the last step."""
        self.profiler.close()
        self.metrics.close()
        if self.world.rank == 0:
            self._stop_file.unlink(missing_ok=True)
            if state.step >= self.total_steps:
                write_text(self.folder / DONE, f"{state.step}\n")
        self.world.barrier()
