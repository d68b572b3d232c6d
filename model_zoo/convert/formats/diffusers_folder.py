"""Folders of the diffusers and transformers kind: config.json beside one .safetensors file for each model.

    transformer/         CogVideoXTransformer3DModel, the stock class: the main transformer
    vae/                 AutoencoderKLCogVideoX, the stock class
    control/             control branch and semantic condition   } classes of model_zoo/diffusers/pipeline.py, under our names
    semantic_tokenizer/  tokenizer                               }
    lm/                  language model: config.json and model.safetensors, as transformers lays them out

A folder that holds one of these files directly is that model alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from landiff.configs import Config, validate
from landiff.configs.documents import read_json
from landiff.configs.files import write_text
from landiff.model_zoo.config import DiffusionConfig, LMConfig, TokenizerConfig
from landiff.model_zoo.convert.foreign import refuse_adapter_folder
from landiff.model_zoo.convert.formats.diffusers_transformer import (
    config_from_diffusers,
    diffusers_config,
)
from landiff.model_zoo.convert.lazy import (
    LazyTensors,
    ProgressCallback,
    read_safetensors,
    write_safetensors,
)
from landiff.model_zoo.convert.parts import (
    CONTROL,
    PLAIN,
    TABLES,
    VAE,
    Part,
    WeightSource,
    control_of,
    joined,
    main_of,
    match_model,
    under_names_of,
)
from landiff.model_zoo.convert.rules import ConversionError, all_of

FILE, LM_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
FOLDERS = {
    "transformer": "transformer",
    CONTROL: "control",
    "tokenizer": "semantic_tokenizer",
    "lm": "lm",
    VAE: VAE,
}
CLASSES = {
    "CogVideoXTransformer3DModel": "transformer",
    "LanDiffTransformer": "transformer",
    "AutoencoderKLCogVideoX": VAE,
    "LanDiffControl": CONTROL,
    "LanDiffTokenizer": "tokenizer",
    "LanDiffLM": "lm",
}
CONFIGS: dict[str, type[Config]] = {
    "lm": LMConfig,
    "tokenizer": TokenizerConfig,
    CONTROL: DiffusionConfig,
}
# what the class of each kind is called in the folders that we write
WRITTEN = {
    "transformer": "CogVideoXTransformer3DModel",
    VAE: "AutoencoderKLCogVideoX",
    CONTROL: "LanDiffControl",
    "tokenizer": "LanDiffTokenizer",
}
VAE_SIZES = (
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "latent_channels",
)


def named_class(folder: Path) -> str | None:
    """The class that a folder's config.json names, as diffusers or transformers do."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    found = _read_json(path)
    architectures = found.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    name = found.get("_class_name") or first
    return name if isinstance(name, str) else None


def class_of(folder: Path) -> str | None:
    """The same, if it is one that we know."""
    name = named_class(folder)
    return name if name in CLASSES else None


def model_folders(path: Path) -> list[Path]:
    """`path` itself, or the model folders of a pipeline's folder. Empty where there is none."""
    if class_of(path):
        return [path]
    return [path / name for name in FOLDERS.values() if class_of(path / name)]


def open_diffusers(path: Path, allow_missing: Sequence[str] = ()) -> WeightSource:
    folders = model_folders(path)
    parts = {
        part.kind: part
        for part in all_of(partial(read_model, folder, allow_missing) for folder in folders)
    }
    if CONTROL in parts and "transformer" in parts:
        parts["diffusion"] = joined(parts.pop(CONTROL), parts.pop("transformer"))
    found = sorted({class_of(folder) for folder in folders})
    return WeightSource(
        path,
        "transformers" if found == ["LanDiffLM"] else "diffusers",
        ", ".join(found),
        tuple(parts.values()),
        provenance={"classes": found},
    )


def read_model(folder: Path, allow_missing: Sequence[str] = ()) -> Part:
    """The model of one folder. Raises ConversionError for a class that we don't know."""
    if class_of(folder) is None:
        raise ConversionError(
            f"{folder} holds a {named_class(folder) or 'folder without config.json'}, none of {', '.join(CLASSES)}"
        )
    kind, data = CLASSES[class_of(folder)], _read_json(folder / "config.json")
    state = _weights(folder)
    if kind == "transformer":
        try:
            config = config_from_diffusers(data)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise ConversionError(
                f"{folder / 'config.json'} does not describe a transformer of ours: {error}"
            ) from None
        return match_model(
            state, kind, config, TABLES["diffusers", kind], str(folder), allow_missing
        )
    if kind == VAE:
        config = {key: value for key, value in data.items() if not key.startswith("_")}
        return match_model(state, kind, config, PLAIN, str(folder), allow_missing)
    config = validate(CONFIGS[kind], data.get("landiff"), f"{folder / 'config.json'}: landiff")
    return match_model(
        state,
        kind,
        config,
        TABLES["transformers", "lm"] if kind == "lm" else PLAIN,
        str(folder),
        allow_missing,
    )


def _weights(folder: Path) -> LazyTensors:
    for stem in (FILE, LM_FILE):
        for name in (stem, f"{stem}.index.json"):
            if (folder / name).is_file():
                return read_safetensors(folder / name)
    found = _variants(folder)
    if len(found) > 1:
        raise ConversionError(
            f"{folder} holds the variants {', '.join(path.name for path in found)} and no {FILE}; keep the one you mean"
        )
    if found:
        return read_safetensors(found[0])
    refuse_adapter_folder(folder)
    raise ConversionError(
        f"{folder} holds no {FILE}; a folder with pytorch_model.bin must be saved again with safe_serialization=True"
    )


def _variants(folder: Path) -> list[Path]:
    """Weights as diffusers saves them with variant=fp16: NAME.fp16.safetensors, or NAME.safetensors.index.fp16.json."""
    found = []
    for stem in (FILE, LM_FILE):
        name = stem.removesuffix(".safetensors")
        indices = sorted(folder.glob(f"{stem}.index.*.json"))
        single = [
            path for path in sorted(folder.glob(f"{name}.*.safetensors")) if "-of-" not in path.name
        ]
        found += indices + single
    return found


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, allow_nonfinite=True)  # other programs write Infinity


# ---------------------------------------------------------------- writing


def write_diffusers(
    folder: Path, parts: Sequence[Part], progress: ProgressCallback | None = None
) -> None:
    """Each part in its sub-folder."""
    by_kind = {part.kind: part for part in parts}
    if "diffusion" in by_kind:
        whole = by_kind.pop("diffusion")
        by_kind |= {"transformer": main_of(whole), CONTROL: control_of(whole)}
    for kind, part in by_kind.items():
        write_model(folder / FOLDERS[kind], part, progress)


def write_model(folder: Path, part: Part, progress: ProgressCallback | None = None) -> None:
    """One model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if part.kind == "lm":
        tensors, file = under_names_of("transformers", part), LM_FILE
        config = {
            "model_type": "landiff-lm",
            "architectures": ["LanDiffLM"],
            "dtype": str(tensors.dtype()).removeprefix("torch."),
            "landiff": part.config.model_dump(mode="json"),
        }
    else:
        tensors, file = part.tensors, FILE
        config = {"_class_name": WRITTEN[part.kind]}
        if part.kind == "transformer":
            tensors = under_names_of("diffusers", part)
            config |= diffusers_config(part.config)
        elif part.kind == VAE:
            config |= _plain(part.config)
        else:
            config["landiff"] = part.config.model_dump(mode="json")
    write_safetensors(folder / file, tensors, {"format": "pt"}, progress)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _plain(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    assert isinstance(config, Mapping), config
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }
