"""Our main transformer and `CogVideoXTransformer3DModel` of diffusers: rules and configs.

diffusers computes the output norm (`norm_out.norm`) with eps 1e-5, the release and we with 1e-6.
Outputs therefore differ by about 1e-5 unless `model.norm_out.norm.eps` is set to 1e-6. The position
table is computed in diffusers, not stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landiff.model_zoo.config import TransformerConfig
from landiff.model_zoo.convert.rules import Rule

# Set as norm_out.norm.eps of the diffusers model for equal outputs.
OUTPUT_NORM_EPS = 1e-6

_KINDS = ("weight", "bias")


def _regroup(ours: Tensor) -> tuple[Tensor, Tensor]:
    """Divide a modulation in 12 row chunks between norm1 (attention) and norm2 (MLP).

    Ours: attention and MLP of the video (3 + 3 chunks), then of the text. Theirs: one tensor for
    each norm, with the video's chunks before the text's.
    """
    chunks = ours.chunk(12)
    return torch.cat([*chunks[0:3], *chunks[6:9]]), torch.cat([*chunks[3:6], *chunks[9:12]])


def _ungroup(attention: Tensor, mlp: Tensor) -> tuple[Tensor]:
    """The inverse of `_regroup`."""
    a = attention.chunk(6)
    m = mlp.chunk(6)
    return (torch.cat([*a[:3], *m[:3], *a[3:], *m[3:]]),)


def _rules() -> list[Rule]:
    """The rules for all weights and biases."""
    block = "transformer_blocks.{i}"
    names = {
        "input.patch": "patch_embed.proj",
        "input.text": "patch_embed.text_proj",
        "input.time_in": "time_embedding.linear_1",
        "input.time_out": "time_embedding.linear_2",
        "blocks.{i}.norm1": f"{block}.norm1.norm",
        "blocks.{i}.norm2": f"{block}.norm2.norm",
        "blocks.{i}.query_norm": f"{block}.attn1.norm_q",
        "blocks.{i}.key_norm": f"{block}.attn1.norm_k",
        "blocks.{i}.out": f"{block}.attn1.to_out.0",
        "blocks.{i}.mlp_in": f"{block}.ff.net.0.proj",
        "blocks.{i}.mlp_out": f"{block}.ff.net.2",
        "final_norm": "norm_final",
        "output.norm": "norm_out.norm",
        "output.modulation": "norm_out.linear",
        "output.linear": "proj_out",
    }
    rules = []
    for ours, theirs in names.items():
        rules += [Rule(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in _KINDS]
    for kind in _KINDS:
        rules += [
            Rule(
                f"blocks.{{i}}.qkv.{kind}",
                tuple(f"{block}.attn1.{name}.{kind}" for name in ("to_q", "to_k", "to_v")),
                to_theirs=lambda qkv: qkv.chunk(3),
                to_ours=lambda *parts: (torch.cat(parts),),
                stacked="ours",
            ),
            Rule(
                f"blocks.{{i}}.modulation.{kind}",
                (f"{block}.norm1.linear.{kind}", f"{block}.norm2.linear.{kind}"),
                to_theirs=_regroup,
                to_ours=_ungroup,
            ),
        ]
    return rules


RULES: tuple[Rule, ...] = tuple(_rules())


def diffusers_config(config: TransformerConfig) -> dict[str, Any]:
    """The arguments of `CogVideoXTransformer3DModel` (its config.json) for our config."""
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "time_embed_dim": config.time_embed_dim,
        "text_embed_dim": config.text_dim,
        "num_layers": config.num_layers,
        "sample_width": config.latent_width,
        "sample_height": config.latent_height,
        "sample_frames": (config.latent_frames - 1) * 4 + 1,
        "temporal_compression_ratio": 4,
        "patch_size": config.patch_size,
        "max_text_seq_length": config.text_length,
        "spatial_interpolation_scale": config.spatial_interpolation,
        "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
        "timestep_activation_fn": "silu",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "dropout": 0.0,
    }


def config_from_diffusers(theirs: dict[str, Any]) -> TransformerConfig:
    """Our config for a config.json of diffusers. Raises ValueError for unsupported variants."""
    if theirs.get("use_rotary_positional_embeddings"):
        raise ValueError(
            "use_rotary_positional_embeddings = true (CogVideoX-5B): only the sine-cosine table of "
            "2B is supported"
        )
    if theirs["in_channels"] != theirs["out_channels"]:
        raise ValueError(
            f"in_channels = {theirs['in_channels']} and out_channels = {theirs['out_channels']} "
            "must be equal"
        )
    return TransformerConfig(
        latent_channels=theirs["in_channels"],
        latent_frames=(theirs["sample_frames"] - 1) // theirs["temporal_compression_ratio"] + 1,
        latent_height=theirs["sample_height"],
        latent_width=theirs["sample_width"],
        patch_size=theirs["patch_size"],
        hidden_size=theirs["num_attention_heads"] * theirs["attention_head_dim"],
        num_layers=theirs["num_layers"],
        num_heads=theirs["num_attention_heads"],
        time_embed_dim=theirs["time_embed_dim"],
        text_length=theirs["max_text_seq_length"],
        text_dim=theirs["text_embed_dim"],
        spatial_interpolation=theirs["spatial_interpolation_scale"],
    )
