"""A tiny diffusion model with random weights."""

from __future__ import annotations

import torch
from torch import nn

from landiff.model_zoo.config import DiffusionConfig, SemanticConditionConfig, TransformerConfig

TINY = DiffusionConfig(
    transformer=TransformerConfig(
        latent_channels=4,
        latent_frames=3,
        latent_height=4,
        latent_width=6,
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        time_embed_dim=16,
        text_length=5,
        text_dim=12,
    ),
    control_layers=2,
    semantic=SemanticConditionConfig(
        feature_channels=8,
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        out_channels=16,
    ),
)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draws all parameters, also those that are zero or one at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values * parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.copy_(values * 0.1 + 1)
            else:
                parameter.copy_(values * 0.1)
