"""Everything that holds weights and that we know: how to recognise, open and write it.

No process group and no engine: Megatron's and DeepSpeed's files are read and written as files, with their pickles held to an
allow-list; the rest is safetensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from landiff.configs import Config, ConfigError, ownership, validate
from landiff.configs.documents import read_json, read_yaml
from landiff.configs.files import commit_dir, remove_abandoned, temporary_name, write_text
from landiff.configs.ownership import OWNER
from landiff.model_zoo import registry
from landiff.model_zoo.config import LMConfig, ModelConfig, TokenizerConfig
from landiff.model_zoo.convert.foreign import prepared, refuse_adapter_folder
from landiff.model_zoo.convert.formats import (
    deepspeed,
    deepspeed_write,
    diffusers_folder,
    megatron,
    megatron_optimizer,
    release_set,
)
from landiff.model_zoo.convert.formats.megatron import model_section
from landiff.model_zoo.convert.lazy import ProgressCallback, read_safetensors
from landiff.model_zoo.convert.parts import (
    FOREIGN,
    PLAIN,
    VAE,
    Part,
    WeightSource,
    assembled,
    match_model,
)

STATE, RUN_CONFIG = (
    "state.json",
    "config.yaml",
)  # what the trainers add to a checkpoint (training/checkpoint/store.py)
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Options:
    """How to read what does not say everything by itself."""

    models: ModelConfig = field(
        default_factory=ModelConfig
    )  # sizes of a release and of bare Megatron folders
    allow_missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    name: str
    what: str
    recognise: Callable[[Path], bool]
    open: Callable[[Path, Options], WeightSource]


def _is_entry(path: Path) -> bool:
    return (
        (path / registry.WEIGHTS).is_file()
        and (path / "provenance.json").is_file()
        and (path / "config.json").is_file()
        and diffusers_folder.class_of(path) is None
    )


def _open_entry(path: Path, options: Options) -> WeightSource:
    entry = registry.read_entry(path)
    registry.require_intact(entry)
    part = match_model(
        entry.lazy(), entry.kind, entry.config, PLAIN, str(path), options.allow_missing
    )
    return WeightSource(
        path,
        "zoo",
        f"zoo entry {entry.reference}",
        (part,),
        entry.provenance.get("step"),
        {"entry": entry.reference, "made_of": entry.provenance},
    )


def _is_tokenizer_checkpoint(path: Path) -> bool:
    return (path / STATE).is_file() and (path / "model.safetensors").is_file()


def _open_tokenizer(path: Path, options: Options) -> WeightSource:
    config = validate(
        TokenizerConfig, model_section(_run_config(path), path), str(path / RUN_CONFIG)
    )
    part = match_model(
        read_safetensors(path / "model.safetensors"),
        "tokenizer",
        config,
        PLAIN,
        str(path),
        options.allow_missing,
    )
    return WeightSource(path, "tokenizer checkpoint", "plain torch", (part,), *_run(path))


def _open_megatron(path: Path, options: Options) -> WeightSource:
    config: LMConfig = (
        megatron.stored_config(path) if (path / megatron.CONFIG).is_file() else options.models.lm
    )
    theirs = megatron.open_megatron(path)
    table = megatron.megatron_rules(config, megatron.padding_of(theirs, config, path))
    part = match_model(theirs, "lm", config, table, str(path), options.allow_missing)
    step, provenance = _run(path)
    layout = "dist_checkpointing: whole tensors, for any parallel layout"
    parallel = provenance.get("config", {}).get("parallel")
    if isinstance(parallel, dict) and isinstance(provenance["world_size"], int):
        layout += f"; written by {_ranks(provenance['world_size'])}, tensor {parallel.get('tensor')}, pipeline {parallel.get('pipeline')}"
    layout += f"; {megatron_optimizer.describe_changes(path)}"
    return WeightSource(path, "megatron", layout, (part,), step, provenance)


def _open_deepspeed(path: Path, options: Options) -> WeightSource:
    if not (path / deepspeed.LAYOUT).is_file():
        return _open_foreign_deepspeed(path, options)
    layout = deepspeed.ZeroLayout.read(path)
    state = deepspeed.read_deepspeed(path / deepspeed.SHARDS)
    part = match_model(
        deepspeed.exported(state), *layout.part, PLAIN, str(path), options.allow_missing
    )
    return WeightSource(
        path,
        "deepspeed",
        f"{_zero_words(state)}, {layout.precision}, phase {layout.phase}",
        (part,),
        *_run(path),
    )


def _open_foreign_deepspeed(path: Path, options: Options) -> WeightSource:
    """Shards that our trainer did not write. Names that are ours make it a model of the sizes of `options`."""
    shards = deepspeed.find_shards(path)
    assert shards is not None, path
    state = deepspeed.read_deepspeed(shards)
    tensors = prepared(deepspeed.exported(state), str(shards))
    configs = {
        "diffusion": options.models.diffusion,
        "transformer": options.models.diffusion.transformer,
    }
    kind = next(
        (
            kind
            for kind, sign in (
                ("diffusion", "control.blocks.0.qkv.weight"),
                ("transformer", "blocks.0.qkv.weight"),
            )
            if sign in tensors
        ),
        None,
    )
    part = (
        match_model(tensors, kind, configs[kind], PLAIN, str(shards), options.allow_missing)
        if kind
        else Part(FOREIGN, {}, tensors)
    )
    return WeightSource(
        path,
        "deepspeed",
        f"{_zero_words(state)}, not of our trainer",
        (part,),
        state.rest.get("global_steps"),
    )


def _zero_words(state: deepspeed.DeepSpeedState) -> str:
    if deepspeed.is_start(state):
        return (
            "whole weights, no optimizer"
            if state.zero_stage == 0
            else f"weights for ZeRO {state.zero_stage}, {_ranks(state.world_size)}, no optimizer"
        )
    return f"ZeRO {state.zero_stage}, {_ranks(state.world_size)}, optimizer at its step {state.optimizer_steps}"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _run_config(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path / RUN_CONFIG)
    except OSError as error:
        raise ConfigError(f"{path} is not a checkpoint of a run: {error}") from None


def _run(path: Path) -> tuple[int | None, dict[str, Any]]:
    """Step and origin of a trainer's checkpoint; nothing for one that no trainer wrote."""
    if not (path / STATE).is_file():
        return None, {}
    state = read_json(path / STATE, advice=f"use a checkpoint whose {STATE} is whole")
    if not isinstance(state.get("step"), int):
        raise ConfigError(f"{path / STATE} is damaged: it names no step")
    kept = ("step", "kind", "manifest", "columns", "world_size", "versions")
    return state["step"], {
        **{key: state.get(key) for key in kept},
        "config": _run_config(path),
        "checkpoint_state_sha256": hashlib.sha256((path / STATE).read_bytes()).hexdigest(),
    }


FORMATS = (
    Format(
        "zoo", "zoo entry: model.safetensors, config.json, provenance.json", _is_entry, _open_entry
    ),
    Format(
        "megatron",
        "Megatron dist checkpoint: .metadata, *.distcp",
        lambda p: (p / ".metadata").is_file(),
        _open_megatron,
    ),
    Format(
        "deepspeed",
        "DeepSpeed checkpoint: *_model_states.pt, *_optim_states.pt, or of the diffusion trainer: layout.json, zero/",
        lambda p: (p / deepspeed.LAYOUT).is_file() or deepspeed.find_shards(p) is not None,
        _open_deepspeed,
    ),
    Format(
        "tokenizer checkpoint",
        "checkpoint of the tokenizer trainer",
        _is_tokenizer_checkpoint,
        _open_tokenizer,
    ),
    Format(
        "diffusers",
        "diffusers or transformers folder: config.json beside .safetensors",
        lambda p: bool(diffusers_folder.model_folders(p)),
        lambda p, o: diffusers_folder.open_diffusers(p, o.allow_missing),
    ),
    Format(
        "release",
        "LanDiff release: a set, a folder or a file of it",
        lambda p: bool(release_set.find_files(p)),
        lambda p, o: release_set.open_release(p, o.models, o.allow_missing),
    ),
)


def open_source(path: Path, options: Options | None = None) -> WeightSource:
    """What lies at `path`, ready to be read tensor by tensor. Raises ConfigError for what is none of FORMATS."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    for format in FORMATS:
        if format.recognise(path):
            return format.open(path, options or Options())
    refuse_adapter_folder(path)
    known = "\n".join(f"  {format.what}" for format in FORMATS)
    raise ConfigError(f"{path} is none of the formats that can be converted:\n{known}")


def describe_source(source: WeightSource) -> str:
    """The text of `landiff convert inspect`."""
    lines = [
        f"{source.path}",
        f"  format       {source.format}",
        f"  layout       {source.layout}",
        f"  step         {'-' if source.step is None else source.step}",
    ]
    for part in source.parts:
        counts: dict[str, int] = {}
        for tensor in part.tensors.meta.values():
            name = str(tensor.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + tensor.numel()
        lines += [
            f"  kind         {part.kind}",
            f"    model      {model_words(part)}",
            f"    parameters {part.tensors.num_elements:,} in {len(part.tensors)} tensors",
            f"    dtypes     {', '.join(f'{name} ({n:,})' for name, n in counts.items())}",
            f"    fingerprint {source_fingerprint(part)}",
        ]
        lines += [f"    filled     {name} (missing in the source)" for name in part.filled]
    return "\n".join(lines)


def model_words(part: Part) -> str:
    """The sizes in a part's config; those of the models inside it come with their names."""
    config = (
        part.config.model_dump(mode="json")
        if isinstance(part.config, Config)
        else dict(part.config)
    )
    words = [f"{key} {value}" for key, value in config.items() if not isinstance(value, dict)]
    words += [
        f"{key} ({', '.join(f'{k} {v}' for k, v in value.items())})"
        for key, value in config.items()
        if isinstance(value, dict)
    ]
    return ", ".join(words) or "unknown"


def source_fingerprint(part: Part) -> str:
    """What the zoo would call this part; for the VAE, which the zoo doesn't hold, a hash made the same way."""
    return registry.weights_fingerprint(part.kind, part.config, part.tensors)


# ---------------------------------------------------------------- writing


def _write_megatron(
    folder: Path,
    parts: Sequence[Part],
    progress: ProgressCallback | None,
    cut: megatron.Padded | None = None,
) -> None:
    part = _only(parts, ("lm",), "megatron")
    megatron.write_megatron(folder, part.config, part.tensors, cut, progress)


def _write_deepspeed(
    folder: Path,
    parts: Sequence[Part],
    progress: ProgressCallback | None,
    cut: deepspeed_write.Cut | None = None,
) -> None:
    whole = [part for part in parts if part.kind == "diffusion"]
    part = _only(whole or parts, ("diffusion", "transformer"), "deepspeed")
    deepspeed_write.write_start(folder, part.kind, part.config, part.tensors, progress, cut)


def _write_transformers(
    folder: Path, parts: Sequence[Part], progress: ProgressCallback | None
) -> None:
    diffusers_folder.write_model(folder, _only(parts, ("lm",), "transformers"), progress)


def _only(parts: Sequence[Part], kinds: tuple[str, ...], format: str) -> Part:
    found = [part for part in parts if part.kind in kinds]
    if len(found) != 1:
        raise ConfigError(
            f"--to {format} takes one {' or '.join(kinds)}; the source holds {', '.join(p.kind for p in parts) or 'nothing'}"
        )
    return found[0]


WRITERS: dict[str, Callable[..., None]] = {
    "release": release_set.write_release,
    "diffusers": diffusers_folder.write_diffusers,
    "megatron": _write_megatron,
    "deepspeed": _write_deepspeed,
    "transformers": _write_transformers,
}


def write_target(
    target: Path,
    format: str,
    parts: Sequence[Part],
    provenance: dict[str, Any],
    progress: ProgressCallback | None = None,
    cut: megatron.Padded | deepspeed_write.Cut | None = None,
) -> None:
    """Write `parts` to the new folder `target`, which appears whole or not at all. Raises ConfigError if it exists.

    `cut` is for the run that starts from it: Megatron's padding, or DeepSpeed's stage and ranks.
    Raises UnhealthyError for weights with NaN or infinity.
    """
    parts = [replace(part, tensors=part.tensors.checked(f"the {part.kind}")) for part in parts]
    with new_folder(target, provenance) as temporary:
        WRITERS[format](
            temporary, assembled(parts, format), progress, **({"cut": cut} if cut else {})
        )


@contextmanager
def new_folder(target: Path, provenance: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to be filled, which becomes `target` at the end, with its origin, or vanishes.

    Raises ConfigError where there is one, OwnedError where another process writes it.
    """
    with ownership.take(target.with_name(f".{target.name}{OWNER}"), str(target)):
        if target.exists():
            raise ConfigError(f"{target} exists already; name a folder that doesn't")
        with _filled(target, provenance) as temporary:
            yield temporary


@contextmanager
def _filled(target: Path, provenance: Mapping[str, Any]) -> Iterator[Path]:
    """`new_folder` for the owner of the target."""
    remove_abandoned(target.parent, target.name)
    temporary = temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        write_text(temporary / PROVENANCE, json.dumps(provenance, indent=1, sort_keys=True))
        commit_dir(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def export_to_zoo(
    zoo: Path,
    names: dict[str, str],
    parts: Sequence[Part],
    provenance: dict[str, Any],
    progress: ProgressCallback | None = None,
) -> list[registry.ZooEntry]:
    """Every part as a zoo entry called `names[kind]`. The VAE has no place in the zoo and is passed over."""
    found = [part for part in assembled(parts, "zoo") if part.kind != VAE]
    if not found:
        raise ConfigError(
            "the source holds a VAE alone, which the zoo doesn't keep; use --to diffusers"
        )
    return [
        registry.export(
            zoo,
            names[part.kind],
            part.kind,
            part.config,
            part.tensors,
            {**provenance, "filled": list(part.filled)},
            progress,
        )
        for part in found
    ]
