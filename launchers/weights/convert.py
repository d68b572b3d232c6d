"""`landiff convert`: weights from one format to another, and checkpoints of runs to the zoo."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from landiff.configs import ConfigError, load
from landiff.data_pipeline.format.shards import ShardError, read_manifest
from landiff.launchers.progress import ProgressLine
from landiff.launchers.weights.request import ConvertRequest
from landiff.launchers.weights.reshard import (
    TRAINERS,
    MegatronStartOverrides,
    ReshardRequest,
    ZeroStartOverrides,
    describe_reshard,
    has_optimizer_state,
    reshard,
)
from landiff.model_zoo import registry
from landiff.model_zoo.config import LMConfig, ModelConfig
from landiff.model_zoo.convert import known_formats
from landiff.model_zoo.convert.formats.deepspeed_write import ZeroPartition
from landiff.model_zoo.convert.formats.megatron import default_padding
from landiff.model_zoo.convert.parts import VAE, Options, Part, WeightSource, assembled
from landiff.model_zoo.convert.rules import all_of
from landiff.model_zoo.lora.parts import merged
from landiff.training.checkpoint.files import differences, latest_whole, versions
from landiff.training.checkpoint.run_folder import CHECKPOINTS, CONFIG, STATE

# ---------------------------------------------------------------- sources


def locate(reference: str | Path, zoo: Path) -> Path:
    """The path of a source: the newest checkpoint of a run, a zoo entry, or the path itself.

    Of a run, this is the newest checkpoint that is complete and healthy. Raises ConfigError if
    there is none, and for a checkpoint, or a file in one, that does not match its files.json.
    """
    path = Path(reference)
    if (path / CHECKPOINTS).is_dir() and not (path / STATE).is_file():
        newest = latest_whole(path / CHECKPOINTS)
        if newest is None:
            raise ConfigError(
                f"{path} holds no whole and healthy checkpoint; it must be a run folder (runs/lm) "
                "or a checkpoint in it"
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
    """Raise ConfigError if `path` is a damaged checkpoint of a run, or lies in one."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / STATE).is_file() and (folder / CONFIG).is_file():
            problems = differences(folder)
            if problems:
                found = "; ".join(problems[:3])
                raise ConfigError(
                    f"{folder} is damaged: {found}; take another checkpoint of the run"
                )


def find_source(reference: str | Path, zoo: Path, options: Options | None = None) -> WeightSource:
    """The models of a source. Only headers are read. Raises ConfigError."""
    return known_formats.open_source(locate(reference, zoo), options)


def locate_all(request: ConvertRequest) -> list[Path]:
    """The paths of all sources. Checkpoints of runs are verified. Raises ConfigError."""
    return all_of(partial(locate, source, request.zoo) for source in request.sources)


def open_all(request: ConvertRequest, paths: Sequence[Path]) -> list[WeightSource]:
    """The models of all sources. Raises ConfigError with the problems of all of them."""
    options = Options(load(ModelConfig, request.model), request.allow_missing, request.weights)
    sources = all_of(partial(known_formats.open_source, path, options) for path in paths)
    if request.weights is not None and all(source.weights is None for source in sources):
        raise ConfigError(
            f"--weights {request.weights} chooses between the weights of a run, and "
            f"{sources[0].path} is none; leave the option out"
        )
    return sources


def parts_of(sources: Sequence[WeightSource], request: ConvertRequest) -> list[Part]:
    """The parts of all sources, with adapters merged if the request says so, in its dtype.

    Raises ConfigError for an adapter without its base.
    """
    import torch

    parts: list[Part] = []
    for source in sources:
        parts += source.parts
    if request.merge is not None:
        parts = merged(parts, request.merge)
    dtype = getattr(torch, request.dtype) if request.dtype else None
    return [part.cast(dtype) for part in parts]


# ---------------------------------------------------------------- conversion


def convert_weights(request: ConvertRequest) -> list[str]:
    """Run the conversion. Returns one line for each folder written.

    Raises ConfigError. Nothing is left under a final name then.
    """
    paths = locate_all(request)
    sources = open_all(request, paths)
    keeps_both = keeps_optimizer(request, paths)
    if keeps_both:
        sources = [replace(source, weights=None) for source in sources]
    origin = provenance(sources, request)
    progress = ProgressLine("convert", "MB")
    names = " + ".join(describe_request(source) for source in sources)
    if keeps_both:
        result = reshard(sources[0].path, reshard_request(request), origin, progress)
        return [f"{names} -> {request.out}, {result}"]
    parts = parts_of(sources, request)
    if request.to != "zoo":
        layout = start_layout(request, parts)
        known_formats.write_target(
            out_folder(request), request.to, parts, origin, progress, layout=layout
        )
        return [f"{names} -> {request.out} ({request.to})"]
    zoo_name_of = zoo_names(parts, request.name)
    entries = known_formats.export_to_zoo(request.zoo, zoo_name_of, parts, origin, progress)
    return [f"{names} -> {entry.path}" for entry in entries]


def plan(request: ConvertRequest) -> list[str]:
    """What `convert_weights` would do, as text. Headers and options are checked as there."""
    paths = locate_all(request)
    sources = open_all(request, paths)
    target = str(request.out or f"{request.zoo}/{request.name or '*'}")
    if keeps_optimizer(request, paths):
        result = describe_reshard(sources[0].path, reshard_request(request))
        source = describe_request(replace(sources[0], weights=None))
        return [f"would convert {source} with its optimizer, to {target}: {result}"]
    parts: list[Part] = []
    lines = []
    for weight_source in sources:
        parts += weight_source.parts
        kinds = ", ".join(part.kind for part in weight_source.parts)
        source = describe_request(weight_source)
        lines.append(f"would convert {source}: {kinds}, to {request.to} {target}")
    start_layout(request, parts)
    return lines


def out_folder(request: ConvertRequest) -> Path:
    """The folder of --out, which `check_request` requires for all formats but the zoo."""
    assert request.out is not None, request
    return request.out


def reshard_request(request: ConvertRequest) -> ReshardRequest:
    """The part of a request that concerns a checkpoint with its optimizer."""
    return ReshardRequest(
        to=request.to,
        out=out_folder(request),
        overrides=request.overrides,
        dtype=request.dtype,
        world_size=request.world_size,
        model=load(ModelConfig, request.model).lm,
    )


def keeps_optimizer(request: ConvertRequest, paths: Sequence[Path]) -> bool:
    """Whether the source is a checkpoint that is converted with its optimizer.

    Raises ConfigError if this contradicts other options or sources.
    """
    if request.to not in TRAINERS or request.weights_only:
        return False
    found = [path for path in paths if has_optimizer_state(path, request.to)]
    if found and request.weights is not None:
        raise ConfigError(
            f"{found[0]} is a checkpoint with its optimizer, which keeps its weights and their "
            f"moving average: use --weights {request.weights} with --weights-only"
        )
    if found and request.allow_missing:
        raise ConfigError(
            f"{found[0]} is a checkpoint with its optimizer, which must be complete: use "
            "--allow-missing with --weights-only"
        )
    if found and len(paths) > 1:
        raise ConfigError(
            f"{found[0]} is a checkpoint with its optimizer, which cannot be combined with other "
            "sources; name it alone, or use --weights-only"
        )
    return bool(found)


def start_layout(
    request: ConvertRequest, parts: Sequence[Part]
) -> known_formats.StartLayout | None:
    """The layout of the run that starts from the weights, from overrides and --world-size.

    None stands for the default of the format. Raises ConfigError.
    """
    if request.to == "megatron" and request.overrides:
        asked = load(MegatronStartOverrides, {}, request.overrides)
        for part in parts:
            if part.kind == "lm":
                config = part.config_as(LMConfig)
                return default_padding(config, asked.vocab_multiple, asked.head_multiple)
    if request.to == "deepspeed" and (request.overrides or request.world_size):
        stage = load(ZeroStartOverrides, {}, request.overrides).zero.stage
        return ZeroPartition(stage, request.world_size or 1)
    return None


def zoo_names(parts: Sequence[Part], name: str | None) -> dict[str, str]:
    """Names of zoo entries by kind, for the option --name NAME.

    NAME for a single part, NAME-kind for several, and the kind without the option.
    """
    kinds = [part.kind for part in assembled(parts, "zoo") if part.kind != VAE]
    if not name:
        return {kind: kind for kind in kinds}
    if len(kinds) == 1:
        return {kinds[0]: name}
    return {kind: f"{name}-{kind}" for kind in kinds}


# ---------------------------------------------------------------- provenance


def describe_request(source: WeightSource) -> str:
    """Format, step, path and choice of weights of a source as text."""
    step = "" if source.step is None else f" step {source.step}"
    weights = ", moving average" if source.weights == "ema" else ""
    return f"{source.format}{step}{weights} ({source.path})"


def provenance(sources: Sequence[WeightSource], request: ConvertRequest) -> dict[str, Any]:
    """Where the weights come from: sources, step, config, data fingerprints and versions."""
    entries = []
    for source in sources:
        entry = {
            "path": str(source.path),
            "format": source.format,
            "layout": source.layout,
            "step": source.step,
            "weights": source.weights,
            **source.provenance,
        }
        if "config" in entry:
            entry["column_fingerprints"] = _column_fingerprints(entry["config"])
        entries.append(entry)
    step = weights = None
    if len(entries) == 1:
        step = entries[0]["step"]
        weights = entries[0]["weights"]
    return {
        "sources": entries,
        "step": step,
        "weights": weights,
        "dtype": request.dtype,
        "buckets": _trained_buckets(entries),
        "merged_adapters_scale": request.merge,
        "model": request.model,
        "versions": versions() | {"landiff-pretrain": _own_version()},
    }


def _trained_buckets(entries: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The clip shapes of all phases of the runs that the weights are from; None if not named.

    A later phase counts only if the run has reached it.
    """
    found: dict[str, None] = {}
    for entry in entries:
        config = entry.get("config") or {}
        sections = [config.get("data") or {}]
        for phase in config.get("phases") or ():
            if phase["from_step"] < (entry.get("step") or 0):
                sections.append(phase.get("data") or {})
        for section in sections:
            found.update(dict.fromkeys(section.get("buckets") or ()))
    return list(found) or None


def _column_fingerprints(config: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of the columns that a run was trained on; empty if its data is gone.

    The manifest's own fingerprint is part of the checkpoint's state.
    """
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
