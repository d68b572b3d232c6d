"""Our tokenizer and `tokenizer/model.safetensors` of the LanDiff release."""

from __future__ import annotations

import torch
from torch import Tensor

from landiff.model_zoo.convert.rules import Rule

_KINDS = ("weight", "bias")
# Linear layers that are only renamed: ours -> theirs
_LINEAR_LAYERS = {
    "encoder.head": "encoder.proj_out",
    "decoder.embed": "decoder.decoder_embed",
    "decoder.head_in": "decoder.ffn.0",
    "decoder.head_out": "decoder.ffn.2",
    "quantizer.project_in": "quantizer.project_in",
    "quantizer.project_out": "quantizer.project_out",
}


def _transformer_rules(part: str) -> list[Rule]:
    """The transformer of the encoder or of the decoder."""
    ours = f"{part}.blocks.{{i}}"
    theirs = f"{part}.transformer.{{i}}"
    rules = [
        Rule(
            f"{ours}.qkv.weight",
            tuple(f"{theirs}.attn.{name}.weight" for name in ("wq", "wk", "wv")),
            to_theirs=lambda qkv: qkv.chunk(3),
            to_ours=lambda *parts: (torch.cat(parts),),
            stacked="ours",
        ),
        Rule(f"{ours}.out.weight", f"{theirs}.attn.wo.weight"),
    ]
    for kind in _KINDS:
        rules += [
            Rule(f"{part}.norm_in.{kind}", f"{part}.ln_pre.{kind}"),
            Rule(f"{part}.norm_out.{kind}", f"{part}.ln_post.{kind}"),
            Rule(f"{ours}.norm1.{kind}", f"{theirs}.ln_1.{kind}"),
            Rule(f"{ours}.norm2.{kind}", f"{theirs}.ln_2.{kind}"),
            Rule(f"{ours}.mlp_in.{kind}", f"{theirs}.mlp.c_fc.{kind}"),
            Rule(f"{ours}.mlp_out.{kind}", f"{theirs}.mlp.c_proj.{kind}"),
        ]
    return rules


def _linear_rules() -> list[Rule]:
    """Linear layers outside the transformers."""
    rules = []
    for ours, theirs in _LINEAR_LAYERS.items():
        rules += [Rule(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in _KINDS]
    return rules


def _as_flag(stored: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
    """The flag `initted` as we store it, a bool scalar."""
    return stored.reshape(()).bool(), embed


def _as_float(flag: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
    """The flag `initted` as the release stores it, a float [1] in the dtype of the codebook."""
    return flag.reshape(1).to(embed.dtype), embed


RULES: tuple[Rule, ...] = (
    Rule("mean", "mean"),
    Rule("std", "std"),
    Rule("encoder.iframe_queries", "encoder.IFrame_latent_tokens"),
    Rule("encoder.pframe_queries", "encoder.PFrame_latent_tokens"),
    # Ours is a linear layer, the release's a 1x1 convolution.
    Rule(
        "encoder.embed.weight",
        "encoder.patch_embed.weight",
        to_theirs=lambda weight: (weight[:, :, None, None],),
        to_ours=lambda weight: (weight[:, :, 0, 0],),
    ),
    Rule("encoder.embed.bias", "encoder.patch_embed.bias"),
    Rule("decoder.mask_token", "decoder.mask_token"),
    *_linear_rules(),
    *_transformer_rules("encoder"),
    *_transformer_rules("decoder"),
    # The release's version of the quantizer library stores the flag as a float [1], ours as a bool
    # scalar. The codebook is part of the rule because it has the dtype of the file.
    Rule(
        ("quantizer._codebook.initted", "quantizer._codebook.embed"),
        ("quantizer._codebook.initted", "quantizer._codebook.embed"),
        to_theirs=_as_float,
        to_ours=_as_flag,
    ),
    Rule("quantizer._codebook.cluster_size", "quantizer._codebook.cluster_size"),
    Rule("quantizer._codebook.embed_avg", "quantizer._codebook.embed_avg"),
)
