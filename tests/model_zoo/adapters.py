"""LoRA adapters with random weights in a zoo."""

from __future__ import annotations

from pathlib import Path

import torch

from landiff.model_zoo import registry
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.lora.base import base_fingerprint
from landiff.model_zoo.lora.config import AdapterConfig
from landiff.model_zoo.lora.modules import adapted_part, adapter_tensors, add_layers
from landiff.model_zoo.lora.parts import adapter_part

TARGETS = {"lm": "wqkv", "transformer": "qkv", "diffusion": "out"}


def export_adapter(zoo: Path, kind: str) -> registry.ZooEntry:
    """Entry `lora-KIND`: an adapter of the entry `lm`, or of a part of the entry `diffusion`."""
    whole = registry.resolve(zoo, "lm" if kind == "lm" else "diffusion")
    base = base_fingerprint(whole, kind)
    config = AdapterConfig(base_kind=kind, base=base, rank=2, alpha=4, targets=(TARGETS[kind],))
    model = registry.load_model(whole)
    add_layers(model, config)
    part = adapted_part(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in part.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.2)
    tensors = adapter_tensors(LazyTensors.of(part.state_dict()))
    exported = adapter_part(config, tensors, kind).tensors
    return registry.export(zoo, f"lora-{kind}", "adapter", config, exported, {})
