"""Released VAE (3d-vae.pt of CogVideoX-2b-sat) <-> diffusers `AutoencoderKLCogVideoX` (specification §6.3).

"Ours" is the diffusers side, since that is the model we run. Every rule is a rename: no tensor changes. The
decoder's levels count the other way round: `.up.i.` is `.up_blocks.(levels - 1 - i).`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landiff.model_zoo.convert.lazy import load_safetensors
from landiff.model_zoo.convert.rules import ConversionError, Rule, apply_rules

# parts of a ResNet block whose names are the same on both sides
_BLOCK_PARTS = ("norm1", "conv1", "norm2", "conv2")


def release_vae_rules(levels: int) -> list[Rule]:
    """The table for an auto-encoder of `levels` resolutions (four in the release)."""
    table = [
        Rule(f"{side}.{part}.{{rest*}}", f"{side}.{part}.{{rest*}}")
        for side in ("encoder", "decoder")
        for part in ("conv_in", "norm_out", "conv_out")
    ]
    for side in ("encoder", "decoder"):
        table += [
            _resnet(f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}", part)
            for i in (0, 1)
            for part in _BLOCK_PARTS
        ]
    for i in range(levels):
        for ours, theirs, resample in (
            (f"encoder.down_blocks.{i}", f"encoder.down.{i}", "downsample"),
            (f"decoder.up_blocks.{levels - 1 - i}", f"decoder.up.{i}", "upsample"),
        ):
            table += [
                _resnet(f"{ours}.resnets.{{j}}", f"{theirs}.block.{{j}}", part)
                for part in _BLOCK_PARTS
            ]
            table.append(
                Rule(
                    f"{ours}.resnets.{{j}}.conv_shortcut.{{rest*}}",
                    f"{theirs}.block.{{j}}.nin_shortcut.{{rest*}}",
                )
            )
            table.append(Rule(f"{ours}.{resample}rs.0.{{rest*}}", f"{theirs}.{resample}.{{rest*}}"))
    return table


def _resnet(ours: str, theirs: str, part: str) -> Rule:
    return Rule(f"{ours}.{part}.{{rest*}}", f"{theirs}.{part}.{{rest*}}")


def num_levels(state: Mapping[str, Any]) -> int:
    """Resolutions of a release state dict, or of a diffusers one."""
    for prefix in ("encoder.down.", "encoder.down_blocks."):
        found = {int(k.split(".")[2]) for k in state if k.startswith(prefix)}
        if found:
            return max(found) + 1
    raise ConversionError(
        "no key starts with encoder.down. or encoder.down_blocks.: this is no CogVideoX VAE"
    )


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Release keys -> diffusers keys; `loss*` is dropped. Raises ConversionError for keys no rule knows."""
    kept = {k: v for k, v in state.items() if not k.startswith("loss")}
    return apply_rules(kept, release_vae_rules(num_levels(kept)), "to_ours")


def vae_to_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers keys -> release keys."""
    return apply_rules(state, release_vae_rules(num_levels(state)), "to_theirs")


def read_release(path: Path) -> dict[str, Tensor]:
    """The tensors of 3d-vae.pt (a dict with `state_dict`) or of a .safetensors file with the same keys."""
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content.get("state_dict", content)
