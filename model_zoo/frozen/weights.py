"""Where weights come from, and the fingerprint of an encoder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.base import ConfigError
from model_zoo.health import require_finite


def fingerprint(kind: str, preprocessing: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits over all that changes an encoder's output, the same on every machine.

    The kind, the options and constants in `preprocessing` (JSON values), and name, dtype, shape and bytes of
    every tensor, hashed one tensor at a time. How the weights were split into files doesn't matter.
    Raises UnhealthyError for weights with NaN or infinity.
    """
    require_finite(tensors.items(), f"the frozen encoder {kind}")
    digest = hashlib.sha256(json.dumps([kind, preprocessing], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def package_folder(package: str, distribution: str) -> Path:
    """Folder of an installed package that ships weights, without importing it. Raises ConfigError without it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the Python package {package} is not installed; pip install {distribution}")
    return Path(spec.submodule_search_locations[0])


def local_or_hub(kind: str, path: str) -> Path | str:
    """`path` as a local Path where something is there, else as a hub id. Raises ConfigError if it can be neither."""
    if Path(path).expanduser().exists():
        return Path(path).expanduser()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise ConfigError(f"{kind}: path = {path!r} does not exist; set path to a local folder or to a hub id such as owner/name")
    return path


def unreadable(kind: str, path: str, error: Exception) -> ConfigError:
    """What to raise when `path` could not be loaded."""
    return ConfigError(
        f"{kind}: path = {path!r} cannot be loaded ({error}). It is read as a local folder where one exists, "
        "otherwise as a hub id; without a network, set path to a folder that holds the downloaded repository"
    )
