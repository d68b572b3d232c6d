"""Our tokenizer <-> `tokenizer/model.safetensors` of the LanDiff release."""

from __future__ import annotations

import torch
from torch import Tensor

from landiff.model_zoo.convert.rules import Rule

_PAIRS = ("weight", "bias")


def _stack_rules(part: str) -> list[Rule]:
    """Transformer of the encoder or of the decoder."""
    ours, theirs = f"{part}.blocks.{{i}}", f"{part}.transformer.{{i}}"
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
    for kind in _PAIRS:
        rules += [
            Rule(f"{part}.norm_in.{kind}", f"{part}.ln_pre.{kind}"),
            Rule(f"{part}.norm_out.{kind}", f"{part}.ln_post.{kind}"),
            Rule(f"{ours}.norm1.{kind}", f"{theirs}.ln_1.{kind}"),
            Rule(f"{ours}.norm2.{kind}", f"{theirs}.ln_2.{kind}"),
            Rule(f"{ours}.mlp_in.{kind}", f"{theirs}.mlp.c_fc.{kind}"),
            Rule(f"{ours}.mlp_out.{kind}", f"{theirs}.mlp.c_proj.{kind}"),
        ]
    return rules


def _as_flag(stored: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
    return stored.reshape(()).bool(), embed


def _as_float(flag: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
    return flag.reshape(1).to(embed.dtype), embed


RULES: tuple[Rule, ...] = (
    Rule("mean", "mean"),
    Rule("std", "std"),
    Rule("encoder.iframe_queries", "encoder.IFrame_latent_tokens"),
    Rule("encoder.pframe_queries", "encoder.PFrame_latent_tokens"),
    # Ours is a linear layer, theirs a 1x1 convolution.
    Rule(
        "encoder.embed.weight",
        "encoder.patch_embed.weight",
        to_theirs=lambda weight: (weight[:, :, None, None],),
        to_ours=lambda weight: (weight[:, :, 0, 0],),
    ),
    Rule("encoder.embed.bias", "encoder.patch_embed.bias"),
    Rule("decoder.mask_token", "decoder.mask_token"),
    *(
        Rule(f"{ours}.{kind}", f"{theirs}.{kind}")
        for ours, theirs in (
            ("encoder.head", "encoder.proj_out"),
            ("decoder.embed", "decoder.decoder_embed"),
            ("decoder.head_in", "decoder.ffn.0"),
            ("decoder.head_out", "decoder.ffn.2"),
            ("quantizer.project_in", "quantizer.project_in"),
            ("quantizer.project_out", "quantizer.project_out"),
        )
        for kind in _PAIRS
    ),
    *_stack_rules("encoder"),
    *_stack_rules("decoder"),
    # The release stores the flag as a float [1], in the dtype of the file; newer versions of the library hold a bool scalar.
    Rule(
        ("quantizer._codebook.initted", "quantizer._codebook.embed"),
        ("quantizer._codebook.initted", "quantizer._codebook.embed"),
        to_theirs=_as_float,
        to_ours=_as_flag,
    ),
    *(
        Rule(f"quantizer._codebook.{name}", f"quantizer._codebook.{name}")
        for name in ("cluster_size", "embed_avg")
    ),
)
