"""AdamW and its learning rate, for the torch and DeepSpeed trainers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from landiff.training.config import OptimConfig, TrainConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step number `step` (from 0) of `total_steps`.

    A pure function, so there is no scheduler state to save. Warmup is linear, with
    (step + 1) / warmup_steps of the full rate. After it the rate is constant or falls, and would
    reach min_lr in the step after the last one of the decay.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    first = config.warmup_steps  # step of the decay
    length = config.decay_steps or total_steps - first
    shape: str = config.decay
    if config.decay == "wsd":
        first = max(first, total_steps - length)
        shape = config.decay_shape
    done = min(1.0, max(0, step - first) / max(1, length))
    return config.min_lr + (config.lr - config.min_lr) * _remaining(shape, done)


def rate_of_step(config: TrainConfig, step: int) -> float:
    """Learning rate of a step of a run, with the schedule of its phase."""
    optim, first_step = config.schedule_at(step)
    return learning_rate(optim, step - first_step, config.loop.steps - first_step)


def _remaining(shape: str, done: float) -> float:
    """Part of the distance to min_lr that remains after the part `done` of the decay."""
    if shape == "linear":
        return 1 - done
    if shape == "sqrt":
        return 1 - math.sqrt(done)
    return 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> list[dict[str, Any]]:
    """Parameter groups of equal scales (`OptimConfig.scales_of`), the largest scales first.

    Parameters without gradient are skipped.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            scales = config.scales_of(name, parameter.ndim)
            members.setdefault(scales, []).append(parameter)
    groups = []
    for scales in sorted(members, reverse=True):
        lr_scale, decay_scale = scales
        group = {"params": members[scales], "weight_decay": config.weight_decay * decay_scale}
        groups.append({**group, "lr_scale": lr_scale, "decay_scale": decay_scale})
    return groups


def adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    device: torch.device | None = None,
) -> torch.optim.AdamW:
    """torch's AdamW over `parameter_groups`. Call `set_rate_and_decay` before each step.

    named: parameters with their names. device: where it will update them. `optim.fused` = null
        means one fused kernel on CUDA, and torch's default on the CPU.
    """
    groups = parameter_groups(named, config)
    fused = config.fused
    if fused is None and device is not None and device.type == "cuda":
        fused = True
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def step_count(steps: Tensor | float, parameter: Tensor, fused: bool | None) -> Tensor:
    """AdamW's number of steps in the state of `parameter`: on its device if fused, else the CPU."""
    device = parameter.device if fused else torch.device("cpu")
    return torch.as_tensor(steps, dtype=torch.float32).to(device)


def set_rate_and_decay(optimizer: torch.optim.Optimizer, rate: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of all parameter groups, times the scales of each."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["decay_scale"]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients to a global norm of at most `max_norm`. Returns the norm before that.

    `max_norm` = 0 leaves them unchanged.
    """
    limit = max_norm if max_norm > 0 else math.inf
    return nn.utils.clip_grad_norm_(parameters, limit)
