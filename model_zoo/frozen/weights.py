"""Sources of the frozen encoders' weights, and the fingerprint of an encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.model_zoo.frozen.checks import local_or_hub, package_folder
from landiff.model_zoo.health import require_finite

__all__ = ["encoder_fingerprint", "local_or_hub", "package_folder", "unreadable"]


def encoder_fingerprint(
    kind: str, preprocessing: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str:
    """16 hex digits over everything that affects an encoder's output, equal on every machine.

    Hashes the kind, the options and constants in `preprocessing` (JSON values), and name, dtype,
    shape and bytes of each tensor in turn. The division of the weights into files has no effect.
    Raises UnhealthyError for weights with NaN or infinity.
    """
    require_finite(tensors.items(), f"the frozen encoder {kind}")
    digest = hashlib.sha256(json.dumps([kind, preprocessing], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def unreadable(kind: str, path: str, error: Exception) -> ConfigError:
    """The error for a `path` that could not be loaded."""
    return ConfigError(
        f"{kind}: path = {path!r} cannot be loaded ({error}). It is read as a local folder if that "
        "exists, otherwise as a hub id; without a network, set path to a folder with the "
        "downloaded repository"
    )
