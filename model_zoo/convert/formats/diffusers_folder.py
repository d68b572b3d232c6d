"""Folders as diffusers and transformers save them: config.json beside .safetensors files.

Each model of a pipeline has a subfolder:

    transformer/         CogVideoXTransformer3DModel of diffusers: the main transformer
    vae/                 AutoencoderKLCogVideoX of diffusers
    control/             control branch and semantic condition, under our names
    semantic_tokenizer/  tokenizer, under our names
    lm/                  language model, as transformers saves it

The classes of the last three are in model_zoo/diffusers/pipeline.py. A folder that directly holds
the files of one model is that model alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from landiff.configs import Config, validate
from landiff.configs.documents import read_json
from landiff.configs.files import write_text
from landiff.model_zoo.config import DiffusionConfig, LMConfig, TokenizerConfig, TransformerConfig
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

FILE = "diffusion_pytorch_model.safetensors"
LM_FILE = "model.safetensors"
# kind -> subfolder of a pipeline
FOLDERS = {
    "transformer": "transformer",
    CONTROL: "control",
    "tokenizer": "semantic_tokenizer",
    "lm": "lm",
    VAE: VAE,
}
# class in config.json -> kind
CLASSES = {
    "CogVideoXTransformer3DModel": "transformer",
    "LanDiffTransformer": "transformer",
    "AutoencoderKLCogVideoX": VAE,
    "LanDiffControl": CONTROL,
    "LanDiffTokenizer": "tokenizer",
    "LanDiffLM": "lm",
}
# kind -> config class, for models whose config.json holds our config
CONFIGS: dict[str, type[Config]] = {
    "lm": LMConfig,
    "transformer": TransformerConfig,
    "tokenizer": TokenizerConfig,
    CONTROL: DiffusionConfig,
}
# kind -> class in the config.json that we write
WRITTEN = {
    "transformer": "CogVideoXTransformer3DModel",
    VAE: "AutoencoderKLCogVideoX",
    CONTROL: "LanDiffControl",
    "tokenizer": "LanDiffTokenizer",
}


# ---------------------------------------------------------------- reading


def named_class(folder: Path) -> str | None:
    """The class named in a folder's config.json, as diffusers or transformers store it."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = _read_json(path)
    name = config.get("_class_name")
    if not name:
        architectures = config.get("architectures")
        name = architectures[0] if isinstance(architectures, list) and architectures else None
    return name if isinstance(name, str) else None


def class_of(folder: Path) -> str | None:
    """The class named in a folder's config.json if it can be converted, else None."""
    name = named_class(folder)
    return name if name in CLASSES else None


def model_folders(path: Path) -> list[Path]:
    """The folders of models at `path`: itself, or subfolders of a pipeline. May be empty."""
    if class_of(path):
        return [path]
    return [path / name for name in FOLDERS.values() if class_of(path / name)]


def open_diffusers(path: Path, allow_missing: Sequence[str] = ()) -> WeightSource:
    """The models in a pipeline's folder or a model's folder. Raises ConversionError."""
    folders = model_folders(path)
    parts = {}
    for part in all_of(partial(read_model, folder, allow_missing) for folder in folders):
        parts[part.kind] = part
    if CONTROL in parts and "transformer" in parts:
        parts["diffusion"] = joined(parts.pop(CONTROL), parts.pop("transformer"))
    classes = sorted({str(class_of(folder)) for folder in folders})
    return WeightSource(
        path,
        format="transformers" if classes == ["LanDiffLM"] else "diffusers",
        layout=", ".join(classes),
        parts=tuple(parts.values()),
        provenance={"classes": classes},
    )


def read_model(folder: Path, allow_missing: Sequence[str] = ()) -> Part:
    """The model in one folder. Raises ConversionError for an unknown class."""
    class_name = class_of(folder)
    if class_name is None:
        found = named_class(folder) or "folder without config.json"
        raise ConversionError(f"{folder} holds a {found}, none of {', '.join(CLASSES)}")
    kind = CLASSES[class_name]
    config = _read_config(kind, folder / "config.json")
    rules = PLAIN
    if kind == "transformer":
        rules = list(TABLES["diffusers", kind])
    elif kind == "lm":
        rules = list(TABLES["transformers", kind])
    return match_model(
        _weights(folder), kind, config, rules, str(folder), allow_missing=allow_missing
    )


def _read_config(kind: str, path: Path) -> Config | dict[str, Any]:
    """Our config of a model, or the arguments of the class for a VAE. Raises ConfigError."""
    data = _read_json(path)
    if kind == VAE:
        return {key: value for key, value in data.items() if not key.startswith("_")}
    if kind != "transformer" or "landiff" in data:
        section: Any = data.get("landiff")  # `validate` reports a missing section
        return validate(CONFIGS[kind], section, f"{path}: landiff")
    try:
        return config_from_diffusers(data)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ConversionError(
            f"{path} does not describe a supported transformer: {error}"
        ) from None


def _weights(folder: Path) -> LazyTensors:
    """The tensors in the weight files of a folder."""
    for stem in (FILE, LM_FILE):
        for name in (stem, f"{stem}.index.json"):
            if (folder / name).is_file():
                return read_safetensors(folder / name)
    variants = _variants(folder)
    if len(variants) > 1:
        names = ", ".join(path.name for path in variants)
        raise ConversionError(
            f"{folder} holds the variants {names} and no {FILE}; keep only the variant to be "
            "converted"
        )
    if variants:
        return read_safetensors(variants[0])
    refuse_adapter_folder(folder)
    raise ConversionError(
        f"{folder} holds no {FILE}; a folder with pytorch_model.bin must be saved again with "
        "safe_serialization=True"
    )


def _variants(folder: Path) -> list[Path]:
    """Weight files as diffusers saves them with variant="fp16".

    NAME.fp16.safetensors, or NAME.safetensors.index.fp16.json for several files.
    """
    found = []
    for stem in (FILE, LM_FILE):
        name = stem.removesuffix(".safetensors")
        found += sorted(folder.glob(f"{stem}.index.*.json"))
        for path in sorted(folder.glob(f"{name}.*.safetensors")):
            if "-of-" not in path.name:  # not one of several files
                found.append(path)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, allow_nonfinite=True)  # other programs write Infinity


# ---------------------------------------------------------------- writing


def write_diffusers(
    folder: Path, parts: Sequence[Part], progress: ProgressCallback | None = None
) -> None:
    """Write each part into its subfolder of a pipeline's folder."""
    by_kind = {part.kind: part for part in parts}
    if "diffusion" in by_kind:
        whole = by_kind.pop("diffusion")
        by_kind["transformer"] = main_of(whole)
        by_kind[CONTROL] = control_of(whole)
    for kind, part in by_kind.items():
        write_model(folder / FOLDERS[kind], part, progress)


def write_model(folder: Path, part: Part, progress: ProgressCallback | None = None) -> None:
    """Write the folder of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors_to_write(part)
    config = _config_to_write(part, tensors)
    file = LM_FILE if part.kind == "lm" else FILE
    write_safetensors(folder / file, tensors, {"format": "pt"}, progress)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _tensors_to_write(part: Part) -> LazyTensors:
    """The tensors of a part under the names in its folder."""
    if part.kind == "lm":
        return under_names_of("transformers", part)
    if part.kind == "transformer":
        return under_names_of("diffusers", part)
    return part.tensors


def _config_to_write(part: Part, tensors: LazyTensors) -> dict[str, Any]:
    """The content of config.json."""
    if part.kind == "lm":
        return {
            "model_type": "landiff-lm",
            "architectures": ["LanDiffLM"],
            "dtype": str(tensors.dtype()).removeprefix("torch."),
            "landiff": part.config_as(LMConfig).model_dump(mode="json"),
        }
    config: dict[str, Any] = {"_class_name": WRITTEN[part.kind]}
    if part.kind == "transformer":
        sizes = part.config_as(TransformerConfig)
        theirs = diffusers_config(sizes)
        if config_from_diffusers(theirs) == sizes:
            return config | theirs
        # An option that diffusers' class does not have.
        config["_class_name"] = "LanDiffTransformer"
    if isinstance(part.config, Config):
        return config | {"landiff": part.config.model_dump(mode="json")}
    for key, value in part.config.items():  # the VAE
        config[key] = list(value) if isinstance(value, tuple) else value
    return config
