"""Zoo entries that `registry.export` rejects, from an older version or a diverged training."""

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
from landiff.model_zoo.convert.fingerprint import weights_fingerprint


def write_entry(
    zoo: Path,
    name: str,
    kind: str,
    config: Config,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, Any] | None = None,
) -> registry.ZooEntry:
    """Writes an entry with the right fingerprint and hash for any weights.

    stored: config on disk, if it differs from `config`.
    """
    if stored is None:
        stored = config.model_dump(mode="json")
    sizes = dict(stored)
    fingerprint = weights_fingerprint(kind, sizes, weights)
    folder = zoo / name / fingerprint
    folder.mkdir(parents=True)
    save_file(dict(weights), folder / registry.WEIGHTS)
    (folder / "config.json").write_text(
        json.dumps({"kind": kind, "name": name, "fingerprint": fingerprint, "config": sizes})
    )
    provenance = {"weights_sha256": sha256_file(folder / registry.WEIGHTS)}
    (folder / registry.PROVENANCE).write_text(json.dumps(provenance))
    (zoo / name / "newest").write_text(f"{fingerprint}\n")
    return registry.read_entry(folder)
