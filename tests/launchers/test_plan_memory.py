"""`landiff plan`: activations at real widths and lengths, compared with a trace of the models.

The traces run with tensors that have no data. All sizes but the number of layers are real ones.
"""

from __future__ import annotations

import pytest
import torch

from landiff.configs import load
from landiff.launchers.budget.models import make_plan
from landiff.launchers.budget.precompute import vae_flops
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.model import freeze_main
from landiff.training.tokenizer.config import TokenizerTrainConfig
from tests.launchers.tracing import fake_mode, kept_bytes, make_fake

WITHIN = 0.1
LAYERS = 4


@pytest.mark.parametrize(("recompute", "offload"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("phase", ["main", "control"])
def test_activations_of_the_diffusion_model(phase, recompute, offload):
    overrides = [f"model.transformer.num_layers={LAYERS}", f"recompute={str(recompute).lower()}"]
    overrides += [f"offload_activations={str(offload).lower()}"]
    overrides += [f"model.control_layers={LAYERS // 2}"]
    config = load(DiffusionTrainConfig, f"landiff/diffusion-{phase}", overrides)
    sizes = config.model.transformer
    module: DiffusionTransformer | ControlledDiffusion
    with torch.device("meta"):
        if phase == "control":
            module = ControlledDiffusion(config.model)
            freeze_main(module)
        else:
            module = DiffusionTransformer(sizes)
    planned = make_plan(config, 8).memory["activations"]
    with fake_mode():
        make_fake(module, torch.bfloat16)
        grid = (sizes.latent_height, sizes.latent_width)
        inputs = [
            torch.empty(1, sizes.latent_frames, sizes.latent_channels, *grid),
            torch.zeros(1, dtype=torch.int64),
            torch.empty(1, sizes.text_length, sizes.text_dim),
        ]
        if isinstance(module, ControlledDiffusion):
            scale = module.semantic.scale
            channels = config.model.semantic.feature_channels
            cells = [side // scale for side in grid]
            inputs.append(torch.empty(1, sizes.latent_frames, channels, *cells))
        if recompute:
            # Beside the inputs of all blocks, one block has all its activations in the backward.
            module.recompute = True
            module.keep_inputs_on_host = offload
            kept = kept_bytes(module, lambda: module(*inputs))
            kept += one_block(config, phase)
        else:
            kept = kept_bytes(module, lambda: module(*inputs))
    assert planned == pytest.approx(kept, rel=WITHIN)


def one_block(config: DiffusionTrainConfig, phase: str) -> int:
    """What one trained block more keeps, by the plan, which the test without recompute checks."""
    sizes = []
    for layers in (LAYERS, LAYERS // 2):
        model = config.model.model_copy(
            update={
                "control_layers": layers if phase == "control" else 0,
                "transformer": config.model.transformer.model_copy(
                    update={"num_layers": LAYERS if phase == "control" else layers}
                ),
            }
        )
        changed = config.model_copy(update={"model": model, "recompute": False})
        sizes.append(make_plan(changed, 8).memory["activations"])
    return (sizes[0] - sizes[1]) // (LAYERS // 2)


def test_activations_of_the_tokenizer():
    """In float32: autocast on the CPU treats norms differently from CUDA."""
    overrides = [f"model.num_layers={LAYERS}", "recompute=false", "precision=fp32"]
    config = load(TokenizerTrainConfig, "landiff/tokenizer", overrides)
    sizes = config.model
    with torch.device("meta"):
        module = SemanticTokenizer(sizes)
    planned = make_plan(config, 1).memory["activations"]
    with fake_mode():
        make_fake(module, torch.float32)
        frames = sizes.segment_frames
        grid = (sizes.grid_height, sizes.grid_width)
        features = torch.empty(1, frames, sizes.feature_channels, *grid)
        kept = kept_bytes(module, lambda: module.encode_latents(features))
        codes = sizes.iframe_tokens + (frames - 1) * sizes.pframe_tokens
        latents = torch.empty(1, codes, sizes.token_size)
        kept += kept_bytes(module, lambda: module.decode_latents(latents, frames))
    assert planned == pytest.approx(kept, rel=WITHIN)


@pytest.mark.long
def test_flops_of_the_vae_are_those_of_its_convolutions():
    from diffusers import AutoencoderKLCogVideoX
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(128, 256, 256, 512),
            latent_channels=16,
            layers_per_block=3,
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encoder(torch.empty(1, 3, 49, 480, 720))
    assert vae_flops(ClipShape(49, 480, 720)) == pytest.approx(counter.get_total_flops(), rel=0.05)
