"""Zoos of small models with random weights, and configs of `landiff sample` that use them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from landiff.configs.loader import load
from landiff.launchers.config import SampleConfig
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.registry import build_module
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig

PROMPTS = (
    "A grey rabbit stands on a green meadow.",
    "Snow 🐇 雪",
    "a=1: fox, running",
    "A small bird sits on a branch in the forest, and then it flies away over the lake.",
)


@torch.no_grad()
def write_random_zoo(folder: Path, buckets: Sequence[str] = ()) -> Path:
    """Exports the three models into a new zoo and returns it.

    `buckets`: the clip shapes that they were trained on.
    """
    configs = {
        "lm": load(LMTrainConfig, "nano/lm").model,
        "tokenizer": load(TokenizerTrainConfig, "nano/tokenizer").model,
        "diffusion": load(DiffusionTrainConfig, "nano/diffusion-control").model,
    }
    provenance = {"buckets": list(buckets)}
    torch.manual_seed(0)
    for kind, model_config in configs.items():
        model = build_module(kind, model_config)
        for parameter in model.parameters():
            if not parameter.any():  # adaLN-zero would ignore its conditions
                torch.nn.init.normal_(parameter, std=0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("initted"):
                buffer.fill_(True)
            elif name.endswith("embed"):  # the codebook
                buffer.normal_()
        registry.export(folder, kind, kind, model_config, model.state_dict(), provenance)
    return folder


def write_random_shapes_zoo(folder: Path) -> None:
    """Exports untrained models of the preset `shapes`, with a codebook, into a new zoo."""
    config = load(ModelConfig, "shapes/model")
    for kind in ("tokenizer", "lm", "diffusion"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_module(kind, getattr(config, kind))
            if kind == "tokenizer":
                model.train()(torch.randn(4, 5, 160, 4, 4))
        registry.export(folder, kind, kind, getattr(config, kind), model.state_dict(), {})


def sample_config(zoo: Path, out: Path, **options) -> SampleConfig:
    """`nano/sample` with the zoo, four prompts and two sampling steps."""
    base = load(SampleConfig, "nano/sample").model_dump()
    return SampleConfig(**base | {"zoo": zoo, "out": out, "prompts": PROMPTS, "steps": 2} | options)
