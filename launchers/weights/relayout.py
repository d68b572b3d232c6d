"""A checkpoint with its optimizer, cut anew for a run of another layout: `landiff convert RUN --to megatron|deepspeed`.

A run's checkpoint becomes a run folder, from which `landiff train` goes on as if nothing had happened:

    <out>/config.yaml                    the run's config with the changes that were asked for
    <out>/checkpoints/step_<n>/          engine state, loader position, config and file list, as a trainer commits them
    <out>/provenance.json

One that our trainers did not write becomes a folder of its engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt

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
from landiff.model_zoo.convert.formats.deepspeed_write import Cut
from landiff.model_zoo.convert.formats.megatron_optimizer import MegatronCut, MegatronState
from landiff.model_zoo.convert.known_formats import new_folder
from landiff.model_zoo.convert.lazy import ProgressCallback
from landiff.training.checkpoint.run_folder import step_folder
from landiff.training.checkpoint.store import (
    CONFIG,
    STATE,
    CheckpointState,
    describe_file,
    list_files,
    seal,
)
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig

TRAINERS: dict[str, type[Config]] = {"megatron": LMTrainConfig, "deepspeed": DiffusionTrainConfig}
STAGES = {"megatron": "lm", "deepspeed": "diffusion"}
FIXED = ("model", "schedule", "phase")  # sections of a config that make it another model
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # --dtype -> a trainer's precision
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ZeroSection(Config):
    stage: Literal[1, 2, 3]


class Padding(Config):
    """What can be asked of weights that start a Megatron run, in the words of its config."""

    vocab_multiple: PositiveInt = 128
    head_multiple: PositiveInt = 1


class StartSettings(Config):
    """The same of DeepSpeed. ZeRO 1 and 2 start from one file, whatever the number of ranks."""

    zero: ZeroSection = ZeroSection(stage=2)


class ZeroSettings(Config):
    """The same of a checkpoint with its optimizer but no run around it. None: as it is."""

    zero: ZeroSection
    precision: Literal["fp32", "bf16"] | None = None


class Optimizer(Config):
    distributed_optimizer: bool


class MegatronSettings(Config):
    """The same of Megatron."""

    vocab_multiple: PositiveInt | None = None
    head_multiple: PositiveInt | None = None
    parallel: Optimizer
    precision: Literal["fp32", "bf16"] | None = None


@dataclass(frozen=True)
class Wish:
    """What is asked for."""

    to: str  # megatron | deepspeed
    out: Path
    overrides: tuple[str, ...] = ()  # key=value, as a trainer takes them
    dtype: str | None = None
    world_size: int | None = (
        None  # of the run that goes on from a DeepSpeed checkpoint; None: as it is
    )
    model: LMConfig | None = None  # of a Megatron folder that does not say it

    @property
    def words(self) -> list[str]:
        if self.dtype is None:
            return list(self.overrides)
        if self.dtype not in PRECISIONS:
            raise ConfigError(
                f"--dtype {self.dtype}: the trainers compute in {' or '.join(PRECISIONS)}; weights alone (--weights-only) take any"
            )
        return [*self.overrides, f"precision={PRECISIONS[self.dtype]}"]


def can_go_on(path: Path, to: str) -> bool:
    """Is this a checkpoint of the engine `to`, with its optimizer?"""
    if to == "megatron":
        return (path / ".metadata").is_file() and megatron_optimizer.has_optimizer(path)
    shards = deepspeed.find_shards(path) if to == "deepspeed" else None
    return shards is not None and not deepspeed.is_start(deepspeed.read_deepspeed(shards))


def relayout(
    path: Path, wish: Wish, provenance: Mapping[str, Any], progress: ProgressCallback | None = None
) -> str:
    """Write `wish.out`; returns what it is, in words. Raises ConfigError, and then there is no such folder."""
    if (path / STATE).is_file():
        return _run(path, wish, provenance, progress)
    return (_bare_megatron if wish.to == "megatron" else _bare_deepspeed)(
        path, wish, provenance, progress
    )


def dry(path: Path, wish: Wish) -> str:
    """What `relayout` would write; options are checked as there."""
    if (path / STATE).is_file():
        config = _config(path, wish)
        if isinstance(config, LMTrainConfig):
            return (
                f"a run of precision {config.precision}, parallel.distributed_optimizer = {config.parallel.distributed_optimizer}, "
                f"vocab_multiple {config.vocab_multiple}, head_multiple {config.head_multiple}"
            )
        return f"a run of precision {config.precision}, zero.stage {config.zero.stage}, {wish.world_size or deepspeed.ZeroLayout.read(path).world_size} ranks"
    cut = _megatron_cut(path, wish)[2] if wish.to == "megatron" else _zero_cut(path, wish)[1]
    return f"a bare checkpoint, {cut}"


def _run(
    path: Path, wish: Wish, provenance: Mapping[str, Any], progress: ProgressCallback | None
) -> str:
    state = read_json_as(CheckpointState, path / STATE)
    config = _config(path, wish)
    if state.kind != type(config).__name__:
        raise ConfigError(
            f"{path} was written by {state.kind}; --to {wish.to} goes on from a checkpoint of {type(config).__name__}"
        )
    with new_folder(wish.out, provenance) as temporary:
        folder = step_folder(temporary / "checkpoints", state.step)
        folder.mkdir(parents=True)
        if isinstance(config, LMTrainConfig):
            cut = MegatronCut(
                megatron.default_padding(config.model, config.vocab_multiple, config.head_multiple),
                config.parallel.distributed_optimizer,
                DTYPES[config.precision],
            )
            megatron_optimizer.write_state(
                folder,
                config.model,
                megatron_optimizer.read_state(path, config.model),
                cut,
                progress,
            )
        else:
            layout = deepspeed.ZeroLayout.read(path)
            own = {
                "zero_stage": config.zero.stage,
                "world_size": wish.world_size or layout.world_size,
                "precision": config.precision,
            }
            cut = Cut(own["zero_stage"], own["world_size"], DTYPES[config.precision])
            deepspeed_write.write_deepspeed(
                folder / deepspeed.SHARDS,
                deepspeed.read_deepspeed(path / deepspeed.SHARDS),
                cut,
                progress,
            )
            layout.model_copy(update=own).write(folder)
            state = state.model_copy(update={"world_size": cut.world_size})
        seal(folder, state, config, [describe_file(folder, name) for name in list_files(folder)])
        write_config(temporary / CONFIG, config)
    return f"a run to go on with at step {state.step}: landiff train {STAGES[wish.to]} --config {wish.out / CONFIG}"


def _config(path: Path, wish: Wish) -> Any:
    """The run's own config with the changes. Raises ConfigError for one that would make it another model."""
    stored = read_yaml(path / CONFIG)
    config = load(TRAINERS[wish.to], {**stored, "run": str(wish.out)}, wish.words)
    before, after = load(TRAINERS[wish.to], stored).model_dump(), config.model_dump()
    changed = [key for key in FIXED if key in after and after[key] != before[key]]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: a conversion keeps the model. What it can change is vocab_multiple, head_multiple, "
            "parallel.*, zero.stage, precision, and what does not touch the checkpoint"
        )
    return config


def _bare_megatron(
    path: Path, wish: Wish, provenance: Mapping[str, Any], progress: ProgressCallback | None
) -> str:
    model, state, cut = _megatron_cut(path, wish)
    with new_folder(wish.out, provenance) as temporary:
        megatron_optimizer.write_state(temporary, model, state, cut, progress)
        megatron.write_megatron_config(temporary, model)
    return "a Megatron checkpoint with its optimizer"


def _megatron_cut(path: Path, wish: Wish) -> tuple[LMConfig, MegatronState, MegatronCut]:
    model = megatron.stored_config(path) if (path / megatron.CONFIG).is_file() else wish.model
    assert model is not None, wish
    state = megatron_optimizer.read_state(path, model)
    asked = load(
        MegatronSettings, {"parallel": {"distributed_optimizer": state.cut.distributed}}, wish.words
    )
    padded = megatron.default_padding(model, asked.vocab_multiple or 1, asked.head_multiple or 1)
    padded = megatron.Padded(
        padded.vocab if asked.vocab_multiple else state.cut.padded.vocab,
        padded.heads if asked.head_multiple else state.cut.padded.heads,
    )
    return (
        model,
        state,
        MegatronCut(
            padded,
            asked.parallel.distributed_optimizer,
            DTYPES.get(asked.precision, state.cut.dtype),
        ),
    )


def _bare_deepspeed(
    path: Path, wish: Wish, provenance: Mapping[str, Any], progress: ProgressCallback | None
) -> str:
    state, cut = _zero_cut(path, wish)
    tag = deepspeed.find_shards(path).name
    with new_folder(wish.out, provenance) as temporary:
        deepspeed_write.write_deepspeed(temporary / tag, state, cut, progress)
        write_text(temporary / "latest", tag)
    return f"a DeepSpeed checkpoint with its optimizer: engine.load_checkpoint({str(wish.out)!r})"


def _zero_cut(path: Path, wish: Wish) -> tuple[DeepSpeedState, Cut]:
    shards = deepspeed.find_shards(path)
    assert shards is not None, path
    state = deepspeed.read_deepspeed(shards)
    asked = load(ZeroSettings, {"zero": {"stage": state.zero_stage}}, wish.words)
    return state, Cut(
        asked.zero.stage, wish.world_size or state.world_size, DTYPES.get(asked.precision)
    )
