"""Configs that all trainers share. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from landiff.configs.base import Config


class LoopConfig(Config):
    """The loop: how long, how often."""

    steps: PositiveInt
    seed: NonNegativeInt = (
        0  # of weights, noise, dropout; the order of samples has its own (data.seed)
    )
    log_every: PositiveInt = 10
    save_every: PositiveInt = 1000
    preview_every: NonNegativeInt = 0  # videos to TensorBoard; 0 = never
    keep_last: PositiveInt = 2  # checkpoints
    keep_every: NonNegativeInt = 0  # and every m-th step for good; 0 = none
    on_save_failure: Literal["warn", "retry", "fatal"] = "retry"
    hang_timeout_s: NonNegativeFloat = (
        1800.0  # without a step or a save: dump all stacks and end; 0 = wait for ever
    )

    @property
    def collective_timeout_s(self) -> float:
        """When torch itself gives a collective up: after the heartbeat, which shows what hangs."""
        return self.hang_timeout_s + 300.0 if self.hang_timeout_s else 86400.0


class OptimConfig(Config):
    """AdamW with linear warmup, then constant or cosine."""

    lr: PositiveFloat
    warmup_steps: NonNegativeInt = 0
    decay: Literal["constant", "cosine"] = "constant"
    min_lr: NonNegativeFloat = 0.0  # where cosine ends, at loop.steps
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_grad: NonNegativeFloat = Field(default=1.0, description="global norm; 0 = off")
