"""The base model of an adapter: the weights it was trained on, and the check that they match."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from landiff.model_zoo import registry
from landiff.model_zoo.convert.fingerprint import weights_fingerprint
from landiff.model_zoo.convert.parts import MAIN
from landiff.model_zoo.lora.config import PEFT_PREFIX, AdapterConfig, AdapterUse, BaseKind
from landiff.model_zoo.lora.modules import add_layers, merge, set_adapter_tensors
from landiff.model_zoo.registry import ZooEntry, ZooError
from landiff.model_zoo.sample.placement.quantized import refuse_quantized


def base_fingerprint(entry: ZooEntry, base_kind: BaseKind) -> str:
    """Fingerprint of the part of an entry that an adapter of `base_kind` changes.

    Of a whole diffusion model, the main transformer has the fingerprint of an entry by itself.
    Raises ZooError for an entry without this part.
    """
    if entry.kind == base_kind:
        return entry.fingerprint
    if (entry.kind, base_kind) == ("diffusion", "transformer"):
        main = entry.lazy().without_prefix(MAIN)
        return weights_fingerprint("transformer", entry.stored_config["transformer"], main)
    raise ZooError(f"{entry.reference} is a {entry.kind}, where a {base_kind} is needed")


def find_adapter(zoo: Path, use: AdapterUse) -> tuple[ZooEntry, AdapterConfig]:
    """The zoo entry of an adapter, with its config. Raises ZooError."""
    entry = registry.resolve(zoo, use.adapter, kind="adapter")
    assert isinstance(entry.config, AdapterConfig), entry
    return entry, entry.config


def apply_adapter(
    model: nn.Module, adapter: ZooEntry, *, name: str, scale: float, merged: bool
) -> None:
    """Add an adapter to a model, which the caller knows to be its base, in place.

    merged: the update is added to the weights. Otherwise it stays in layers of its own, `name`, and
    the model computes both. Raises ConfigError for damaged files, and for a quantized model.
    """
    refuse_quantized(dict(model.named_parameters()), "changed by an adapter")
    config = adapter.config
    assert isinstance(config, AdapterConfig), adapter
    device = next(model.parameters()).device
    tensors = {}
    for key, tensor in adapter.load(device).items():
        tensors[key.removeprefix(PEFT_PREFIX)] = tensor
    add_layers(model, config, name, scale)
    set_adapter_tensors(model, config, tensors, name)
    if merged:
        merge(model)
    model.requires_grad_(False)
