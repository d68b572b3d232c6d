"""Phases of a run: changes of data, batch, learning rate and conditions at a step. Torch-free.

The top level of a trainer's config is the first phase. Each entry of `phases` changes some values
from a step on and keeps the others. Earlier steps do not depend on it.

A phase may train on other clip shapes (`data.buckets`): images, images and videos, then videos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from landiff.configs.base import Config
from landiff.data_pipeline.format.buckets import BucketName
from landiff.data_pipeline.loading.config import RampConfig, SourceConfig

NEW_ORDER = ("manifest", "remote", "weight", "where", "blend", "buckets", "balance_tokens")
PHASES_DESCRIPTION = "Changes of the config at steps of the run, in the order of their `from_step`."


class DataChange(Config):
    """New values of `data`. null keeps a value.

    A phase that sets data (`manifest`, `remote`, `weight`, `where`, `blend`, `buckets`
    or `balance_tokens`, also with the same value) starts a new order of samples with its own
    epochs. Other phases continue the order.
    """

    manifest: Path | None = Field(default=None, description="As `data.manifest`.")
    remote: str | None = Field(default=None, description="As `data.remote`.")
    weight: PositiveFloat | None = Field(default=None, description="As `data.weight`.")
    where: str | None = Field(default=None, description="As `data.where`; `''` is no condition.")
    blend: tuple[SourceConfig, ...] | None = Field(
        default=None, description="As `data.blend`: the complete list. [] is no blend."
    )
    buckets: tuple[BucketName, ...] | None = Field(
        default=None, min_length=1, description="As `data.buckets`."
    )
    balance_tokens: bool | None = Field(default=None, description="As `data.balance_tokens`.")
    global_batch_size: PositiveInt | None = Field(
        default=None, description="As `data.global_batch_size`. It ends a ramp."
    )
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="As `data.micro_batch_size`."
    )
    ramp: RampConfig | None = Field(
        default=None, description="As `data.ramp`, from the first step of the phase."
    )


class OptimChange(Config):
    """New values of `optim`. null keeps a value, except for the warmup.

    The learning rate starts a new schedule, from the first step of the phase to `loop.steps`. The
    schedule continues if only `weight_decay` and `clip_grad` are set.
    """

    lr: PositiveFloat | None = Field(default=None, description="As `optim.lr`.")
    warmup_steps: NonNegativeInt = Field(
        default=0,
        description="Steps of the phase over which the learning rate rises linearly from 0 to "
        "`lr`.",
    )
    decay: Literal["constant", "linear", "cosine", "wsd"] | None = Field(
        default=None, description="As `optim.decay`."
    )
    decay_steps: PositiveInt | None = Field(default=None, description="As `optim.decay_steps`.")
    decay_shape: Literal["linear", "cosine", "sqrt"] | None = Field(
        default=None, description="As `optim.decay_shape`."
    )
    min_lr: NonNegativeFloat | None = Field(default=None, description="As `optim.min_lr`.")
    weight_decay: NonNegativeFloat | None = Field(
        default=None, description="As `optim.weight_decay`."
    )
    clip_grad: NonNegativeFloat | None = Field(default=None, description="As `optim.clip_grad`.")


class PhaseConfig(Config):
    """Values that change at a step. What a phase does not set keeps its value."""

    from_step: PositiveInt = Field(description="First step of the phase, counted from 0.")
    data: DataChange | None = Field(default=None, description="Changes of data and batch sizes.")
    optim: OptimChange | None = Field(default=None, description="Changes of the optimizer.")


S = TypeVar("S", bound=Config)


def changed(section: S, change: Config) -> S:
    """`section` with the values of `change` that are not null, by name."""
    values = {}
    for name in type(change).model_fields:
        value = getattr(change, name)
        if value is not None:
            values[name] = value
    if isinstance(change, OptimChange) and not _names_schedule(change):
        del values["warmup_steps"]
    if isinstance(change, DataChange) and change.global_batch_size is not None:
        values.setdefault("ramp", None)
    return section.model_copy(update=values)


def apply_phase(config: S, phase: PhaseConfig) -> S:
    """`config` with the changes of one phase."""
    values = {}
    for name in type(phase).model_fields:
        change = getattr(phase, name)
        if name == "from_step" or change is None:
            continue
        if isinstance(change, Config):
            change = changed(getattr(config, name), change)
        values[name] = change
    return config.model_copy(update=values)


def _names_schedule(change: OptimChange) -> bool:
    """Whether a change of `optim` names more than weight decay and clipping, or nothing at all."""
    schedule = (change.lr, change.decay, change.decay_steps, change.decay_shape, change.min_lr)
    if change.warmup_steps or any(value is not None for value in schedule):
        return True
    return change.weight_decay is None and change.clip_grad is None


def begins_schedule(phase: PhaseConfig) -> bool:
    """Whether the learning rate begins a new schedule with a phase."""
    return phase.optim is not None and _names_schedule(phase.optim)


def names_data(phase: PhaseConfig) -> bool:
    """Whether a phase begins a new order of samples."""
    change = phase.data
    return change is not None and any(getattr(change, name) is not None for name in NEW_ORDER)


def names_batch_size(phase: PhaseConfig) -> bool:
    """Whether a phase begins a new course of the batch size."""
    change = phase.data
    if change is None:
        return False
    return change.global_batch_size is not None or change.ramp is not None
