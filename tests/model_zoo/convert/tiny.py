"""A whole set of the smallest models that fit each other, with random weights, in any dtype."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from landiff.model_zoo import registry
from landiff.model_zoo.config import (
    DiffusionConfig,
    LMConfig,
    ModelConfig,
    SemanticConditionConfig,
    TokenizerConfig,
)
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.parts import VAE, Part, build_meta
from tests.model_zoo.tiny_diffusion import TINY

MODELS = ModelConfig(
    tokenizer=TokenizerConfig(
        feature_channels=6,
        grid_height=2,
        grid_width=3,
        hidden_size=32,
        num_heads=2,
        num_layers=2,
        token_size=16,
        codebook_size=16,
        codebook_dim=4,
        iframe_tokens=3,
        pframe_tokens=1,
        segment_frames=3,
    ),
    lm=LMConfig(
        codebook_size=16,
        iframe_tokens=3,
        pframe_tokens=1,
        segment_frames=3,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        ffn_size=48,
        max_positions=256,
        text_dim=20,
        max_text_tokens=16,
        micro_hidden_size=24,
        micro_frequency_dim=16,
    ),
    diffusion=DiffusionConfig(
        transformer=TINY.transformer,
        control_layers=2,
        semantic=SemanticConditionConfig(
            feature_channels=6,
            base_channels=32,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            out_channels=8,
        ),
    ),
)
# arguments of diffusers' class; the release file has no config, so these are what shapes tell
VAE_CONFIG = {
    "block_out_channels": (32, 32, 32, 64),
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
}
CONFIGS = {
    "lm": MODELS.lm,
    "tokenizer": MODELS.tokenizer,
    "transformer": MODELS.diffusion.transformer,
    "diffusion": MODELS.diffusion,
    VAE: VAE_CONFIG,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random, every tensor different, the codebook marked as trained."""
    generator = torch.Generator().manual_seed(len(kind))
    return {
        name: 0.3 * torch.randn(meta.shape, generator=generator).to(dtype)
        if meta.is_floating_point()
        else torch.ones(meta.shape, dtype=meta.dtype)
        for name, meta in build_meta(kind, CONFIGS[kind]).items()
    }


def part(kind: str, dtype: torch.dtype = torch.float32) -> Part:
    return Part(kind, CONFIGS[kind], LazyTensors.of(weights(kind, dtype)))


def parts(dtype: torch.dtype = torch.float32) -> list[Part]:
    return [part(kind, dtype) for kind in ("lm", "tokenizer", "diffusion", VAE)]


def outputs(kind: str, tensors: dict[str, Tensor]) -> Tensor:
    """What a model of these weights computes from fixed inputs, in float32."""
    model = registry.build_module(kind, CONFIGS[kind]).eval().requires_grad_(False)
    model.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    )
    generator = torch.Generator().manual_seed(1)
    if kind == "lm":
        text = torch.randn(1, 4, MODELS.lm.text_dim, generator=generator)
        row = model.layout.training_row(torch.arange(5).numpy() % 16, 4)
        return model(
            torch.from_numpy(row.input_ids)[None], text, torch.tensor([3.0]), torch.tensor([0.2])
        )
    if kind == "tokenizer":
        return model.decode(torch.tensor([[3, 1, 4, 1, 5]]), 3)
    sizes = MODELS.diffusion.transformer
    latents = torch.randn(2, 3, 4, 4, 6, generator=generator)
    text = torch.randn(2, sizes.text_length, sizes.text_dim, generator=generator)
    extra = [torch.randn(2, 3, 6, 2, 3, generator=generator)] if kind == "diffusion" else []
    return model(latents, torch.tensor([10, 700]), text, *extra)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def write_models(folder: Path) -> Path:
    """MODELS as the file that `--model` takes."""
    path = folder / "tiny.yaml"
    path.write_text(MODELS.model_dump_json())
    return path
