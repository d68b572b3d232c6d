"""Fingerprint and examination of the weights of a zoo entry.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from landiff.configs import Config

if TYPE_CHECKING:
    from torch import Tensor

    from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback


def weights_fingerprint(
    kind: str,
    config: Config | Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    progress: ProgressCallback | None = None,
) -> str:
    """16 hex digits over the kind, the config and all tensors, equal on every machine.

    Hashes name, dtype, shape and bytes of each tensor.

    progress: called with the megabytes that are hashed. Requires LazyTensors, whose sizes are known
        before they are read.
    """
    import torch

    from landiff.model_zoo.convert.lazy import LazyTensors, megabytes

    total = 0
    if progress is not None:
        assert isinstance(tensors, LazyTensors), type(tensors)
        total = tensors.num_bytes
    done = 0
    if isinstance(config, Config):
        sizes = config.model_dump(mode="json")
    else:
        sizes = dict(config)
    digest = hashlib.sha256(json.dumps([kind, sizes], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if progress is not None:
            progress(*megabytes(done, total), "hashing")
        done += tensor.numel() * tensor.itemsize
        del tensor  # before the next one is read
    if progress is not None:
        progress(*megabytes(done, done), "hashing")
    return digest.hexdigest()[:16]


def examine(
    kind: str,
    config: Mapping[str, Any],
    tensors: LazyTensors,
    progress: ProgressCallback | None = None,
) -> tuple[str, list[str]]:
    """Fingerprint, and names of tensors with NaN or infinity. Reads each tensor once."""
    from landiff.model_zoo.convert.lazy import LazyTensors
    from landiff.model_zoo.health import non_finite

    bad: list[str] = []

    def read(name: str) -> Tensor:
        tensor = tensors.read(name)
        bad.extend(non_finite([(name, tensor)]))
        return tensor

    fingerprint = weights_fingerprint(kind, config, LazyTensors(tensors.meta, read), progress)
    return fingerprint, bad


def require_codebook(kind: str, tensors: LazyTensors, what: str) -> None:
    """Raises UnhealthyError if `what` is a tokenizer whose codebook has collapsed.

    Weights without a codebook are refused where they are loaded into a model.
    """
    if kind == "tokenizer":
        from landiff.model_zoo.health import CODES_STARTED, require_distinct_codes

        if CODES_STARTED in tensors:
            require_distinct_codes(tensors.read, what)
