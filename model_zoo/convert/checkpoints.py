"""Opening checkpoints of the trainers, other checkpoints of their engines, and zoo entries.

For each format, `is_...` detects it at a path and `open_...` returns its models. Opening reads
headers only. The release and folders of diffusers are in `formats`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from landiff.configs import ConfigError, validate
from landiff.configs.documents import read_json, read_yaml
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig, TokenizerConfig
from landiff.model_zoo.convert.foreign import without_wrappers
from landiff.model_zoo.convert.formats import (
    deepspeed,
    diffusers_folder,
    dist_checkpoint,
    megatron,
    megatron_optimizer,
)
from landiff.model_zoo.convert.lazy import LazyTensors, converted, read_safetensors
from landiff.model_zoo.convert.output_folder import PROVENANCE
from landiff.model_zoo.convert.parts import (
    ADAPTER,
    FOREIGN,
    PLAIN,
    Options,
    Part,
    WeightChoice,
    WeightSource,
    match_model,
)
from landiff.model_zoo.lora.config import PEFT_WEIGHTS, read_adapter
from landiff.model_zoo.lora.modules import adapter_tensors
from landiff.model_zoo.lora.parts import adapter_part

# Files that the trainers add to a checkpoint (training/checkpoint/store.py).
STATE = "state.json"
RUN_CONFIG = "config.yaml"
TOKENIZER_WEIGHTS = "model.safetensors"
TOKENIZER_EMA = "ema.safetensors"  # moving averages of the parameters

# Entries of state.json that become part of the provenance.
STATE_ENTRIES = ("step", "kind", "manifest", "columns", "world_size", "versions")


def _choice(options: Options, *, has_averages: bool) -> WeightChoice:
    """Which weights of a checkpoint are opened: by default moving averages, if it has some."""
    return "ema" if has_averages and options.weights != "raw" else "raw"


# ---------------------------------------------------------------- zoo entries


def is_zoo_entry(path: Path) -> bool:
    """Whether `path` is a zoo entry. A folder of diffusers can hold the same files."""
    has_weights = any((path / name).is_file() for name in (registry.WEIGHTS, PEFT_WEIGHTS))
    has_all = has_weights and all((path / name).is_file() for name in (PROVENANCE, "config.json"))
    return has_all and diffusers_folder.class_of(path) is None


def open_zoo_entry(path: Path, options: Options) -> WeightSource:
    """The model of a zoo entry, whose fingerprint is verified. Raises ConfigError."""
    entry = registry.read_entry(path)
    registry.require_intact(entry)
    if entry.kind == ADAPTER:
        part = Part(ADAPTER, entry.config, entry.lazy())
    else:
        part = match_model(
            entry.lazy(),
            entry.kind,
            entry.config,
            PLAIN,
            str(path),
            allow_missing=options.allow_missing,
        )
    return WeightSource(
        path,
        format="zoo",
        layout=f"zoo entry {entry.reference}",
        parts=(part,),
        step=entry.provenance.get("step"),
        provenance={"entry": entry.reference, "made_of": entry.provenance},
        weights=entry.provenance.get("weights"),
    )


# ---------------------------------------------------------------- tokenizer


def is_tokenizer_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint of the tokenizer trainer."""
    return (path / STATE).is_file() and (path / TOKENIZER_WEIGHTS).is_file()


def open_tokenizer_checkpoint(path: Path, options: Options) -> WeightSource:
    """The tokenizer in a checkpoint of its trainer. Raises ConfigError."""
    section = megatron.model_section(_run_config(path), path)
    config = validate(TokenizerConfig, section, str(path / RUN_CONFIG))
    tensors = read_safetensors(path / TOKENIZER_WEIGHTS)
    weights = _choice(options, has_averages=(path / TOKENIZER_EMA).is_file())
    if weights == "ema":
        tensors = tensors.joined(read_safetensors(path / TOKENIZER_EMA))
    part = match_model(
        tensors, "tokenizer", config, PLAIN, str(path), allow_missing=options.allow_missing
    )
    step, provenance = run_provenance(path)
    return WeightSource(
        path, "tokenizer checkpoint", "plain torch", (part,), step, provenance, weights
    )


# ---------------------------------------------------------------- Megatron


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder of torch.distributed.checkpoint, as Megatron writes it."""
    return (path / dist_checkpoint.METADATA).is_file()


def open_megatron_checkpoint(path: Path, options: Options) -> WeightSource:
    """The language model in a Megatron checkpoint.

    `options.models` gives its sizes if the folder has no config. Raises ConfigError.
    """
    config = options.models.lm
    if (path / megatron.CONFIG).is_file():
        config = megatron.stored_config(path)
    weights = _choice(options, has_averages=megatron.has_averages(path))
    theirs = megatron.open_megatron(path, ema=weights == "ema")
    rules = megatron.megatron_rules(config, megatron.padding_of(theirs, config, path))
    adapter = read_adapter(path)
    if adapter is not None:
        matrices = theirs.only(lambda name: name.endswith((".lora_A", ".lora_B")))
        part = adapter_part(adapter, converted(matrices, rules, "to_ours"), str(path))
    else:
        part = match_model(
            theirs, "lm", config, rules, str(path), allow_missing=options.allow_missing
        )
    step, provenance = run_provenance(path)
    layout = "dist_checkpointing: whole tensors, for any parallel layout"
    parallel = provenance.get("config", {}).get("parallel")
    if isinstance(parallel, dict) and isinstance(provenance["world_size"], int):
        layout += (
            f"; written by {_ranks(provenance['world_size'])}, tensor {parallel.get('tensor')}, "
            f"pipeline {parallel.get('pipeline')}"
        )
    layout += f"; {megatron_optimizer.describe_optimizer(path)}"
    return WeightSource(path, "megatron", layout, (part,), step, provenance, weights)


# ---------------------------------------------------------------- DeepSpeed


def is_deepspeed_checkpoint(path: Path) -> bool:
    """Whether `path` holds a DeepSpeed checkpoint, of the diffusion trainer or another program."""
    return (path / deepspeed.LAYOUT).is_file() or deepspeed.find_shards(path) is not None


def open_deepspeed_checkpoint(path: Path, options: Options) -> WeightSource:
    """The model in a DeepSpeed checkpoint.

    `options.models` gives its sizes if the diffusion trainer did not write it. Raises ConfigError.
    """
    if not (path / deepspeed.LAYOUT).is_file():
        return _open_foreign_deepspeed(path, options.models, options.allow_missing)
    layout = deepspeed.ZeroLayout.read(path)
    state = deepspeed.read_deepspeed(path / deepspeed.SHARDS)
    weights = _choice(options, has_averages=deepspeed.EMA in state.moment_places)
    tensors = deepspeed.exported(state, ema=weights == "ema")
    kind, config = layout.part
    adapter = read_adapter(path)
    if adapter is not None:
        part = adapter_part(adapter, adapter_tensors(tensors), str(path))
    else:
        part = match_model(
            tensors, kind, config, PLAIN, str(path), allow_missing=options.allow_missing
        )
    step, provenance = run_provenance(path)
    text = f"{_describe_zero(state)}, {layout.precision}, phase {layout.phase}"
    return WeightSource(path, "deepspeed", text, (part,), step, provenance, weights)


def _open_foreign_deepspeed(
    path: Path, models: ModelConfig, allow_missing: Sequence[str]
) -> WeightSource:
    """The model in a checkpoint that the diffusion trainer did not write.

    If its tensors have our names, it is a model with the sizes in `models`.
    """
    shards = deepspeed.find_shards(path)
    assert shards is not None, path
    state = deepspeed.read_deepspeed(shards)
    tensors = without_wrappers(deepspeed.exported(state), str(shards))
    return WeightSource(
        path,
        "deepspeed",
        f"{_describe_zero(state)}, not of our trainer",
        (_match_by_names(tensors, models, str(shards), allow_missing),),
        state.rest.get("global_steps"),
    )


def _match_by_names(
    tensors: LazyTensors, models: ModelConfig, what: str, allow_missing: Sequence[str]
) -> Part:
    """The kind of model that the names imply; a foreign one for unknown names."""
    if "control.blocks.0.qkv.weight" in tensors:
        return match_model(
            tensors, "diffusion", models.diffusion, PLAIN, what, allow_missing=allow_missing
        )
    if "blocks.0.qkv.weight" in tensors:
        config = models.diffusion.transformer
        return match_model(tensors, "transformer", config, PLAIN, what, allow_missing=allow_missing)
    return Part(FOREIGN, {}, tensors)


def _describe_zero(state: deepspeed.DeepSpeedState) -> str:
    """ZeRO stage, ranks and optimizer of a checkpoint as text."""
    if not deepspeed.is_start(state):
        return (
            f"ZeRO {state.zero_stage}, {_ranks(state.world_size)}, "
            f"optimizer at its step {state.optimizer_steps}"
        )
    if state.zero_stage == 0:
        return "whole weights, no optimizer"
    return f"weights for ZeRO {state.zero_stage}, {_ranks(state.world_size)}, no optimizer"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


# ---------------------------------------------------------------- the run around a checkpoint


def _run_config(path: Path) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint."""
    try:
        return read_yaml(path / RUN_CONFIG)
    except OSError as error:
        raise ConfigError(f"{path} is not a checkpoint of a run: {error}") from None


def run_provenance(path: Path) -> tuple[int | None, dict[str, Any]]:
    """Step and provenance of a trainer's checkpoint; (None, {}) for any other one.

    Raises ConfigError for a damaged state.json or config.yaml.
    """
    file = path / STATE
    if not file.is_file():
        return None, {}
    state = read_json(file, advice=f"use a checkpoint with an intact {STATE}")
    if not isinstance(state.get("step"), int):
        raise ConfigError(f"{file} is damaged: it has no step")
    provenance = {key: state.get(key) for key in STATE_ENTRIES}
    provenance["config"] = _run_config(path)
    provenance["checkpoint_state_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return state["step"], provenance
