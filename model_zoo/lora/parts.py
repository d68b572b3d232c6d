"""Adapters as parts of a conversion: in checkpoints, in the zoo, and merged into their base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from landiff.configs import ConfigError
from landiff.model_zoo.convert.fingerprint import weights_fingerprint
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.parts import ADAPTER, MAIN, Part, main_of
from landiff.model_zoo.convert.rules import ConversionError
from landiff.model_zoo.lora.config import PEFT_PREFIX, AdapterConfig
from landiff.model_zoo.lora.modules import merged_tensors

ENDS = (".lora_A.weight", ".lora_B.weight")


def adapter_part(adapter: AdapterConfig, tensors: LazyTensors, what: str) -> Part:
    """The part of an adapter whose tensors have the names of its base, with lora_A and lora_B.

    Raises ConversionError, in which the source is called `what`, for names that are no pairs.
    """
    layers = set()
    for name in tensors:
        if not name.endswith(ENDS):
            raise ConversionError(f"{what} holds {name}, which is no matrix of a LoRA adapter")
        layers.add(name.rpartition(".lora_")[0])
    missing = []
    for layer in sorted(layers):
        missing += [layer + end for end in ENDS if layer + end not in tensors]
    if missing or not layers:
        raise ConversionError(f"{what} is no complete LoRA adapter; missing: {missing or 'all'}")
    return Part(ADAPTER, adapter, tensors.with_prefix(PEFT_PREFIX))


def matrices(part: Part) -> LazyTensors:
    """The tensors of an adapter under the names of its base, without peft's prefix."""
    return part.tensors.without_prefix(PEFT_PREFIX)


def merged(parts: Sequence[Part], scale: float = 1.0) -> list[Part]:
    """`parts` with all adapters added to their bases, which must be among them.

    Raises ConfigError if a base is missing or has other weights than the adapter was trained on.
    """
    bases = [part for part in parts if part.kind != ADAPTER]
    adapters = [part for part in parts if part.kind == ADAPTER]
    if not adapters:
        raise ConfigError("--merge needs an adapter among the sources, and the base it belongs to")
    changed = list(bases)
    for part in adapters:
        adapter = part.config_as(AdapterConfig)
        index = _base_of(bases, adapter)
        prefix = ""
        if bases[index].kind != adapter.base_kind:
            prefix = MAIN
        tensors = merged_tensors(changed[index].tensors, adapter, matrices(part), scale, prefix)
        changed[index] = replace(changed[index], tensors=tensors)
    return changed


def _base_of(parts: Sequence[Part], adapter: AdapterConfig) -> int:
    """Index of the base of an adapter. Raises ConfigError."""
    found = []
    for index, part in enumerate(parts):
        base = part
        if part.kind == "diffusion" and adapter.base_kind == "transformer":
            base = main_of(part)
        if base.kind != adapter.base_kind:
            continue
        fingerprint = weights_fingerprint(base.kind, base.config, base.tensors)
        if fingerprint == adapter.base:
            return index
        found.append(fingerprint)
    held = f"the sources hold {', '.join(found)}" if found else "the sources hold none"
    raise ConfigError(
        f"the adapter belongs to the {adapter.base_kind} with fingerprint {adapter.base}, and "
        f"{held}; name this base as a further source"
    )
