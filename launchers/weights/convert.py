"""`landiff convert`: weights from one format to another, and the newest whole checkpoint of a run -> the zoo."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from landiff.configs import ConfigError, load
from landiff.data_pipeline.format.shards import ShardError, read_manifest
from landiff.launchers.progress import ProgressLine
from landiff.launchers.weights.relayout import (
    TRAINERS,
    Padding,
    StartSettings,
    Wish,
    can_go_on,
    dry,
    relayout,
)
from landiff.launchers.weights.request import ConvertRequest
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.convert import known_formats as formats
from landiff.model_zoo.convert.formats import deepspeed_write, megatron
from landiff.model_zoo.convert.parts import VAE, Part, WeightSource, assembled
from landiff.model_zoo.convert.rules import all_of
from landiff.training.checkpoint.store import CONFIG, STATE, differences, latest_whole, versions


def locate(reference: str | Path, zoo: Path) -> Path:
    """A run folder's newest whole and healthy checkpoint, another path as it is, or a zoo entry.

    Raises ConfigError, also for a checkpoint of a run, or a file in one, that files.json does not
    describe.
    """
    path = Path(reference)
    if (path / "checkpoints").is_dir() and not (path / STATE).is_file():
        newest = latest_whole(path / "checkpoints")
        if newest is None:
            raise ConfigError(
                f"{path} holds no whole and healthy checkpoint; it must be a run folder (runs/lm) or a "
                "checkpoint in it"
            )
        return newest
    if not path.exists():
        if "/" in str(reference):
            raise ConfigError(
                f"{path} does not exist, so it holds no whole checkpoint and no weights"
            )
        return registry.resolve(zoo, str(reference)).path
    require_whole(path)
    return path


def require_whole(path: Path) -> None:
    """Raise ConfigError where `path` is, or lies in, a damaged checkpoint of a run."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / STATE).is_file() and (folder / CONFIG).is_file():
            problems = differences(folder)
            if problems:
                found = "; ".join(problems[:3])
                raise ConfigError(
                    f"{folder} is damaged: {found}; take another checkpoint of the run"
                )


def find_source(
    reference: str | Path, zoo: Path, options: formats.Options | None = None
) -> WeightSource:
    """What lies there, ready to be read. Raises ConfigError."""
    return formats.open_source(locate(reference, zoo), options)


def locate_all(request: ConvertRequest) -> list[Path]:
    """Where the sources lie; their files are verified here, once."""
    return all_of(partial(locate, source, request.zoo) for source in request.sources)


def open_all(request: ConvertRequest, paths: Sequence[Path]) -> list[WeightSource]:
    options = formats.Options(load(ModelConfig, request.model), request.allow_missing)
    return all_of(partial(formats.open_source, path, options) for path in paths)


def parts_of(sources: Sequence[WeightSource], dtype: str | None) -> list[Part]:
    import torch

    return [
        part.cast(getattr(torch, dtype) if dtype else None)
        for source in sources
        for part in source.parts
    ]


def convert_weights(request: ConvertRequest) -> list[str]:
    """Do it; returns what was written, one line each. Raises ConfigError, and then nothing is left under a final name."""
    paths = locate_all(request)
    sources = open_all(request, paths)
    made = provenance(sources, request)
    progress = ProgressLine("convert", "MB")
    words = " + ".join(describe_request(source) for source in sources)
    if goes_on(request, paths):
        return [
            f"{words} -> {request.out}, {relayout(sources[0].path, wish_of(request), made, progress)}"
        ]
    parts = parts_of(sources, request.dtype)
    if request.to != "zoo":
        formats.write_target(
            request.out, request.to, parts, made, progress, start_cut(request, parts)
        )
        return [f"{words} -> {request.out} ({request.to})"]
    names = zoo_names(parts, request.name)
    return [
        f"{words} -> {entry.path}"
        for entry in formats.export_to_zoo(request.zoo, names, parts, made, progress)
    ]


def plan(request: ConvertRequest) -> list[str]:
    """What `convert` would do, one line for each source; headers and options are checked as there."""
    paths = locate_all(request)
    sources = open_all(request, paths)
    target = str(request.out or f"{request.zoo}/{request.name or '*'}")
    if goes_on(request, paths):
        return [
            f"would convert {describe_request(sources[0])} with its optimizer, to {target}: {dry(sources[0].path, wish_of(request))}"
        ]
    start_cut(request, [part for source in sources for part in source.parts])
    return [
        f"would convert {describe_request(source)}: {', '.join(part.kind for part in source.parts)}, to {request.to} {target}"
        for source in sources
    ]


def wish_of(request: ConvertRequest) -> Wish:
    return Wish(
        request.to,
        request.out,
        request.overrides,
        request.dtype,
        request.world_size,
        load(ModelConfig, request.model).lm,
    )


def goes_on(request: ConvertRequest, paths: Sequence[Path]) -> bool:
    """Is a checkpoint with its optimizer asked for, and is there one?"""
    if request.to not in TRAINERS or request.weights_only:
        return False
    found = [path for path in paths if can_go_on(path, request.to)]
    if found and request.allow_missing:
        raise ConfigError(
            f"{found[0]} is a checkpoint with its optimizer, which must be whole: --allow-missing goes with --weights-only"
        )
    if found and len(paths) > 1:
        raise ConfigError(
            f"{found[0]} is a checkpoint with its optimizer, which nothing can be joined to; name it alone, or take --weights-only"
        )
    return bool(found)


def start_cut(
    request: ConvertRequest, parts: Sequence[Part]
) -> megatron.Padded | deepspeed_write.Cut | None:
    """What weights that start a run must fit."""
    if request.to == "megatron" and request.overrides:
        asked = load(Padding, {}, request.overrides)
        sizes = next((part.config for part in parts if part.kind == "lm"), None)
        return (
            megatron.default_padding(sizes, asked.vocab_multiple, asked.head_multiple)
            if sizes
            else None
        )
    if request.to == "deepspeed" and (request.overrides or request.world_size):
        return deepspeed_write.Cut(
            load(StartSettings, {}, request.overrides).zero.stage, request.world_size or 1
        )
    return None


def zoo_names(parts: Sequence[Part], name: str | None) -> dict[str, str]:
    """kind -> name: NAME where one part is exported, NAME-kind where several are, the kind where no name is given."""
    kinds = [part.kind for part in assembled(parts, "zoo") if part.kind != VAE]
    if len(kinds) == 1 and name:
        return {kinds[0]: name}
    return {kind: f"{name}-{kind}" if name else kind for kind in kinds}


def describe_request(source: WeightSource) -> str:
    step = "" if source.step is None else f" step {source.step}"
    return f"{source.format}{step} ({source.path})"


def provenance(sources: Sequence[WeightSource], request: ConvertRequest) -> dict[str, Any]:
    """What made the weights: source, step, config, data fingerprints, versions."""
    found = [
        {
            "path": str(source.path),
            "format": source.format,
            "layout": source.layout,
            "step": source.step,
            **source.provenance,
        }
        for source in sources
    ]
    for entry in found:
        if "config" in entry:
            entry["column_fingerprints"] = _columns(entry["config"])
    first = found[0] if len(found) == 1 else {}
    return {
        "sources": found,
        "step": first.get("step"),
        "dtype": request.dtype,
        "model": request.model,
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
