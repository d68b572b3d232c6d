"""`landiff convert`: weights from one format to another, and the newest whole checkpoint of a run -> the zoo."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import ConfigError, load
from data_pipeline.shards import ShardError, read_manifest
from launchers.progress import Progress
from model_zoo import registry
from model_zoo.config import ModelConfig
from model_zoo.convert import formats
from model_zoo.convert.parts import VAE, Part, Source, assembled
from training.checkpoint import STATE, latest_whole, versions


@dataclass(frozen=True)
class Request:
    """One call of `landiff convert`."""

    sources: tuple[str, ...]  # paths and zoo references
    zoo: Path = Path("zoo")
    to: str = "zoo"
    name: str | None = None  # --to zoo
    out: Path | None = None  # any other format
    model: str = "landiff/model"  # sizes of a release and of bare Megatron folders
    dtype: str | None = None  # None: as in the source
    allow_missing: tuple[str, ...] = ()


def find_source(reference: str | Path, zoo: Path, options: formats.Options | None = None) -> Source:
    """A run folder (its newest whole checkpoint), any path that `formats` knows, or a zoo reference. Raises ConfigError."""
    path = Path(reference)
    if (path / "checkpoints").is_dir() and not (path / STATE).is_file():
        newest = latest_whole(path / "checkpoints")
        if newest is None:
            raise ConfigError(f"{path} holds no whole checkpoint; it must be a run folder (runs/lm) or a checkpoint in it")
        path = newest
    elif not path.exists():
        if "/" in str(reference):
            raise ConfigError(f"{path} does not exist, so it holds no whole checkpoint and no weights")
        path = registry.resolve(zoo, str(reference)).path
    return formats.open_source(path, options)


def open_all(request: Request) -> list[Source]:
    options = formats.Options(load(ModelConfig, request.model), request.allow_missing)
    return [find_source(source, request.zoo, options) for source in request.sources]


def parts_of(sources: Sequence[Source], dtype: str | None) -> list[Part]:
    import torch

    return [part.cast(getattr(torch, dtype) if dtype else None) for source in sources for part in source.parts]


def convert(request: Request) -> list[str]:
    """Do it; returns what was written, one line each. Raises ConfigError, and then nothing is left under a final name."""
    if request.to == "zoo" and request.out is not None:
        raise ConfigError("--out goes with a --to other than zoo; a zoo entry is named by --name and --zoo")
    if request.to != "zoo" and request.out is None:
        raise ConfigError(f"--to {request.to} needs --out FOLDER")
    sources = open_all(request)
    parts = parts_of(sources, request.dtype)
    made = provenance(sources, request)
    progress = Progress("convert", "MB")
    words = " + ".join(words_of(source) for source in sources)
    if request.to != "zoo":
        formats.write_target(request.out, request.to, parts, made, progress)
        return [f"{words} -> {request.out} ({request.to})"]
    names = zoo_names(parts, request.name)
    return [f"{words} -> {entry.path}" for entry in formats.export_to_zoo(request.zoo, names, parts, made, progress)]


def zoo_names(parts: Sequence[Part], name: str | None) -> dict[str, str]:
    """kind -> name: NAME where one part is exported, NAME-kind where several are, the kind where no name is given."""
    kinds = [part.kind for part in assembled(parts, "zoo") if part.kind != VAE]
    if len(kinds) == 1 and name:
        return {kinds[0]: name}
    return {kind: f"{name}-{kind}" if name else kind for kind in kinds}


def words_of(source: Source) -> str:
    step = "" if source.step is None else f" step {source.step}"
    return f"{source.format}{step} ({source.path})"


def provenance(sources: Sequence[Source], request: Request) -> dict[str, Any]:
    """What made the weights: source, step, config, data fingerprints, versions."""
    found = [{"path": str(source.path), "format": source.format, "layout": source.layout, "step": source.step,
              **source.provenance} for source in sources]
    for entry in found:
        if "config" in entry:
            entry["column_fingerprints"] = _columns(entry["config"])
    first = found[0] if len(found) == 1 else {}
    return {
        "sources": found, "step": first.get("step"), "dtype": request.dtype, "model": request.model,
        "versions": versions() | {"landiff-pretrain": _own_version()},
    }


def _columns(config: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of the columns that a run was trained on; none where the data has gone, its manifest's mark remains."""
    try:
        manifest = read_manifest(Path(config["data"]["manifest"]))
    except ShardError:
        return {}
    return {name: column.fingerprint for name, column in manifest.columns.items()}


def _own_version() -> str:
    try:
        return importlib.metadata.version("landiff-pretrain")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
