"""Traces of torch's profiler and snapshots of the device's memory: `loop.profile`.

The traces are in the TensorBoard folder of the run under the names that TensorBoard's profiler
plugin expects; Perfetto and Chrome open them too. A run that resumes within the window records the
remaining steps to another file.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler

from landiff.training.checkpoint.run_folder import TENSORBOARD, rank_name
from landiff.training.distributed import World
from landiff.training.observe.config import ProfileConfig

log = logging.getLogger(__name__)

MEMORY_EVENTS = 100_000  # allocations and releases that a snapshot holds


class Profiler:
    """Records the steps of a window on the chosen ranks. It does nothing without a config."""

    def __init__(self, run: Path, config: ProfileConfig | None, world: World) -> None:
        """`run`: the run folder."""
        self.folder = run / TENSORBOARD
        self.config = config
        self.world = world
        self.chosen = config is not None and world.rank in config.ranks
        self._profile: profile | None = None
        self._step: record_function | None = None

    def begin(self, step: int) -> None:
        """Note that step number `step` begins, counted from 1. Starts or ends the recording."""
        if self.config is None or not self.chosen:
            return
        self._end_step()
        first = self.config.start
        if first <= step < first + self.config.steps:
            if self._profile is None:
                self._start()
            # The name that TensorBoard's plugin divides a trace by.
            self._step = record_function(f"ProfilerStep#{step}")
            self._step.__enter__()
        else:
            self.close()

    def close(self) -> None:
        """End the recording, if any, and write it. A full disk is logged, not raised."""
        self._end_step()
        if self._profile is None:
            return
        try:
            self._profile.stop()  # writes the trace
            if self.world.device.type == "cuda":
                self._write_memory()
        except OSError as error:
            log.warning("the profile could not be written to %s: %s", self.folder, error)
        self._profile = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        worker = f"{os.uname().nodename}_{rank_name(self.world.rank)}"
        self._profile = profile(
            activities=activities,
            record_shapes=True,
            profile_memory=True,
            on_trace_ready=tensorboard_trace_handler(str(self.folder), worker, use_gzip=True),
        )
        self._profile.start()

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _write_memory(self) -> None:
        name = f"memory_{rank_name(self.world.rank)}.{time.time_ns()}.pickle"
        torch.cuda.memory._dump_snapshot(str(self.folder / name))
        torch.cuda.memory._record_memory_history(enabled=None)
