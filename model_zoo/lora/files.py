"""Adapters as peft and diffusers store them.

pytorch_lora_weights.safetensors   of a main transformer, for `load_lora_weights` of diffusers
control/, lm/                      of the other models: adapter_model.safetensors and
                                   adapter_config.json, for peft
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from landiff.configs.files import write_text
from landiff.model_zoo.convert.formats import diffusers_transformer
from landiff.model_zoo.convert.lazy import (
    LazyTensors,
    ProgressCallback,
    converted,
    write_safetensors,
)
from landiff.model_zoo.convert.parts import TABLES, Part
from landiff.model_zoo.convert.rules import Change, ConversionError, Rule
from landiff.model_zoo.lora.config import (
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    AdapterConfig,
)
from landiff.model_zoo.lora.parts import matrices

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_PREFIX = "transformer."
DIFFUSERS_METADATA = "lora_adapter_metadata"  # key of the file's metadata
FOLDERS = {"diffusion": "control", "lm": "lm"}


def adapter_rules(rules: Sequence[Rule]) -> list[Rule]:
    """Rules for A and B of the layers in `rules`, which may stack or reorder rows of weights.

    B has the rows of the weight and is changed like it. Layers that are one layer in our model
    share A.
    """
    found = []
    for rule in rules:
        ours, theirs, change = rule.sides("to_theirs")
        if not (len(ours) == 1 and ours[0].endswith(".weight")):
            continue
        for matrix in ("lora_A", "lora_B"):
            our_name = _matrix(ours[0], matrix)
            their_names = tuple(_matrix(name, matrix) for name in theirs)
            to_theirs: Change | None = change
            to_ours = rule.to_ours
            if matrix == "lora_A" and len(theirs) > 1:
                to_theirs = _copies(len(theirs))
                to_ours = _shared
            found.append(Rule(our_name, their_names, to_theirs, to_ours))
    return found


def _matrix(weight: str, matrix: str) -> str:
    return f"{weight.removesuffix('.weight')}.{matrix}.weight"


def _copies(count: int) -> Change:
    return lambda shared: tuple(shared.clone() for _ in range(count))


def _shared(*copies: Tensor) -> tuple[Tensor]:
    if any(not torch.equal(copy, copies[0]) for copy in copies[1:]):
        raise ConversionError("layers that are one layer in our model must share lora_A")
    return (copies[0],)


def write_adapter(folder: Path, part: Part, progress: ProgressCallback | None = None) -> None:
    """Write an adapter into `folder` as diffusers and peft read it."""
    adapter = part.config_as(AdapterConfig)
    if adapter.base_kind == "transformer":
        _write_for_diffusers(folder, adapter, matrices(part), progress)
    elif adapter.base_kind == "lm":
        names = adapter_names_in_transformers(matrices(part))
        write_peft(folder / FOLDERS["lm"], adapter, names, r"model\.", progress)
    else:
        write_peft(folder / FOLDERS["diffusion"], adapter, matrices(part), "", progress)


def adapter_names_in_transformers(tensors: LazyTensors) -> LazyTensors:
    """An adapter of the language model under the names of `LanDiffLM`."""
    return converted(tensors, TABLES["transformers", "lm"], "to_theirs")


def write_peft(
    folder: Path,
    adapter: AdapterConfig,
    tensors: LazyTensors,
    prefix_pattern: str = "",
    progress: ProgressCallback | None = None,
) -> None:
    """Write peft's two files. `prefix_pattern`: what precedes our names in their model's."""
    folder.mkdir(parents=True, exist_ok=True)
    document = adapter.peft_document()
    document["target_modules"] = prefix_pattern + document["target_modules"]
    named = tensors.with_prefix(PEFT_PREFIX)
    write_safetensors(folder / PEFT_WEIGHTS, named, {"format": "pt"}, progress)
    write_text(folder / PEFT_CONFIG, json.dumps(document, indent=1))


def _write_for_diffusers(
    folder: Path,
    adapter: AdapterConfig,
    tensors: LazyTensors,
    progress: ProgressCallback | None,
) -> None:
    """Write the file of an adapter of `CogVideoXTransformer3DModel`."""
    named = converted(tensors, adapter_rules(diffusers_transformer.RULES), "to_theirs")
    layers = set()
    for name in named:
        layer = name.rpartition(".lora_")[0]
        layers.add(re.sub(r"^transformer_blocks\.\d+\.", "", layer))
    settings = {
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted(layers),
        "bias": "none",
    }
    prefixed = {DIFFUSERS_PREFIX + key: value for key, value in settings.items()}
    metadata = {"format": "pt", DIFFUSERS_METADATA: json.dumps(prefixed)}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        folder / DIFFUSERS_FILE, named.with_prefix(DIFFUSERS_PREFIX), metadata, progress
    )
