"""Zoo entries that `registry.export` would refuse, as an older version or a damaged training left them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from landiff.configs.base import Config
from landiff.configs.files import sha256_file
from landiff.model_zoo import registry


def write_entry(
    zoo: Path,
    name: str,
    kind: str,
    config: Config,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, Any] | None = None,
) -> registry.ZooEntry:
    """An entry whose fingerprint and hash are right, whatever its weights are; `stored`: its config on disk, if another."""
    sizes = config.model_dump(mode="json") if stored is None else dict(stored)
    mark = registry.weights_fingerprint(kind, sizes, weights)
    folder = zoo / name / mark
    folder.mkdir(parents=True)
    save_file(dict(weights), folder / registry.WEIGHTS)
    (folder / "config.json").write_text(
        json.dumps({"kind": kind, "name": name, "fingerprint": mark, "config": sizes})
    )
    made = {"weights_sha256": sha256_file(folder / registry.WEIGHTS)}
    (folder / registry.PROVENANCE).write_text(json.dumps(made))
    (zoo / name / "newest").write_text(f"{mark}\n")
    return registry.read_entry(folder)
