"""Our diffusion model and the DeepSpeed/SAT files of the release, as flat dicts of tensors.

`split` divides a loaded file into main transformer, control branch with semantic condition, and the
copy of the tokenizer that the release keeps in the semantic condition. The fixed position tables
are dropped when reading and computed again when writing.
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
# The public CogVideoX-2B file, which holds only the main transformer.
COGVIDEOX = "model.diffusion_model."
SEMANTIC = CONTROL + "semantic_conditioner."
TOKENIZER = SEMANTIC + "semantic_model.model."
POSITION_TABLE = "mixins.pos_embed.pos_embedding"
# T5 and the VAE, which some files also hold.
OTHER_MODELS = ("conditioner.", "first_stage_model.")

_KINDS = ("weight", "bias")


def _renames(names: Mapping[str, str]) -> list[Rule]:
    """Rules that rename weight and bias of layers, given as ours -> theirs."""
    rules = []
    for ours, theirs in names.items():
        rules += [Rule(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in _KINDS]
    return rules


def _transformer_rules(ours: str, theirs: str) -> list[Rule]:
    """The layers that main transformer and control branch have in common."""
    block = f"{ours}blocks.{{i}}"
    layer = f"{theirs}transformer.layers.{{i}}"
    mixins = f"{theirs}mixins."
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
    return _renames(names)


def main_rules(ours: str = "transformer.", theirs: str = MAIN) -> list[Rule]:
    """The main transformer.

    `ours` is "" for a DiffusionTransformer by itself; `theirs` is COGVIDEOX for CogVideoX-2B.
    """
    output = {
        f"{ours}output.norm": f"{theirs}mixins.final_layer.norm_final",
        f"{ours}output.modulation": f"{theirs}mixins.final_layer.adaLN_modulation.1",
        f"{ours}output.linear": f"{theirs}mixins.final_layer.linear",
    }
    return _transformer_rules(ours, theirs) + _renames(output)


def semantic_rules(ours: str = "semantic.", theirs: str = SEMANTIC) -> list[Rule]:
    """The upsampler and the projection of the semantic condition."""
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
    layers = {
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "nin_shortcut",
    }
    for our_block, their_block in blocks.items():
        for our_layer, their_layer in layers.items():
            names[f"{our_block}.{our_layer}"] = f"{their_block}.{their_layer}"
    return _renames(names)


def control_rules(ours: str = "control.", theirs: str = CONTROL) -> list[Rule]:
    """The control branch, without the semantic condition."""
    zero = Rule(
        f"{ours}projections.{{i}}.weight", f"{theirs}mixins.adaln_layer.zero_linears.{{i}}.weight"
    )
    return [*_transformer_rules(ours, theirs), zero]


def diffusion_rules() -> list[Rule]:
    """A whole ControlledDiffusion, in the names of a file with both transformers."""
    return [*main_rules(), *control_rules(), *semantic_rules()]


@dataclass(frozen=True)
class ReleaseParts:
    """The tensors of one release file under its names, without position tables."""

    main: dict[str, Tensor]  # empty if the file does not hold the frozen main transformer
    control: dict[str, Tensor]  # with the semantic condition
    tokenizer: dict[str, Tensor]  # under the names of tokenizer/model.safetensors


def split(state: Mapping[str, Tensor | None]) -> ReleaseParts:
    """Divide the tensors of a release file.

    Frozen weights that were saved as None and weights of other models are ignored. All remaining
    names are put into `control`, where the conversion reports unknown ones.
    """
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
    """Main transformer (if present), control branch and semantic condition under our names."""
    parts = split(state)
    return apply_rules({**parts.main, **parts.control}, diffusion_rules(), "to_ours")


def diffusion_to_release(state: Mapping[str, Tensor], config: DiffusionConfig) -> dict[str, Tensor]:
    """A ControlledDiffusion under the names of the release.

    With position tables, without a copy of the tokenizer.
    """
    table = release_position_table(config.transformer)
    tables = {MAIN + POSITION_TABLE: table, CONTROL + POSITION_TABLE: table.clone()}
    return {**tables, **apply_rules(state, diffusion_rules(), "to_theirs")}


def cogvideox_from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a DiffusionTransformer from the entry `module` of the CogVideoX-2B file."""
    kept = {}
    for name, tensor in state.items():
        if name.startswith(COGVIDEOX) and not name.endswith(POSITION_TABLE):
            kept[name] = tensor
    return apply_rules(kept, main_rules("", COGVIDEOX), "to_ours")


def cogvideox_to_release(
    state: Mapping[str, Tensor], config: TransformerConfig
) -> dict[str, Tensor]:
    """A DiffusionTransformer under the names of the CogVideoX-2B file, with position table."""
    table = {COGVIDEOX + POSITION_TABLE: release_position_table(config)}
    return {**table, **apply_rules(state, main_rules("", COGVIDEOX), "to_theirs")}


def release_position_table(config: TransformerConfig) -> Tensor:
    """The position table as float32 [1, text_length + video tokens, hidden_size].

    The rows of the text are zero.
    """
    rows = config.latent_height // config.patch_size
    columns = config.latent_width // config.patch_size
    table = position_table(
        config.latent_frames, rows, columns, config.hidden_size, config.spatial_interpolation
    )
    text = torch.zeros(config.text_length, config.hidden_size)
    return torch.cat([text, table.flatten(0, 2)])[None]
