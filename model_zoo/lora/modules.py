"""LoRA adapters in the modules of model_zoo, with peft.

peft replaces a linear layer by one that holds it as `base_layer`, and A and B as `lora_A` and
`lora_B`. An adapter has the names of a model without peft: `blocks.0.qkv.lora_A.weight` is A of
`blocks.0.qkv`.

peft is imported in the functions: it takes seconds, and most runs have no adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.rules import check_against
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.lora.config import AdapterConfig

TRAINED = "default"  # peft's name of the adapter that is trained


def adapted_part(model: nn.Module, adapter: AdapterConfig) -> nn.Module:
    """The part of a model that an adapter belongs to: itself, or its main transformer."""
    if adapter.base_kind == "transformer" and isinstance(model, ControlledDiffusion):
        return model.transformer
    return model


def add_layers(
    model: nn.Module, adapter: AdapterConfig, name: str = TRAINED, scale: float = 1.0
) -> None:
    """Add the layers of an adapter to a model, in place. A is random, and B is zero.

    `name`: peft's name of the adapter. It is active, beside those that the model has already.
    Freezes everything but adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    part = adapted_part(model, adapter)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha * scale,  # type: ignore[arg-type]  # peft computes with floats
        target_modules=adapter.target_pattern,
        lora_dropout=0.0,
        bias="none",
    )
    model.requires_grad_(False)
    inject_adapter_in_model(config, part, adapter_name=name)
    for _, layer in lora_layers(model):
        layer.set_adapter(list(layer.lora_A))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that peft has put into a model, by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            yield name, module


def adapter_names(names: Iterable[str], name: str = TRAINED) -> dict[str, str]:
    """Names of a model with peft's layers -> names of the adapter `name`, for its tensors only."""
    found = {}
    for key in names:
        for matrix in ("lora_A", "lora_B"):
            end = f".{matrix}.{name}.weight"
            if key.endswith(end):
                found[key] = f"{key.removesuffix(end)}.{matrix}.weight"
    return found


def adapter_tensors(state: LazyTensors) -> LazyTensors:
    """The trained adapter in the state of a model with peft's layers, under the adapter's names."""
    names = adapter_names(state)
    return state.only(names.__contains__).renamed(names.__getitem__)


@torch.no_grad()
def set_adapter_tensors(
    model: nn.Module, adapter: AdapterConfig, tensors: Mapping[str, Tensor], name: str = TRAINED
) -> None:
    """Load the tensors of an adapter into the layers that `add_layers` has added.

    Raises ConversionError if names or shapes do not fit.
    """
    parameters = dict(adapted_part(model, adapter).named_parameters())
    ours = adapter_names(parameters, name)
    expected = {theirs: parameters[key].shape for key, theirs in ours.items()}
    check_against(tensors, expected, "the adapter")
    for key, theirs in ours.items():
        parameters[key].copy_(tensors[theirs])


def merge(model: nn.Module) -> None:
    """Add all adapters to the weights of their layers, in place, and remove peft's layers."""
    for name, layer in lora_layers(model):
        layer.merge(safe_merge=True, adapter_names=list(layer.lora_A))
        parent, _, attribute = name.rpartition(".")
        base = layer.get_base_layer()
        setattr(model.get_submodule(parent), attribute, base)


def merged_tensors(
    base: LazyTensors, adapter: AdapterConfig, tensors: LazyTensors, scale: float, prefix: str = ""
) -> LazyTensors:
    """The weights of a base with an adapter added, each computed in float32 when it is read.

    `prefix`: of the adapted model's names in `base`.
    """
    changed = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            changed[f"{prefix}{layer}.weight"] = layer

    def read(name: str) -> Tensor:
        weight = base.read(name)
        if name not in changed:
            return weight
        down = tensors.read(f"{changed[name]}.lora_A.weight").float()
        up = tensors.read(f"{changed[name]}.lora_B.weight").float()
        update = (up @ down) * (adapter.scaling * scale)
        return (weight.float() + update).to(weight.dtype)

    check_against(
        {name: base.meta[name] for name in changed if name in base},
        {f"{prefix}{layer}.weight": _shape(tensors, layer) for layer in changed.values()},
        "the base model of the adapter",
    )
    return LazyTensors(base.meta, read)


def _shape(tensors: LazyTensors, layer: str) -> Sequence[int]:
    """Shape of the update of a layer."""
    rows = tensors.meta[f"{layer}.lora_B.weight"].shape[0]
    columns = tensors.meta[f"{layer}.lora_A.weight"].shape[1]
    return (rows, columns)
