"""All formats of weights: how each is detected, opened and written.

    name                   detected by                          read   written
    zoo                    model.safetensors, provenance.json   yes    by `export_to_zoo`
    megatron               .metadata                            yes    yes
    deepspeed              layout.json, *_optim_states.pt       yes    yes
    tokenizer checkpoint   state.json, model.safetensors        yes
    diffusers              config.json with a known class       yes    yes
    transformers           read as diffusers                           yes
    release                names and keys of its files          yes    yes

`SOURCE_FORMATS` and `WRITERS` are the tables behind this. `open_source` returns the models at a
path, `write_target` writes models in a format. Neither needs a process group or an engine: the
files of Megatron and DeepSpeed are read and written as files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from landiff.configs import Config, ConfigError
from landiff.model_zoo import registry
from landiff.model_zoo.config import DiffusionConfig, LMConfig, TokenizerConfig, TransformerConfig
from landiff.model_zoo.convert import checkpoints
from landiff.model_zoo.convert.fingerprint import weights_fingerprint
from landiff.model_zoo.convert.foreign import refuse_adapter_folder
from landiff.model_zoo.convert.formats import (
    deepspeed_write,
    diffusers_folder,
    megatron,
    release_set,
)
from landiff.model_zoo.convert.formats.deepspeed_write import ZeroPartition
from landiff.model_zoo.convert.formats.megatron import Padded
from landiff.model_zoo.convert.lazy import ProgressCallback
from landiff.model_zoo.convert.output_folder import new_folder
from landiff.model_zoo.convert.parts import ADAPTER, VAE, Options, Part, WeightSource, assembled
from landiff.model_zoo.lora.config import AdapterConfig
from landiff.model_zoo.lora.files import adapter_names_in_transformers, write_adapter, write_peft
from landiff.model_zoo.lora.parts import matrices

WEIGHT_TEXTS = {"ema": "moving average", "raw": "raw weights"}

# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class SourceFormat:
    """A format that can be read."""

    name: str
    description: str
    detect: Callable[[Path], bool]
    open: Callable[[Path, Options], WeightSource]


def _has_diffusers_models(path: Path) -> bool:
    return bool(diffusers_folder.model_folders(path))


def _open_diffusers(path: Path, options: Options) -> WeightSource:
    return diffusers_folder.open_diffusers(path, options.allow_missing)


def _open_release(path: Path, options: Options) -> WeightSource:
    return release_set.open_release(path, options.models, options.allow_missing)


def _has_release_files(path: Path) -> bool:
    return bool(release_set.find_files(path))


# The first format that detects a path reads it. The order matters: a zoo entry and a checkpoint
# also hold a model.safetensors, which the release would detect.
SOURCE_FORMATS = (
    SourceFormat(
        "zoo",
        "zoo entry: model.safetensors, config.json, provenance.json",
        checkpoints.is_zoo_entry,
        checkpoints.open_zoo_entry,
    ),
    SourceFormat(
        "megatron",
        "Megatron dist checkpoint: .metadata, *.distcp",
        checkpoints.is_megatron_checkpoint,
        checkpoints.open_megatron_checkpoint,
    ),
    SourceFormat(
        "deepspeed",
        "DeepSpeed checkpoint: *_model_states.pt, *_optim_states.pt, or of the diffusion trainer: "
        "layout.json, zero/",
        checkpoints.is_deepspeed_checkpoint,
        checkpoints.open_deepspeed_checkpoint,
    ),
    SourceFormat(
        "tokenizer checkpoint",
        "checkpoint of the tokenizer trainer",
        checkpoints.is_tokenizer_checkpoint,
        checkpoints.open_tokenizer_checkpoint,
    ),
    SourceFormat(
        "diffusers",
        "diffusers or transformers folder: config.json beside .safetensors",
        _has_diffusers_models,
        _open_diffusers,
    ),
    SourceFormat(
        "release",
        "LanDiff release: a set, a folder or a file of it",
        _has_release_files,
        _open_release,
    ),
)


def open_source(path: Path, options: Options | None = None) -> WeightSource:
    """The models at `path`, in any known format. Only headers are read.

    Raises ConfigError for an unknown format and for models that do not fit.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    options = options or Options()
    for source_format in SOURCE_FORMATS:
        if source_format.detect(path):
            source = source_format.open(path, options)
            _require_choice(source, options)
            return source
    refuse_adapter_folder(path)
    known = "\n".join(f"  {source_format.description}" for source_format in SOURCE_FORMATS)
    raise ConfigError(f"{path} is none of the formats that can be converted:\n{known}")


def _require_choice(source: WeightSource, options: Options) -> None:
    """Raise ConfigError if the source holds other weights of a run than those asked for."""
    asked = options.weights
    if asked in (None, source.weights) or source.weights is None:
        return
    if source.format == "zoo":
        held = f"is an export of the {WEIGHT_TEXTS[source.weights]}; convert the run instead"
    else:
        held = "holds no moving average (the run has ema = null); use --weights raw"
    raise ConfigError(f"--weights {asked}: {source.path} {held}")


def describe_source(source: WeightSource) -> str:
    """The text that `landiff convert inspect` prints."""
    lines = [
        f"{source.path}",
        f"  format       {source.format}",
        f"  layout       {source.layout}",
        f"  step         {'-' if source.step is None else source.step}",
    ]
    if source.weights is not None:
        lines.append(f"  weights      {WEIGHT_TEXTS[source.weights]} ({source.weights})")
    for part in source.parts:
        lines += [
            f"  kind         {part.kind}",
            f"    model      {describe_config(part)}",
            f"    parameters {part.tensors.num_elements:,} in {len(part.tensors)} tensors",
            f"    dtypes     {_describe_dtypes(part)}",
            f"    fingerprint {source_fingerprint(part)}",
        ]
        lines += [f"    filled     {name} (missing in the source)" for name in part.filled]
    return "\n".join(lines)


def _describe_dtypes(part: Part) -> str:
    """The dtypes of a part, each with its number of elements."""
    counts: dict[str, int] = {}
    for tensor in part.tensors.meta.values():
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())


def describe_config(part: Part) -> str:
    """The sizes in a part's config; the sections of a config follow in parentheses."""
    if isinstance(part.config, Config):
        config = part.config.model_dump(mode="json")
    else:
        config = dict(part.config)
    sizes = []
    sections = []
    for key, value in config.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{name} {size}" for name, size in value.items())
            sections.append(f"{key} ({inner})")
        else:
            sizes.append(f"{key} {value}")
    return ", ".join(sizes + sections) or "unknown"


def source_fingerprint(part: Part) -> str:
    """The fingerprint that the zoo would give a part. A VAE is hashed in the same way."""
    return weights_fingerprint(part.kind, part.config, part.tensors)


# ---------------------------------------------------------------- writing

# The run that starts from weights: Megatron's padding, or DeepSpeed's stage and number of ranks.
StartLayout = Padded | ZeroPartition
Writer = Callable[[Path, Sequence[Part], StartLayout | None, ProgressCallback | None], None]


def _write_release(
    folder: Path,
    parts: Sequence[Part],
    _layout: StartLayout | None,
    progress: ProgressCallback | None,
) -> None:
    release_set.write_release(folder, parts, progress)


def _write_diffusers(
    folder: Path,
    parts: Sequence[Part],
    _layout: StartLayout | None,
    progress: ProgressCallback | None,
) -> None:
    models = [part for part in parts if part.kind != ADAPTER]
    diffusers_folder.write_diffusers(folder, models, progress)
    for part in parts:
        if part.kind == ADAPTER:
            write_adapter(folder, part, progress)


def _write_transformers(
    folder: Path,
    parts: Sequence[Part],
    _layout: StartLayout | None,
    progress: ProgressCallback | None,
) -> None:
    part = _single_part(parts, ("lm", ADAPTER), "transformers")
    if part.kind != ADAPTER:
        diffusers_folder.write_model(folder, part, progress)
        return
    adapter = part.config_as(AdapterConfig)
    if adapter.base_kind != "lm":
        raise ConfigError(
            f"--to transformers takes an lm; this is an adapter of a {adapter.base_kind}"
        )
    write_peft(folder, adapter, adapter_names_in_transformers(matrices(part)), r"model\.", progress)


def _write_megatron(
    folder: Path,
    parts: Sequence[Part],
    layout: StartLayout | None,
    progress: ProgressCallback | None,
) -> None:
    assert layout is None or isinstance(layout, Padded), layout
    part = _single_part(parts, ("lm",), "megatron")
    megatron.write_megatron(folder, part.config_as(LMConfig), part.tensors, layout, progress)


def _write_deepspeed(
    folder: Path,
    parts: Sequence[Part],
    layout: StartLayout | None,
    progress: ProgressCallback | None,
) -> None:
    assert layout is None or isinstance(layout, ZeroPartition), layout
    whole = [part for part in parts if part.kind == "diffusion"]  # includes a main transformer
    part = _single_part(whole or parts, ("diffusion", "transformer"), "deepspeed")
    assert isinstance(part.config, DiffusionConfig | TransformerConfig), part.config
    deepspeed_write.write_start(
        folder, part.kind, part.config, part.tensors, progress, partition=layout
    )


def _single_part(parts: Sequence[Part], kinds: tuple[str, ...], format: str) -> Part:
    """The only part of one of these kinds. Raises ConfigError if there is not exactly one."""
    found = [part for part in parts if part.kind in kinds]
    if len(found) != 1:
        held = ", ".join(part.kind for part in parts) or "nothing"
        raise ConfigError(f"--to {format} takes one {' or '.join(kinds)}; the source holds {held}")
    return found[0]


WRITERS: dict[str, Writer] = {
    "release": _write_release,
    "diffusers": _write_diffusers,
    "megatron": _write_megatron,
    "deepspeed": _write_deepspeed,
    "transformers": _write_transformers,
}


def refuse_own_options(part: Part, format: str) -> None:
    """Raises ConfigError for a model with options that the release does not have.

    Its weights would fit the format, and every program that reads them would compute something
    else.
    """
    config = part.config
    changed = []
    if isinstance(config, DiffusionConfig):
        if config.control_input != "sum":
            changed.append(f"control_input = {config.control_input}")
        if config.control_projections != "series":
            changed.append(f"control_projections = {config.control_projections}")
        if config.semantic.upsampler != "residual":
            changed.append(f"semantic.upsampler = {config.semantic.upsampler}")
        config = config.transformer
    default: Config
    names: tuple[str, ...]
    if isinstance(config, TransformerConfig):
        default = TransformerConfig()
        names = ("rotary_theta", "prediction")
    elif isinstance(config, TokenizerConfig):
        default = TokenizerConfig()
        names = ("latent_positions", "local_paths", "cell_mask_tokens")
    elif isinstance(config, LMConfig):
        default = LMConfig()
        names = ("grid_condition",)
    else:
        return
    for name in names:
        value = getattr(config, name)
        if value != getattr(default, name):
            changed.append(f"{name} = {value}")
    if changed:
        raise ConfigError(
            f"--to {format} cannot hold this {part.kind}: {', '.join(changed)}. Programs that read "
            "the format do not know these options; use --to zoo"
        )


def write_target(
    target: Path,
    format: str,
    parts: Sequence[Part],
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None = None,
    *,
    layout: StartLayout | None = None,
) -> None:
    """Write `parts` in a format to the new folder `target`, which appears complete or not at all.

    `layout` is that of the run that starts from the weights, for the formats megatron and
    deepspeed. Raises ConfigError if `target` exists or the format cannot hold the parts, and
    UnhealthyError for weights with NaN or infinity.
    """
    checked = []
    for part in parts:
        if format in ("release", "diffusers"):
            refuse_own_options(part, format)
        checked.append(replace(part, tensors=part.tensors.checked(f"the {part.kind}")))
    with new_folder(target, provenance) as temporary:
        WRITERS[format](temporary, assembled(checked, format), layout, progress)


def export_to_zoo(
    zoo: Path,
    names: Mapping[str, str],
    parts: Sequence[Part],
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None = None,
) -> list[registry.ZooEntry]:
    """Export every part as the zoo entry `names[kind]`. A VAE is skipped: the zoo holds none.

    Raises ConfigError if there is nothing to export.
    """
    entries = []
    for part in assembled(parts, "zoo"):
        if part.kind == VAE:
            continue
        entry = registry.export(
            zoo,
            names[part.kind],
            part.kind,
            part.config_as(Config),
            part.tensors,
            {**provenance, "filled": list(part.filled)},
            progress,
        )
        entries.append(entry)
    if not entries:
        raise ConfigError("the source holds only a VAE, which the zoo does not; use --to diffusers")
    return entries
