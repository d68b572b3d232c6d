"""Resharding a checkpoint with its optimizer: `landiff convert RUN --to megatron|deepspeed`.

A run's checkpoint becomes a run folder, from which `landiff train` resumes with the same weights,
optimizer state and position in the data:

    <out>/config.yaml             the run's config with the requested changes
    <out>/checkpoints/step_<n>/   a complete checkpoint, as the trainer writes it
    <out>/provenance.json

A checkpoint that our trainers did not write becomes a folder of its engine only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt

from landiff.configs import Config, ConfigError, load
from landiff.configs.documents import read_yaml
from landiff.configs.files import write_text
from landiff.configs.loader import read_json_as, write_config
from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.convert.formats import (
    deepspeed,
    deepspeed_write,
    megatron,
    megatron_optimizer,
)
from landiff.model_zoo.convert.formats.deepspeed import DeepSpeedState
from landiff.model_zoo.convert.formats.deepspeed_write import ZeroPartition
from landiff.model_zoo.convert.formats.megatron_optimizer import MegatronLayout, MegatronState
from landiff.model_zoo.convert.lazy import ProgressCallback
from landiff.model_zoo.convert.output_folder import new_folder
from landiff.model_zoo.lora.config import read_adapter
from landiff.training.checkpoint.files import (
    CheckpointState,
    describe_file,
    list_files,
    seal,
)
from landiff.training.checkpoint.run_folder import CHECKPOINTS, CONFIG, STATE, step_folder
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig

# engine -> config of the trainer that uses it, name of the trainer
TRAINER_CONFIGS: dict[str, type[LMTrainConfig] | type[DiffusionTrainConfig]] = {
    "megatron": LMTrainConfig,
    "deepspeed": DiffusionTrainConfig,
}
TRAINERS = {"megatron": "lm", "deepspeed": "diffusion"}
# Sections of a run's config that a conversion cannot change.
FIXED_SECTIONS = ("model", "schedule", "phase")
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # --dtype -> precision of a trainer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Precision = Literal["fp32", "bf16"]


# ---------------------------------------------------------------- overrides
#
# Keys that can be given on the command line where there is no run with a config. Their names and
# meanings are those of the trainers' configs.


class MegatronStartOverrides(Config):
    """Keys for weights that start a Megatron run."""

    vocab_multiple: PositiveInt = Field(
        default=128, description="The vocabulary is padded to a multiple of this many rows."
    )
    head_multiple: PositiveInt = Field(
        default=1, description="Attention heads are padded to a multiple of this number."
    )


class OptimizerSection(Config):
    """The section `parallel` of a Megatron checkpoint without a run."""

    distributed_optimizer: bool = Field(
        description="Whether the checkpoint is for Megatron's distributed optimizer."
    )


class MegatronOverrides(Config):
    """Keys for a Megatron checkpoint with its optimizer but without a run."""

    vocab_multiple: PositiveInt | None = Field(
        default=None,
        description="The vocabulary is padded to a multiple of this many rows; null keeps the "
        "padding.",
    )
    head_multiple: PositiveInt | None = Field(
        default=None,
        description="Attention heads are padded to a multiple of this number; null keeps the "
        "padding.",
    )
    parallel: OptimizerSection = Field(description="The kind of optimizer.")
    precision: Precision | None = Field(
        default=None, description="Dtype of the weights: fp32 or bf16; null keeps it."
    )


class ZeroSection(Config):
    """The section `zero` of a DeepSpeed checkpoint without a run."""

    stage: Literal[1, 2, 3] = Field(description="ZeRO stage.")


class ZeroStartOverrides(Config):
    """Keys for weights that start a DeepSpeed run."""

    zero: ZeroSection = Field(
        default=ZeroSection(stage=2),
        description="ZeRO stages 1 and 2 start from one file with any number of ranks, stage 3 "
        "from one file for each rank.",
    )


class ZeroOverrides(Config):
    """Keys for a DeepSpeed checkpoint with its optimizer but without a run."""

    zero: ZeroSection = Field(description="The ZeRO stage.")
    precision: Precision | None = Field(
        default=None, description="Dtype of the module: fp32 or bf16; null keeps it."
    )


# ---------------------------------------------------------------- requests


@dataclass(frozen=True)
class ReshardRequest:
    """What to make of a checkpoint with its optimizer."""

    to: str  # megatron | deepspeed
    out: Path
    overrides: tuple[str, ...] = ()  # key=value, as a trainer takes them
    dtype: str | None = None  # --dtype
    world_size: int | None = None  # of the run that resumes with DeepSpeed; None: unchanged
    model: LMConfig | None = None  # sizes of a Megatron folder without a config

    @property
    def all_overrides(self) -> list[str]:
        """The overrides, with --dtype as the key `precision`. Raises ConfigError."""
        if self.dtype is None:
            return list(self.overrides)
        if self.dtype not in PRECISIONS:
            raise ConfigError(
                f"--dtype {self.dtype}: the trainers compute in {' or '.join(PRECISIONS)}; only "
                "weights alone (--weights-only) can have another dtype"
            )
        return [*self.overrides, f"precision={PRECISIONS[self.dtype]}"]


def has_optimizer_state(path: Path, engine: str) -> bool:
    """Whether `path` is a checkpoint of an engine with its optimizer state. Raises ConfigError."""
    if engine == "megatron":
        return (path / ".metadata").is_file() and megatron_optimizer.has_optimizer(path)
    shards = deepspeed.find_shards(path) if engine == "deepspeed" else None
    return shards is not None and not deepspeed.is_start(deepspeed.read_deepspeed(shards))


def reshard(
    path: Path,
    request: ReshardRequest,
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None = None,
) -> str:
    """Write the resharded checkpoint to `request.out`; returns a description of it.

    Raises ConfigError. The folder then does not exist.
    """
    if (path / STATE).is_file():
        return _reshard_run(path, request, provenance, progress)
    if request.to == "megatron":
        return _reshard_megatron(path, request, provenance, progress)
    return _reshard_deepspeed(path, request, provenance, progress)


def describe_reshard(path: Path, request: ReshardRequest) -> str:
    """What `reshard` would write, as text. Options are checked as there."""
    if not (path / STATE).is_file():
        if request.to == "megatron":
            _, _, megatron_layout = _megatron_state(path, request)
            return f"a checkpoint without a run, {megatron_layout}"
        _, partition = _deepspeed_state(path, request)
        return f"a checkpoint without a run, {partition}"
    config = _run_config(path, request)
    if isinstance(config, LMTrainConfig):
        return (
            f"a run with precision {config.precision}, "
            f"parallel.distributed_optimizer = {config.parallel.distributed_optimizer}, "
            f"vocab_multiple {config.vocab_multiple}, head_multiple {config.head_multiple}"
        )
    world_size = request.world_size or deepspeed.ZeroLayout.read(path).world_size
    return (
        f"a run with precision {config.precision}, zero.stage {config.zero.stage}, "
        f"{world_size} ranks"
    )


# ---------------------------------------------------------------- checkpoints of runs


def _reshard_run(
    path: Path,
    request: ReshardRequest,
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None,
) -> str:
    """Reshard a run's checkpoint into a new run folder."""
    state = read_json_as(CheckpointState, path / STATE)
    config = _run_config(path, request)
    if state.kind != type(config).__name__:
        raise ConfigError(
            f"{path} was written by {state.kind}; --to {request.to} reshards checkpoints of "
            f"{type(config).__name__}"
        )
    with new_folder(request.out, provenance) as temporary:
        folder = step_folder(temporary / CHECKPOINTS, state.step)
        folder.mkdir(parents=True)
        if isinstance(config, LMTrainConfig):
            _write_megatron_engine(path, folder, config, progress)
        else:
            world_size = request.world_size or deepspeed.ZeroLayout.read(path).world_size
            _write_deepspeed_engine(path, folder, config, world_size, progress)
            state = state.model_copy(update={"world_size": world_size})
        seal(folder, state, config, [describe_file(folder, name) for name in list_files(folder)])
        write_config(temporary / CONFIG, config)
    trainer = TRAINERS[request.to]
    return (
        f"a run that resumes at step {state.step}: "
        f"landiff train {trainer} --config {request.out / CONFIG}"
    )


def _run_config(path: Path, request: ReshardRequest) -> LMTrainConfig | DiffusionTrainConfig:
    """The config of the checkpoint's run with the requested changes.

    Raises ConfigError for changes that a conversion cannot make.
    """
    stored = read_yaml(path / CONFIG)
    config_class = TRAINER_CONFIGS[request.to]
    config = load(config_class, {**stored, "run": str(request.out)}, request.all_overrides)
    before = load(config_class, stored).model_dump()
    after = config.model_dump()
    changed = [key for key in FIXED_SECTIONS if key in after and after[key] != before[key]]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: a conversion keeps the model. It can change vocab_multiple, "
            "head_multiple, parallel.*, zero.stage, precision, and keys that do not affect the "
            "checkpoint"
        )
    return config


def _write_megatron_engine(
    path: Path, folder: Path, config: LMTrainConfig, progress: ProgressCallback | None
) -> None:
    """Write the engine's files of a language model's checkpoint.

    Raises ConfigError for a run that trains an adapter.
    """
    if read_adapter(path) is not None:
        raise ConfigError(
            f"{path} holds an adapter (lora) with its optimizer, whose padding and kind of "
            "optimizer cannot be changed; it resumes in every parallel layout without conversion"
        )
    layout = MegatronLayout(
        megatron.default_padding(config.model, config.vocab_multiple, config.head_multiple),
        config.parallel.distributed_optimizer,
        DTYPES[config.precision],
    )
    state = megatron_optimizer.read_state(path, config.model)
    megatron_optimizer.write_state(folder, config.model, state, layout, progress)


def _write_deepspeed_engine(
    path: Path,
    folder: Path,
    config: DiffusionTrainConfig,
    world_size: int,
    progress: ProgressCallback | None,
) -> None:
    """Write the engine's files of a diffusion model's checkpoint."""
    layout = deepspeed.ZeroLayout.read(path)
    partition = ZeroPartition(config.zero.stage, world_size, DTYPES[config.precision])
    state = deepspeed.read_deepspeed(path / deepspeed.SHARDS)
    deepspeed_write.write_deepspeed(folder / deepspeed.SHARDS, state, partition, progress)
    changes = {
        "zero_stage": config.zero.stage,
        "world_size": world_size,
        "precision": config.precision,
    }
    layout.model_copy(update=changes).write(folder)
    adapter = read_adapter(path)
    if adapter is not None:
        adapter.write(folder)


# ---------------------------------------------------------------- checkpoints without a run


def _reshard_megatron(
    path: Path,
    request: ReshardRequest,
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None,
) -> str:
    """Convert a Megatron checkpoint that is not part of a run."""
    model, state, layout = _megatron_state(path, request)
    with new_folder(request.out, provenance) as temporary:
        megatron_optimizer.write_state(temporary, model, state, layout, progress)
        megatron.write_megatron_config(temporary, model)
    return "a Megatron checkpoint with its optimizer"


def _megatron_state(
    path: Path, request: ReshardRequest
) -> tuple[LMConfig, MegatronState, MegatronLayout]:
    """Model, state and requested layout of a Megatron checkpoint without a run."""
    model = request.model
    if (path / megatron.CONFIG).is_file():
        model = megatron.stored_config(path)
    assert model is not None, request
    state = megatron_optimizer.read_state(path, model)
    stored = state.layout
    defaults = {"parallel": {"distributed_optimizer": stored.distributed}}
    asked = load(MegatronOverrides, defaults, request.all_overrides)
    padded = megatron.default_padding(model, asked.vocab_multiple or 1, asked.head_multiple or 1)
    padded = megatron.Padded(
        vocab=padded.vocab if asked.vocab_multiple else stored.padded.vocab,
        heads=padded.heads if asked.head_multiple else stored.padded.heads,
    )
    dtype = DTYPES[asked.precision] if asked.precision else stored.dtype
    return model, state, MegatronLayout(padded, asked.parallel.distributed_optimizer, dtype)


def _reshard_deepspeed(
    path: Path,
    request: ReshardRequest,
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None,
) -> str:
    """Reshard a DeepSpeed checkpoint that is not part of a run."""
    state, partition = _deepspeed_state(path, request)
    tag = _shards_of(path).name
    with new_folder(request.out, provenance) as temporary:
        deepspeed_write.write_deepspeed(temporary / tag, state, partition, progress)
        write_text(temporary / "latest", tag)
    return (
        f"a DeepSpeed checkpoint with its optimizer: engine.load_checkpoint({str(request.out)!r})"
    )


def _deepspeed_state(path: Path, request: ReshardRequest) -> tuple[DeepSpeedState, ZeroPartition]:
    """State and requested partition of a DeepSpeed checkpoint without a run."""
    state = deepspeed.read_deepspeed(_shards_of(path))
    asked = load(ZeroOverrides, {"zero": {"stage": state.zero_stage}}, request.all_overrides)
    world_size = request.world_size or state.world_size
    dtype = DTYPES[asked.precision] if asked.precision else None
    return state, ZeroPartition(asked.zero.stage, world_size, dtype)


def _shards_of(path: Path) -> Path:
    """The folder with the files of DeepSpeed, which `has_optimizer_state` has found."""
    shards = deepspeed.find_shards(path)
    assert shards is not None, path
    return shards
