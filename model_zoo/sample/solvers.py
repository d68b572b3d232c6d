"""Deterministic solvers of diffusers, as alternatives to the reference's SDE DPM-Solver++.

They are exact in what they share with it: the noise levels of the training schedule, the timesteps,
and a network output that is converted to x0 before it reaches the solver. UniPC and Euler work in
noise levels relative to the signal, which are infinite without any signal, so diffusers starts them
at a squared signal of 2^-24.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from landiff.model_zoo.schedule import NoiseSchedule

Solver = Literal["sde-dpm++", "ddim", "unipc", "euler"]


def build_scheduler(solver: Solver, schedule: NoiseSchedule, num_steps: int) -> Any:
    """A scheduler of diffusers with the levels of `schedule`, for x0 predictions."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

    classes = {
        "ddim": DDIMScheduler,
        "unipc": UniPCMultistepScheduler,
        "euler": EulerDiscreteScheduler,
    }
    options: dict[str, Any] = {
        "num_train_timesteps": schedule.config.num_timesteps,
        "trained_betas": betas(schedule).tolist(),
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    if solver == "ddim":
        options["clip_sample"] = False
    else:
        options["rescale_betas_zero_snr"] = True
    scheduler = classes[solver](**options)
    scheduler.set_timesteps(num_steps)
    return scheduler


def betas(schedule: NoiseSchedule) -> Tensor:
    """Variance that each timestep adds, float64 [timesteps]; 1 at the last, which has no signal."""
    squared = schedule.alphas_sqrt.double() ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), squared[:-1]])
    return 1 - squared / before
