"""`landiff convert`: the newest whole checkpoint of a run -> an entry of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from configs import Config, ConfigError, validate
from configs.files import sha256_file
from data_pipeline.shards import ShardError, read_manifest
from model_zoo import registry
from training.checkpoint import STATE, CheckpointState, latest_whole

Exported = tuple[str, Config, dict[str, Tensor]]  # kind, model config, tensors under our names


@dataclass(frozen=True)
class Source:
    """One committed checkpoint of one of the three trainers."""

    folder: Path
    state: CheckpointState
    config: dict[str, Any]  # resolved config of the run

    def __str__(self) -> str:
        return f"{self.state.kind} step {self.state.step} ({self.folder})"


def find_source(path: Path) -> Source:
    """The checkpoint folder `path`, or the newest whole one of the run folder `path`. Raises ConfigError."""
    folder = path if (path / STATE).is_file() else latest_whole(path / "checkpoints")
    if folder is None:
        raise ConfigError(f"{path} holds no whole checkpoint; it must be a run folder (runs/lm) or a checkpoint in it")
    state = CheckpointState.model_validate_json((folder / STATE).read_bytes())
    return Source(folder, state, yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))


def _tokenizer(source: Source) -> Exported:
    from safetensors.torch import load_file

    from training.tokenizer.engine import MODEL

    return "tokenizer", validate(registry.KINDS["tokenizer"], source.config["model"]), load_file(source.folder / MODEL)


def _lm(source: Source) -> Exported:
    from model_zoo.convert.megatron import export_lm

    return "lm", *export_lm(source.folder)


def _diffusion(source: Source) -> Exported:
    from model_zoo.convert.deepspeed import export_diffusion

    return export_diffusion(source.folder)


EXPORTERS: dict[str, Callable[[Source], Exported]] = {
    "TokenizerTrainConfig": _tokenizer, "LMTrainConfig": _lm, "DiffusionTrainConfig": _diffusion,
}


def export(source: Source, zoo: Path, name: str) -> registry.ZooEntry:
    """Commit the checkpoint's weights to the zoo, with where they come from."""
    kind, config, tensors = EXPORTERS[source.state.kind](source)
    entry = registry.export(zoo, name, kind, config, tensors, provenance(source))
    registry.load_model(entry)  # every key and shape fits the module that will read it
    return entry


def provenance(source: Source) -> dict[str, Any]:
    """What made the weights: run, step, config, data fingerprints, versions."""
    try:
        manifest = read_manifest(Path(source.config["data"]["manifest"]))
        columns = {name: column.fingerprint for name, column in manifest.columns.items()}
    except ShardError:  # the data may be gone by now; the checkpoint knows the manifest it saw
        columns = {}
    return {
        "checkpoint": str(source.folder), "checkpoint_state_sha256": sha256_file(source.folder / STATE),
        "trainer": source.state.kind, "step": source.state.step, "manifest": source.state.manifest, "columns": columns,
        "config": source.config, "versions": source.state.versions,
    }
