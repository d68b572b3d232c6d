"""Sampling steps/s of the main transformer against diffusers' CogVideoXPipeline.

    python -m benchmarks.sample_dit
    python -m benchmarks.sample_dit --preset landiff --steps 2 --precision bf16

Both sides have the same sizes, weights, text, steps and guidance with DDIM, start from noise and
end with latents, so that their work is equal. They sample in turns; the table shows medians. The
largest difference of their latents is printed with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.support.models import (
    PRESETS,
    default_precision,
    device_name,
    dtype_of,
    load_preset,
    timed,
)
from landiff.model_zoo.config import ScheduleConfig
from landiff.model_zoo.convert.formats.diffusers_transformer import (
    OUTPUT_NORM_EPS,
    RULES,
    diffusers_config,
)
from landiff.model_zoo.convert.rules import apply_rules
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.dit import DiffusionTransformer
from landiff.model_zoo.frozen.checks import TIME
from landiff.model_zoo.frozen.clip_shape import LATENT_CELL
from landiff.model_zoo.sample.latents import SamplerOptions, sample_main_latents
from landiff.model_zoo.schedule import NoiseSchedule

GUIDANCE = 6.0
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
"""Noise schedule of CogVideoX-2B."""


def ours(
    model: DiffusionTransformer, text_BLD: Tensor, noise: Tensor, steps: int
) -> Callable[[], Tensor]:
    """Sampling by this project."""
    schedule = NoiseSchedule(ScheduleConfig())
    options = SamplerOptions(
        num_steps=steps, guidance=GUIDANCE - 1, dynamic="constant", solver="ddim"
    )

    def sample() -> Tensor:
        return sample_main_latents(
            model, schedule, text_BLD, lambda _step, _shape: noise, options=options
        )

    return sample


def theirs(
    model: DiffusionTransformer, text_BLD: Tensor, noise: Tensor, steps: int
) -> Callable[[], Tensor]:
    """Sampling by diffusers with the same weights."""
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    sizes = model.config
    transformer = CogVideoXTransformer3DModel(**diffusers_config(sizes))
    state = apply_rules(model.state_dict(), RULES, "to_theirs")
    transformer.load_state_dict(state, strict=False)  # its position table is computed
    transformer.norm_out.norm.eps = OUTPUT_NORM_EPS
    transformer = transformer.to(text_BLD.device, model.dtype).eval()
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> Tensor:
        return pipeline(
            prompt_embeds=text_BLD.to(model.dtype),
            negative_prompt_embeds=torch.zeros_like(text_BLD, dtype=model.dtype),
            height=LATENT_CELL * sizes.latent_height,
            width=LATENT_CELL * sizes.latent_width,
            num_frames=1 + TIME * (sizes.latent_frames - 1),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            latents=noise,
            output_type="latent",
        ).frames

    return sample


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="10m", help=PRESETS)
    parser.add_argument("--steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--rounds", type=int, default=5, help="samplings of each side")
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    args = parser.parse_args()
    device = pick_device("auto")
    precision = args.precision or default_precision(device)
    sizes = load_preset(args.preset).diffusion.transformer
    torch.manual_seed(0)
    model = DiffusionTransformer(sizes)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # layers that start at zero too
    model = model.to(device, dtype_of(precision)).eval()
    shape = (sizes.latent_frames, sizes.latent_channels, sizes.latent_height, sizes.latent_width)
    noise = torch.randn(1, *shape).to(device)
    text_BLD = torch.randn(1, sizes.text_length, sizes.text_dim).to(device, model.dtype)
    sides = {
        "ours": ours(model, text_BLD, noise, args.steps),
        "diffusers": theirs(model, text_BLD, noise.to(model.dtype), args.steps),
    }
    results = {name: sample().float() for name, sample in sides.items()}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, sample in sides.items():
            seconds[name].append(timed(sample, device))
    rates = {name: args.steps / median(values) for name, values in seconds.items()}
    difference = (results["ours"] - results["diffusers"]).abs().max()
    scale = results["diffusers"].abs().max()
    print(f"{args.preset}, {precision}, {device_name(device)}, {args.steps} steps with guidance")
    for name, rate in rates.items():
        print(f"{name:<12}{rate:>8.2f} steps/s")
    print(f"ratio {rates['ours'] / rates['diffusers']:.2f}x, goal 1.0x")
    print(f"largest difference of the latents {difference:.2g}, largest latent {scale:.2g}")


if __name__ == "__main__":
    main()
