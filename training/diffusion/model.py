"""The module that a phase trains, with its start and what of it stays frozen."""

from __future__ import annotations

import torch
from torch import nn

from landiff.model_zoo import registry
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.training import rng
from landiff.training.diffusion.config import DiffusionTrainConfig


def build_phase_model(config: DiffusionTrainConfig) -> nn.Module:
    """float32, whole on the CPU of each rank (8 GB at paper size; ZeRO cuts it afterwards).

    Phase main: the main transformer. Phase control: everything, main frozen.

    The weights are a function of loop.seed and `init_from`. In phase control the branch starts as a copy of the
    first main blocks, and with its zero projections changes nothing yet. Raises ZooError.
    """
    kind = "transformer" if config.phase == "main" else "diffusion"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(config.loop.seed, "weights", config.phase == "control"))
        model = registry.build_module(
            kind, config.model.transformer if config.phase == "main" else config.model
        )
    model.recompute = config.recompute
    if config.init_from is not None:
        entry = registry.resolve(config.zoo, config.init_from, kind="transformer")
        main = model if config.phase == "main" else model.transformer
        main.load_state_dict(entry.load(), strict=True)
    if config.phase == "control":
        model.copy_main_to_control()
        freeze_main(model)
    return model


def freeze_main(model: ControlledDiffusion) -> None:
    """What phase control leaves as it is (§5.4)."""
    model.transformer.requires_grad_(False)
    model.control.final_norm.requires_grad_(
        False
    )  # influences nothing; ZeRO would let weight decay shrink it


def load_tokenizer(config: DiffusionTrainConfig, device: torch.device) -> nn.Module | None:
    """The frozen tokenizer of phase control, its layers in the working dtype (§3.10); None in phase main."""
    if config.phase == "main":
        return None
    entry = registry.resolve(config.zoo, config.tokenizer, kind="tokenizer")
    return registry.load_model(
        entry, device, torch.bfloat16 if config.precision == "bf16" else None
    )
