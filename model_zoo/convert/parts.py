"""What a conversion moves: models under our names, wherever they came from.

kinds: those of the zoo (tokenizer, lm, transformer, diffusion), "control" (a diffusion model without its main
transformer, as the LanDiff release stores it), "vae" (under the names of diffusers, whose class we run) and "foreign" (a
model that is none of ours, under its own names: it can be inspected).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landiff.configs import Config, ConfigError
from landiff.model_zoo import registry
from landiff.model_zoo.config import DiffusionConfig
from landiff.model_zoo.convert.foreign import prepared
from landiff.model_zoo.convert.formats import (
    diffusers_transformer,
    release_diffusion,
    release_lm,
    release_tokenizer,
)
from landiff.model_zoo.convert.lazy import LazyTensors, converted
from landiff.model_zoo.convert.rules import ConversionError, Rule, apply_rules, format_mismatch

MAIN, VAE, CONTROL, FOREIGN = "transformer.", "vae", "control", "foreign"

# (format, kind) -> the table between our names and that format's
TABLES: dict[tuple[str, str], Sequence[Rule]] = {
    ("release", "lm"): release_lm.RULES,
    ("release", "tokenizer"): release_tokenizer.RULES,
    ("release", "transformer"): release_diffusion.main_rules("", release_diffusion.COGVIDEOX),
    ("release", CONTROL): [*release_diffusion.control_rules(), *release_diffusion.semantic_rules()],
    ("release", "diffusion"): release_diffusion.diffusion_rules(),
    ("diffusers", "transformer"): diffusers_transformer.RULES,
    ("transformers", "lm"): [Rule("{rest*}", "model.{rest*}")],
}
PLAIN = [Rule("{rest*}", "{rest*}")]  # our own names


@dataclass(frozen=True, eq=False)
class Part:
    kind: str
    config: Config | Mapping[str, Any]  # of the VAE: the arguments of diffusers' class
    tensors: LazyTensors
    filled: tuple[str, ...] = ()  # names in the source that were missing and allowed to be

    def cast(self, dtype: torch.dtype | None) -> Part:
        """The tokenizer's quantiser keeps its own dtype: it counts in float32."""
        if dtype is None:
            return self
        kept = self.tensors.only(
            lambda name: self.kind == "tokenizer" and name.startswith("quantizer.")
        )
        return replace(self, tensors=self.tensors.cast(dtype).joined(kept))


@dataclass(frozen=True)
class WeightSource:
    """Something on disk that was recognised."""

    path: Path
    format: str
    layout: str  # how it is cut, in words
    parts: tuple[Part, ...]
    step: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def build_meta(kind: str, config: Config | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a part of this kind must have, on the meta device, under our names."""
    with torch.device("meta"):
        if kind == VAE:
            from diffusers import AutoencoderKLCogVideoX

            return AutoencoderKLCogVideoX(**config).state_dict()
        return _of_kind(
            kind,
            registry.build_module("diffusion" if kind == CONTROL else kind, config).state_dict(),
        )


def _of_kind(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in state.items()
        if kind != CONTROL or not name.startswith(MAIN)
    }


def match_model(
    source: LazyTensors,
    kind: str,
    config: Config | Mapping[str, Any],
    rules: Sequence[Rule],
    what: str,
    allow_missing: Sequence[str] = (),
) -> Part:
    """`source` as a part under our names.

    Raises ConversionError with every missing, extra and misshapen key, in the names of the source. Missing ones
    that match a pattern of `allow_missing` (shell wildcards) start as they do in a fresh model. Prefixes of wrappers
    (DDP, torch.compile, FSDP) are removed; adapters and quantised weights are refused.
    """
    source = prepared(source, what)
    fresh = converted(_fresh(kind, config), rules, "to_theirs")
    missing = [name for name in fresh if name not in source]
    allowed = [
        name
        for name in missing
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing)
    ]
    problems = {
        "missing": [name for name in missing if name not in allowed],
        "unexpected": [name for name in source if name not in fresh],
        "wrong shape": [
            f"{name} {tuple(source.meta[name].shape)} instead of {tuple(fresh.meta[name].shape)}"
            for name in fresh
            if name in source and source.meta[name].shape != fresh.meta[name].shape
        ],
    }
    if any(problems.values()):
        counts = ", ".join(
            f"{len(names)} {problem}" for problem, names in problems.items() if names
        )
        raise ConversionError(
            f"{what} does not fit a {kind} of this config ({counts}):\n{format_mismatch(problems)}\n"
            "Missing ones can be left to chance with --allow-missing PATTERN; a model of other sizes "
            "needs its own --model"
        )
    filler = fresh.only(allowed.__contains__).cast(source.dtype())
    return Part(kind, config, converted(source.joined(filler), rules, "to_ours"), tuple(allowed))


def _fresh(kind: str, config: Config | Mapping[str, Any]) -> LazyTensors:
    """A model's tensors as they are before training, module by module."""
    if kind == VAE:
        meta = build_meta(kind, config)
        return LazyTensors(meta, lambda name: torch.zeros(meta[name].shape))
    with torch.device("meta"):
        model = registry.build_module("diffusion" if kind == CONTROL else kind, config)

    def read(name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if not hasattr(
            module, "reset_parameters"
        ):  # our own modules: gains of norms, learned vectors
            shape = model.state_dict()[name].shape
            return (
                torch.ones(shape)
                if attribute == "weight" and len(shape) == 1
                else torch.zeros(shape)
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            alone = nn.Module.to_empty(module, device="cpu", recurse=False)
            alone.reset_parameters()
            return getattr(alone, attribute).detach().clone()

    return LazyTensors(_of_kind(kind, model.state_dict()), read)


def assembled(parts: Sequence[Part], wanted: str) -> list[Part]:
    """One part of each kind: a control branch gets the main transformer it needs. Raises ConversionError for two alike."""
    kinds = [part.kind for part in parts]
    if FOREIGN in kinds:
        names = sorted({name.split(".")[0] for name in parts[kinds.index(FOREIGN)].tensors})
        raise ConversionError(
            f"the source holds a model that is none of ours (its keys start with {', '.join(names[:6])}): it can be "
            "inspected, and its checkpoint cut anew for other ranks with --to deepspeed, but has no place in other formats"
        )
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if twice:
        raise ConversionError(
            f"the sources hold more than one {' and '.join(twice)}; name the folders of the ones you mean"
        )
    by_kind = {part.kind: part for part in parts}
    if CONTROL in by_kind and "transformer" in by_kind and "diffusion" not in by_kind:
        by_kind["diffusion"] = joined(by_kind.pop(CONTROL), by_kind["transformer"])
    if CONTROL in by_kind and wanted != "release":
        raise ConversionError(
            "the control branch has no main transformer here: name that as a further source "
            "(CogVideoX-2b-sat, a CogVideoX folder of diffusers, or a zoo entry of kind transformer)"
        )
    return list(by_kind.values())


def joined(control: Part, main: Part) -> Part:
    """The whole diffusion model. Raises ConfigError where the sizes differ."""
    assert isinstance(control.config, DiffusionConfig)
    if control.config.transformer != main.config:
        raise ConfigError(
            f"the control branch was made for the main transformer {control.config.transformer}, not for {main.config}"
        )
    return Part(
        "diffusion",
        control.config,
        main.tensors.with_prefix(MAIN).joined(control.tensors),
        main.filled + control.filled,
    )


def main_of(diffusion: Part) -> Part:
    """The main transformer of a whole diffusion model."""
    return Part(
        "transformer",
        diffusion.config.transformer,
        diffusion.tensors.without_prefix(MAIN),
        diffusion.filled,
    )


def control_of(diffusion: Part) -> Part:
    return Part(
        CONTROL,
        diffusion.config,
        diffusion.tensors.only(lambda name: not name.startswith(MAIN)),
        diffusion.filled,
    )


def under_names_of(format: str, part: Part) -> LazyTensors:
    """The part's tensors under another format's names."""
    return converted(part.tensors, TABLES[format, part.kind], "to_theirs")


def expected_names(format: str, kind: str, config: Config) -> dict[str, Tensor]:
    """The names of a format, with shapes, for a model of this config; on the meta device."""
    return apply_rules(build_meta(kind, config), TABLES[format, kind], "to_theirs")
