"""The measured speed of a run, used to plan other runs."""

from __future__ import annotations

import statistics
from pathlib import Path

from landiff.configs import ConfigError, load
from landiff.configs.loader import read_json_as
from landiff.launchers.budget.models import make_plan
from landiff.launchers.budget.step_time import Gpu, Speed, utilization_of
from landiff.launchers.run.curves import read_run
from landiff.launchers.stages import TRAINERS
from landiff.training.checkpoint.files import CheckpointState
from landiff.training.checkpoint.run_folder import (
    CHECKPOINTS,
    RESOLVED,
    STATE,
    committed_steps,
    step_folder,
)

MFU = "throughput/mfu"


def measured_speed(run: Path, stage: str, gpu: Gpu) -> Speed:
    """The speed of a run of the trainer `stage`, on GPUs of this kind.

    It is the median model FLOPs utilization of the second half of the run, from which the traffic
    of its layout is taken out. Raises ConfigError if the run has not measured it.
    """
    curve = read_run(run).curves.get(MFU, [])
    values = [value for _, value in curve[len(curve) // 2 :]]
    if not values:
        raise ConfigError(
            f"--calibrate {run}: the run has no {MFU} in its metrics; it is measured on GPUs whose "
            "peak is known. Give --mfu instead"
        )
    mfu = statistics.median(values)
    config = load(TRAINERS[stage].config_class, str(run / RESOLVED))
    return Speed(mfu, utilization_of(make_plan(config, ranks_of(run)), gpu, mfu))


def ranks_of(run: Path) -> int:
    """Ranks of a run, from its newest checkpoint. Raises ConfigError if it has none."""
    folder = run / CHECKPOINTS
    steps = committed_steps(folder)
    if not steps:
        raise ConfigError(
            f"--calibrate {run}: the run has no checkpoint yet, which says on how many GPUs it ran"
        )
    return read_json_as(CheckpointState, step_folder(folder, steps[-1]) / STATE).world_size
