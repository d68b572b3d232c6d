"""The released VAE (3d-vae.pt of CogVideoX-2b-sat) and `AutoencoderKLCogVideoX` of diffusers.

See docs/specification.md §6.3. "Ours" are the names of diffusers, whose class we run. All rules are
renames. The levels of the decoder count in the opposite order: `.up.i.` is
`.up_blocks.(levels - 1 - i).`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landiff.model_zoo.convert.lazy import load_safetensors
from landiff.model_zoo.convert.rules import ConversionError, Rule, apply_rules

# Layers of a ResNet block that have the same names on both sides.
_BLOCK_LAYERS = ("norm1", "conv1", "norm2", "conv2")


def release_vae_rules(levels: int) -> list[Rule]:
    """The rules for an autoencoder with `levels` resolutions (4 in the release)."""
    rules = []
    for side in ("encoder", "decoder"):
        for layer in ("conv_in", "norm_out", "conv_out"):
            rules.append(_rename(f"{side}.{layer}", f"{side}.{layer}"))
    for side in ("encoder", "decoder"):
        for i in (0, 1):
            rules += _resnet(f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}")
    for i in range(levels):
        rules += _level(f"encoder.down_blocks.{i}", f"encoder.down.{i}", "downsample")
        rules += _level(f"decoder.up_blocks.{levels - 1 - i}", f"decoder.up.{i}", "upsample")
    return rules


def _level(ours: str, theirs: str, resample: str) -> list[Rule]:
    """One resolution: its ResNet blocks and the layer that changes the resolution."""
    return [
        *_resnet(f"{ours}.resnets.{{j}}", f"{theirs}.block.{{j}}"),
        _rename(f"{ours}.resnets.{{j}}.conv_shortcut", f"{theirs}.block.{{j}}.nin_shortcut"),
        _rename(f"{ours}.{resample}rs.0", f"{theirs}.{resample}"),
    ]


def _resnet(ours: str, theirs: str) -> list[Rule]:
    """The layers of a ResNet block that both sides call the same."""
    return [_rename(f"{ours}.{layer}", f"{theirs}.{layer}") for layer in _BLOCK_LAYERS]


def _rename(ours: str, theirs: str) -> Rule:
    """All tensors below a name."""
    return Rule(f"{ours}.{{rest*}}", f"{theirs}.{{rest*}}")


def num_levels(state: Mapping[str, Any]) -> int:
    """The number of resolutions, from the keys of the release or of diffusers."""
    for prefix in ("encoder.down.", "encoder.down_blocks."):
        levels = {int(name.split(".")[2]) for name in state if name.startswith(prefix)}
        if levels:
            return max(levels) + 1
    raise ConversionError(
        "no key starts with encoder.down. or encoder.down_blocks.: this is no CogVideoX VAE"
    )


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the release -> keys of diffusers. `loss*` is dropped.

    Raises ConversionError for unknown keys.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("loss")}
    return apply_rules(kept, release_vae_rules(num_levels(kept)), "to_ours")


def vae_to_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of diffusers -> keys of the release."""
    return apply_rules(state, release_vae_rules(num_levels(state)), "to_theirs")


def read_release(path: Path) -> dict[str, Tensor]:
    """The tensors of 3d-vae.pt (a dict with `state_dict`) or of an equivalent .safetensors file."""
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content.get("state_dict", content)
