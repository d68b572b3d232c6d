"""The models that a conversion moves between formats, under our own names.

The kinds are those of the zoo (tokenizer, lm, transformer, diffusion, adapter) and three more:

    control   a diffusion model without its main transformer, as the LanDiff release stores it
    vae       the codec, under the names of the diffusers class that we run
    foreign   any other model, under its own names; it can be inspected and resharded
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from landiff.configs import Config, ConfigError
from landiff.model_zoo import registry
from landiff.model_zoo.config import DiffusionConfig, ModelConfig
from landiff.model_zoo.convert.foreign import without_wrappers
from landiff.model_zoo.convert.formats import (
    diffusers_transformer,
    release_diffusion,
    release_lm,
    release_tokenizer,
)
from landiff.model_zoo.convert.lazy import LazyTensors, converted
from landiff.model_zoo.convert.rules import ConversionError, Rule, format_mismatch

MAIN = "transformer."  # prefix of the main transformer in a whole diffusion model
VAE = "vae"
CONTROL = "control"
FOREIGN = "foreign"
ADAPTER = "adapter"
ADAPTER_TARGETS = ("zoo", "diffusers", "transformers")  # formats that hold adapters

# (format, kind) -> the rules between our names and those of the format
TABLES: dict[tuple[str, str], Sequence[Rule]] = {
    ("release", "lm"): release_lm.RULES,
    ("release", "tokenizer"): release_tokenizer.RULES,
    ("release", "transformer"): release_diffusion.main_rules("", release_diffusion.COGVIDEOX),
    ("release", CONTROL): [*release_diffusion.control_rules(), *release_diffusion.semantic_rules()],
    ("release", "diffusion"): release_diffusion.diffusion_rules(),
    ("diffusers", "transformer"): diffusers_transformer.RULES,
    ("transformers", "lm"): [Rule("{rest*}", "model.{rest*}")],
}
PLAIN = [Rule("{rest*}", "{rest*}")]  # for formats that use our own names

C = TypeVar("C", bound=Config)


@dataclass(frozen=True, eq=False)
class Part:
    """One model in a source or target of a conversion."""

    kind: str
    # For the VAE, the arguments of the diffusers class; empty for a foreign model.
    config: Config | Mapping[str, Any]
    tensors: LazyTensors
    # Names of the source that were missing and were initialized instead (--allow-missing).
    filled: tuple[str, ...] = ()

    def config_as(self, cls: type[C]) -> C:
        """The config, which the caller knows to be a `cls`."""
        assert isinstance(self.config, cls), (self.kind, self.config)
        return self.config

    def cast(self, dtype: torch.dtype | None) -> Part:
        """The same model with floating-point tensors in `dtype`. None keeps all dtypes.

        The quantizer of a tokenizer keeps its dtype, because it counts in float32.
        """
        if dtype is None:
            return self
        tensors = self.tensors.cast(dtype)
        if self.kind == "tokenizer":
            quantizer = self.tensors.only(lambda name: name.startswith("quantizer."))
            tensors = tensors.joined(quantizer)
        return replace(self, tensors=tensors)


WeightChoice = Literal["ema", "raw"]


@dataclass(frozen=True)
class Options:
    """How to read a source that does not describe itself completely, or holds a choice."""

    # Sizes of the models in a release or in an engine's checkpoint without a config.
    models: ModelConfig = field(default_factory=ModelConfig)
    # Patterns of tensor names that may be missing and are initialized instead.
    allow_missing: tuple[str, ...] = ()
    # The moving averages in a checkpoint, or the weights; None: averages if there are any.
    weights: WeightChoice | None = None


@dataclass(frozen=True)
class WeightSource:
    """A file, folder or checkpoint whose format was detected."""

    path: Path
    format: str
    layout: str  # how the weights are divided over files and ranks, as text
    parts: tuple[Part, ...]
    step: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    # The moving averages of a run, or its weights; None if the source does not say.
    weights: WeightChoice | None = None


def build_meta(kind: str, config: Config | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model of this kind, on the meta device, under our names."""
    if kind == VAE:
        from diffusers import AutoencoderKLCogVideoX

        assert isinstance(config, Mapping), config
        with torch.device("meta"):
            return AutoencoderKLCogVideoX(**config).state_dict()
    return _without_main(kind, _build_module(kind, config).state_dict())


def _build_module(kind: str, config: Config | Mapping[str, Any]) -> nn.Module:
    """The module that holds a part of this kind, on the meta device."""
    assert isinstance(config, Config), (kind, config)
    with torch.device("meta"):
        return registry.build_module("diffusion" if kind == CONTROL else kind, config)


def _without_main(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, for the control branch without the main transformer."""
    if kind != CONTROL:
        return dict(state)
    return {name: tensor for name, tensor in state.items() if not name.startswith(MAIN)}


def match_model(
    source: LazyTensors,
    kind: str,
    config: Config | Mapping[str, Any],
    rules: Sequence[Rule],
    what: str,
    *,
    allow_missing: Sequence[str] = (),
) -> Part:
    """Match the tensors of a source with a model and return them as a part under our names.

    Prefixes of wrappers (DDP, torch.compile, FSDP) are removed. Missing tensors whose names match a
    pattern in `allow_missing` (shell wildcards) are initialized as in a new model.

    Raises ConversionError with all missing, unexpected and misshapen keys, under the names of the
    source, and for adapters and quantised weights.
    """
    source = without_wrappers(source, what)
    fresh = converted(_initial_tensors(kind, config), rules, "to_theirs")
    allowed: list[str] = []
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "wrong shape": []}
    for name, meta in fresh.meta.items():
        if name not in source:
            is_allowed = any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing)
            (allowed if is_allowed else problems["missing"]).append(name)
        elif source.meta[name].shape != meta.shape:
            found = tuple(source.meta[name].shape)
            problems["wrong shape"].append(f"{name} {found} instead of {tuple(meta.shape)}")
    problems["unexpected"] = [name for name in source if name not in fresh]
    if any(problems.values()):
        counted = [f"{len(names)} {problem}" for problem, names in problems.items() if names]
        counts = ", ".join(counted)
        raise ConversionError(
            f"{what} does not fit a {kind} of this config ({counts}):\n"
            f"{format_mismatch(problems)}\n"
            "Missing tensors can be initialized with --allow-missing PATTERN; a model of other "
            "sizes needs its own --model"
        )
    filler = fresh.only(allowed.__contains__).cast(source.dtype())
    return Part(kind, config, converted(source.joined(filler), rules, "to_ours"), tuple(allowed))


def _initial_tensors(kind: str, config: Config | Mapping[str, Any]) -> LazyTensors:
    """The tensors of a model before training, initialized module by module on access."""
    if kind == VAE:
        meta = build_meta(kind, config)
        return LazyTensors(meta, lambda name: torch.zeros(meta[name].shape))
    model = _build_module(kind, config)

    def read(name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is None:  # our own modules: gains of norms and learned vectors
            shape = model.state_dict()[name].shape
            is_gain = attribute == "weight" and len(shape) == 1
            return torch.ones(shape) if is_gain else torch.zeros(shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nn.Module.to_empty(module, device="cpu", recurse=False)
            reset()
            return getattr(module, attribute).detach().clone()

    return LazyTensors(_without_main(kind, model.state_dict()), read)


def assembled(parts: Sequence[Part], target: str) -> list[Part]:
    """At most one part of each kind, as the format `target` needs them.

    A control branch and a main transformer are joined to a whole diffusion model. Raises
    ConversionError for two parts of one kind and for parts that the target cannot hold.
    """
    kinds = [part.kind for part in parts]
    if FOREIGN in kinds:
        tensors = parts[kinds.index(FOREIGN)].tensors
        starts = sorted({name.split(".")[0] for name in tensors})
        raise ConversionError(
            "the source holds a model of unknown architecture (its keys start with "
            f"{', '.join(starts[:6])}): it can be inspected, and its checkpoint resharded with "
            "--to deepspeed, but not converted to other formats"
        )
    if ADAPTER in kinds and target not in ADAPTER_TARGETS:
        raise ConversionError(
            f"--to {target} holds whole models and no adapters; add the base of the adapter to the "
            "sources and merge both with --merge"
        )
    duplicates = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if duplicates:
        raise ConversionError(
            f"the sources hold more than one {' and '.join(duplicates)}; name the folders of those "
            "to be converted"
        )
    by_kind = {part.kind: part for part in parts}
    if CONTROL in by_kind and "transformer" in by_kind and "diffusion" not in by_kind:
        by_kind["diffusion"] = joined(by_kind.pop(CONTROL), by_kind["transformer"])
    if CONTROL in by_kind and target != "release":
        raise ConversionError(
            "the sources hold a control branch but no main transformer: name one as a further "
            "source (CogVideoX-2b-sat, a CogVideoX folder of diffusers, or a zoo entry of kind "
            "transformer)"
        )
    return list(by_kind.values())


def joined(control: Part, main: Part) -> Part:
    """The whole diffusion model. Raises ConfigError if the sizes differ."""
    config = control.config_as(DiffusionConfig)
    if config.transformer != main.config:
        raise ConfigError(
            f"the control branch was made for the main transformer {config.transformer}, not for "
            f"{main.config}"
        )
    tensors = main.tensors.with_prefix(MAIN).joined(control.tensors)
    return Part("diffusion", config, tensors, main.filled + control.filled)


def main_of(diffusion: Part) -> Part:
    """The main transformer of a whole diffusion model."""
    config = diffusion.config_as(DiffusionConfig).transformer
    tensors = diffusion.tensors.without_prefix(MAIN)
    return Part("transformer", config, tensors, diffusion.filled)


def control_of(diffusion: Part) -> Part:
    """A whole diffusion model without its main transformer."""
    tensors = diffusion.tensors.only(lambda name: not name.startswith(MAIN))
    return Part(CONTROL, diffusion.config, tensors, diffusion.filled)


def under_names_of(format: str, part: Part) -> LazyTensors:
    """The tensors of a part under the names of another format."""
    return converted(part.tensors, TABLES[format, part.kind], "to_theirs")
