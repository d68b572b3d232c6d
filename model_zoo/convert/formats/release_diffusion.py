"""Our diffusion model <-> the release's DeepSpeed/SAT files, as flat dicts of tensors.

`split` sorts a loaded file into main transformer, control branch with semantic condition, and the tokenizer copy
that the release keeps inside the condition. The fixed position tables are dropped on the way in and computed
again on the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from landiff.model_zoo.config import DiffusionConfig, TransformerConfig
from landiff.model_zoo.convert.rules import Rule, apply_rules
from landiff.model_zoo.dit import position_table

MAIN = "model.main_model.diffusion_model."
CONTROL = "model.control_model.diffusion_model."
COGVIDEOX = (
    "model.diffusion_model."  # the public CogVideoX-2B file, which holds the main transformer alone
)
SEMANTIC = CONTROL + "semantic_conditioner."
TOKENIZER = SEMANTIC + "semantic_model.model."
POSITION_TABLE = "mixins.pos_embed.pos_embedding"
OTHER_MODELS = ("conditioner.", "first_stage_model.")  # T5 and the VAE, which some files also hold

_KINDS = ("weight", "bias")


def _transformer_rules(ours: str, theirs: str) -> list[Rule]:
    """What main transformer and control branch share."""
    block, layer, mixins = (
        f"{ours}blocks.{{i}}",
        f"{theirs}transformer.layers.{{i}}",
        f"{theirs}mixins.",
    )
    names = {
        f"{ours}input.patch": f"{mixins}patch_embed.proj",
        f"{ours}input.text": f"{mixins}patch_embed.text_proj",
        f"{ours}input.time_in": f"{theirs}time_embed.0",
        f"{ours}input.time_out": f"{theirs}time_embed.2",
        f"{ours}final_norm": f"{theirs}transformer.final_layernorm",
        f"{block}.modulation": f"{mixins}adaln_layer.adaLN_modulations.{{i}}.1",
        f"{block}.query_norm": f"{mixins}adaln_layer.query_layernorm_list.{{i}}",
        f"{block}.key_norm": f"{mixins}adaln_layer.key_layernorm_list.{{i}}",
        f"{block}.norm1": f"{layer}.input_layernorm",
        f"{block}.norm2": f"{layer}.post_attention_layernorm",
        f"{block}.qkv": f"{layer}.attention.query_key_value",
        f"{block}.out": f"{layer}.attention.dense",
        f"{block}.mlp_in": f"{layer}.mlp.dense_h_to_4h",
        f"{block}.mlp_out": f"{layer}.mlp.dense_4h_to_h",
    }
    return [Rule(f"{a}.{kind}", f"{b}.{kind}") for a, b in names.items() for kind in _KINDS]


def main_rules(ours: str = "transformer.", theirs: str = MAIN) -> list[Rule]:
    """Main transformer; `ours` = "" for a DiffusionTransformer by itself, `theirs` = COGVIDEOX for CogVideoX-2B."""
    output = {
        f"{ours}output.norm": f"{theirs}mixins.final_layer.norm_final",
        f"{ours}output.modulation": f"{theirs}mixins.final_layer.adaLN_modulation.1",
        f"{ours}output.linear": f"{theirs}mixins.final_layer.linear",
    }
    extra = [Rule(f"{a}.{kind}", f"{b}.{kind}") for a, b in output.items() for kind in _KINDS]
    return _transformer_rules(ours, theirs) + extra


def semantic_rules(ours: str = "semantic.", theirs: str = SEMANTIC) -> list[Rule]:
    """Upsampler and projection of the semantic condition."""
    upsampler = f"{theirs}upsample_model."
    names = {
        f"{ours}projection": f"{theirs}conv_out",
        f"{ours}conv_in": f"{upsampler}conv_in",
        f"{ours}norm_out": f"{upsampler}norm_out",
        f"{ours}conv_out": f"{upsampler}conv_out",
        f"{ours}levels.{{i}}.upsample": f"{upsampler}up.{{i}}.upsample.conv",
    }
    blocks = {
        f"{ours}middle.0": f"{upsampler}mid.block_1",
        f"{ours}middle.1": f"{upsampler}mid.block_2",
        f"{ours}levels.{{i}}.blocks.{{j}}": f"{upsampler}up.{{i}}.block.{{j}}",
    }
    inside = {
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "nin_shortcut",
    }
    names |= {f"{a}.{x}": f"{b}.{y}" for a, b in blocks.items() for x, y in inside.items()}
    return [Rule(f"{a}.{kind}", f"{b}.{kind}") for a, b in names.items() for kind in _KINDS]


def control_rules(ours: str = "control.", theirs: str = CONTROL) -> list[Rule]:
    zero = Rule(
        f"{ours}projections.{{i}}.weight", f"{theirs}mixins.adaln_layer.zero_linears.{{i}}.weight"
    )
    return [*_transformer_rules(ours, theirs), zero]


def diffusion_rules() -> list[Rule]:
    """A whole ControlledDiffusion."""
    return [*main_rules(), *control_rules(), *semantic_rules()]


@dataclass(frozen=True)
class ReleaseParts:
    """Tensors of one release file under the release's names, the position tables left out."""

    main: dict[str, Tensor]  # empty where the file does not hold the frozen main transformer
    control: dict[str, Tensor]  # with the semantic condition
    tokenizer: dict[str, Tensor]  # under the names of tokenizer/model.safetensors


def split(state: Mapping[str, Tensor | None]) -> ReleaseParts:
    """Sort a release file. Frozen weights that were saved as None and the other models' weights are passed over;
    any other name lands in `control`, where the conversion reports it."""
    parts = ReleaseParts({}, {}, {})
    for name, tensor in state.items():
        if tensor is None or name.startswith(OTHER_MODELS) or name.endswith(POSITION_TABLE):
            continue
        if name.startswith(TOKENIZER):
            parts.tokenizer[name.removeprefix(TOKENIZER)] = tensor
        elif name.startswith(MAIN):
            parts.main[name] = tensor
        else:
            parts.control[name] = tensor
    return parts


def from_release(state: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Our names for main transformer (where present), control branch and semantic condition."""
    parts = split(state)
    return apply_rules({**parts.main, **parts.control}, diffusion_rules(), "to_ours")


def diffusion_to_release(state: Mapping[str, Tensor], config: DiffusionConfig) -> dict[str, Tensor]:
    """The release's names for a ControlledDiffusion, position tables included, without a tokenizer copy."""
    table = release_position_table(config.transformer)
    tables = {MAIN + POSITION_TABLE: table, CONTROL + POSITION_TABLE: table.clone()}
    return {**tables, **apply_rules(state, diffusion_rules(), "to_theirs")}


def cogvideox_from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DiffusionTransformer's weights from the public CogVideoX-2B file (`transformer/1000/...`, `module`)."""
    kept = {
        k: v for k, v in state.items() if k.startswith(COGVIDEOX) and not k.endswith(POSITION_TABLE)
    }
    return apply_rules(kept, main_rules("", COGVIDEOX), "to_ours")


def cogvideox_to_release(
    state: Mapping[str, Tensor], config: TransformerConfig
) -> dict[str, Tensor]:
    table = {COGVIDEOX + POSITION_TABLE: release_position_table(config)}
    return {**table, **apply_rules(state, main_rules("", COGVIDEOX), "to_theirs")}


def release_position_table(config: TransformerConfig) -> Tensor:
    """float32 [1, text_length + video tokens, hidden_size]; zeros for the text."""
    rows, columns = (
        config.latent_height // config.patch_size,
        config.latent_width // config.patch_size,
    )
    table = position_table(
        config.latent_frames, rows, columns, config.hidden_size, config.spatial_interpolation
    )
    text = torch.zeros(config.text_length, config.hidden_size)
    return torch.cat([text, table.flatten(0, 2)])[None]
