"""The run folder: what one training job reads and leaves.

config.yaml      resolved config           metrics.jsonl   one line per logged step
checkpoints/     see training/checkpoint   tensorboard/    scalars and videos
errors/          one file per failed rank  done            the final step; only when finished
heartbeat/       one file per rank   hangs/          stacks of ranks that stood still
stop             put there by whoever wants the run to save and end
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from landiff.configs.base import Config
from landiff.configs.files import write_text
from landiff.configs.loader import write_config
from landiff.training.checkpoint.run_folder import finished_step
from landiff.training.checkpoint.store import CheckpointStore
from landiff.training.config import LoopConfig
from landiff.training.distributed import World
from landiff.training.engine import TrainState
from landiff.training.observe.heartbeat import Heartbeat
from landiff.training.observe.metrics import Metrics


class Run:
    """One run folder in the hands of this process. Built by all ranks together."""

    def __init__(
        self, folder: Path, config: Config, world: World, must_match: Sequence[str] = ("model",)
    ) -> None:
        """`config` has a `loop` section; a checkpoint may not differ from it in the sections `must_match`."""
        loop: LoopConfig = config.loop
        self.folder = folder
        self.world = world
        self.total_steps = loop.steps
        if world.rank == 0:
            write_config(folder / "config.yaml", config)
            (folder / "stop").unlink(missing_ok=True)  # it was meant for a process that is gone
            if (finished_step(folder) or 0) < loop.steps:
                (folder / "done").unlink(missing_ok=True)  # the run was made longer
        self.checkpoints = CheckpointStore(
            folder / "checkpoints", config, loop, world, must_match=must_match
        )
        self.heartbeat = Heartbeat(folder, world.rank, loop.hang_timeout_s, world_size=world.size)
        self.metrics = Metrics(folder, loop.steps, world)

    def stop_requested(self) -> bool:
        """Did any rank see SIGTERM or SIGUSR1, or rank 0 a `stop` file? Equal on all ranks.

        One all-reduce of 4 bytes between CPUs a step (0.1 ms on one node, about 1 ms over hundreds); the device
        is not waited for.
        """
        file_seen = self.world.rank == 0 and (self.folder / "stop").exists()
        return self.world.any_says(self.world.stop_signalled or file_seen)

    def end(self, state: TrainState) -> None:
        """Close what is open; mark the run as done if it is. A stop request that was followed is taken away."""
        self.metrics.close()
        if self.world.rank == 0:
            (self.folder / "stop").unlink(missing_ok=True)
            if state.step >= self.total_steps:
                write_text(self.folder / "done", f"{state.step}\n")
        self.world.barrier()
