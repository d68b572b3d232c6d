"""Prompts, seeds, lengths and callbacks from the arguments of a `LanDiffPipeline` call.

Shape letters (docs/glossary.md): B batch, T latent frames, C channels, H, W height and width of
latents, h, w height and width in feature cells, L text rows, D width of text states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from landiff.model_zoo.diffusers.outputs import OUTPUTS
from landiff.model_zoo.frozen.cogvideox_vae import CogVideoXCodec
from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.latents import OnStep, SamplerStep, latent_shape
from landiff.model_zoo.sample.sizes import stream_lengths

# A seed of torch.Generator can be up to twice as large, and later chunks count on from a seed.
LARGEST_SEED = 1 << 63

# callback(pipe, step, timestep, {"latents": ...}) returns {} or {"latents": replacement}.
Callback = Callable[[Any, int, int, dict[str, Tensor]], dict[str, Tensor] | None]
TENSOR_INPUTS = ("latents",)
"""Tensors that a callback may receive."""


def check_arguments(num_videos_per_prompt: int, output_type: str) -> None:
    """Raises ValueError for arguments of a call that are wrong whatever the models are."""
    if num_videos_per_prompt < 1:
        raise ValueError(f"num_videos_per_prompt = {num_videos_per_prompt} must be at least 1")
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type = {output_type!r} must be one of {', '.join(OUTPUTS)}")


def on_step_of(pipeline: Any, callback: Callback | None, names: Sequence[str]) -> OnStep:
    """Wraps the callback of a call as the sampler calls it.

    names: the tensors that it receives. Raises ValueError for others than `TENSOR_INPUTS`.
    """
    unknown = sorted(set(names) - set(TENSOR_INPUTS))
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs may hold {', '.join(TENSOR_INPUTS)}, not {unknown}"
        )

    def on_step(step: SamplerStep) -> Tensor | None:
        if callback is None:
            return None
        inputs = {}
        if "latents" in names:
            inputs["latents"] = step.state
        changed = callback(pipeline, step.step, step.timestep, inputs) or {}
        return changed.get("latents")

    return on_step


def seeds_of(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[int]:
    """Seeds of the videos of a batch.

    Raises ValueError for several generators whose number is not the size of the batch.
    """
    if generator is None:
        return torch.randint(0, 1 << 31, (batch,)).tolist()
    if isinstance(generator, torch.Generator):
        first = generator.initial_seed()
        return [(first + 1000 * index) % LARGEST_SEED for index in range(batch)]
    if len(generator) != batch:
        raise ValueError(
            f"{len(generator)} generators for {batch} prompts; give one, or one for each"
        )
    return [one.initial_seed() % LARGEST_SEED for one in generator]


def repeated(prompt: str | Sequence[str], count: int) -> list[str]:
    """A list with each prompt `count` times in a row."""
    if isinstance(prompt, str):
        return [prompt] * count
    repeated: list[str] = []
    for one in prompt:
        repeated += [one] * count
    return repeated


def negatives_of(
    negative: str | Sequence[str] | None, prompt: str | Sequence[str], count: int
) -> list[str] | None:
    """The negative prompt of each video of a batch with `count` videos of each prompt.

    Raises ValueError for a list whose length is not the number of prompts.
    """
    if negative is None:
        return None
    num_prompts = 1 if isinstance(prompt, str) else len(prompt)
    if isinstance(negative, str):
        return [negative] * num_prompts * count
    if len(negative) != num_prompts:
        raise ValueError(
            f"{len(negative)} negative prompts for {num_prompts} prompts; give one text for all, "
            "or one for each"
        )
    return repeated(negative, count)


def latent_frames_of(num_frames: int, models: Models, clean_frames: int) -> int:
    """Latent frames of a video.

    Raises ValueError for a number of frames that the codec or whole chunks do not give.
    """
    factor = models.codec.time
    step = factor
    if isinstance(models.codec, CogVideoXCodec):
        step = 2 * factor
    if num_frames < 1 or (num_frames - 1) % step:
        raise ValueError(
            f"num_frames = {num_frames} must be 1 + {step} * k: the codec {models.codec.name} "
            "decodes to no other number of frames"
        )
    num_latent_frames = 1 + (num_frames - 1) // factor
    window = models.diffusion.config.transformer.latent_frames
    shorter, longer = stream_lengths(num_latent_frames, window, clean_frames)
    if shorter != num_latent_frames:
        raise ValueError(
            f"num_frames = {num_frames} is no whole number of chunks; the nearest that are: "
            f"{1 + (shorter - 1) * factor} and {1 + (longer - 1) * factor}"
        )
    return num_latent_frames


def check_start(
    start_BTCHW: Tensor, models: Models, text_BLD: Tensor, features_BTChw: Tensor
) -> None:
    """Raises ValueError for start noise that does not fit the video, or a video of many chunks."""
    expected = latent_shape(models.diffusion, text_BLD, features_BTChw)
    window = models.diffusion.config.transformer.latent_frames
    if tuple(start_BTCHW.shape) != expected or expected[1] > window:
        raise ValueError(
            f"latents of shape {list(start_BTCHW.shape)} do not fit a video of one chunk, "
            f"{list(expected)}"
        )
