"""What the diffusion model makes of a clip, as videos for TensorBoard.

Shape letters (docs/glossary.md): B = 1 clip, T latent frames, C latent channels, H W latent height
and width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from landiff.data_pipeline.loading.loader import Sample
from landiff.model_zoo import keyed_random
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.frozen import build
from landiff.model_zoo.sample.latents import (
    SamplerOptions,
    sample_latents,
    sample_main_latents,
    seeded_noise,
)
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.step import Inputs, Objective
from landiff.training.diffusion.validation import fixed_inputs, fixed_noise
from landiff.training.observe.previews import Preview

TIMESTEP_FRACTION = 0.5  # of the schedule, for the one-step estimate
PREVIEW_SEED = 0  # of the noise, instead of loop.seed: previews of different runs can be compared


class Previewer:
    """Computes previews.

    Collective: with ZeRO-3 every forward gathers parameters, so all ranks must run it, each on a
    clip of its own.
    """

    def __init__(self, config: DiffusionTrainConfig, objective: Objective) -> None:
        """`config.preview_codec` must be set."""
        assert config.preview_codec is not None
        self.config = config
        self.objective = objective
        self.codec = build(config.preview_codec, objective.device)

    @torch.no_grad()
    def __call__(self, model: nn.Module, sample: Sample, tag: str) -> Preview:
        """The clip as the codec returns it, and what the model makes of it.

        At the middle timestep: the clip with noise, and the one-step estimate of the clip. From
        pure noise: a sample with the clip's text, and in phase control with its tokens, without
        guidance.
        """
        inputs = self._inputs(sample)
        model.eval()
        noised, estimate = self._denoise(model, inputs)
        sampled = self._sample(model, inputs, sample.key)
        model.train()
        return Preview(
            tag=tag,
            panels={
                "codec round trip": self._decode(inputs.latents_BTCHW),
                f"with noise, t = {int(inputs.timestep_B)}": self._decode(noised),
                "one-step estimate": self._decode(estimate),
                "sample from noise": self._decode(sampled),
            },
            text=sample.meta.caption,
        )

    def _sample(self, model: nn.Module, inputs: Inputs, key: str) -> Tensor:
        """Latents from the text, and from the features in phase control. `key` fixes the noise."""
        noise = seeded_noise([keyed_random.key(PREVIEW_SEED, "preview", key)])
        options = SamplerOptions(num_steps=self.config.preview_steps, guidance=0.0)
        schedule = self.objective.schedule
        if inputs.features_BTchw is None:
            assert isinstance(model, DiffusionTransformer), type(model)
            frames, _, height, width = inputs.latents_BTCHW.shape[1:]
            sizes = model.config.sized(frames, height, width)
            return sample_main_latents(
                model, schedule, inputs.text_BLD, noise, options=options, sizes=sizes
            )
        assert isinstance(model, ControlledDiffusion), type(model)
        return sample_latents(
            model, schedule, inputs.text_BLD, inputs.features_BTchw, noise, options=options
        )

    def _inputs(self, sample: Sample) -> Inputs:
        """Inputs of a sample at the middle timestep, as in validation: fixed for each clip."""
        inputs = fixed_inputs(self.objective, [sample])
        timestep = int(TIMESTEP_FRACTION * self.config.schedule.num_timesteps)
        return replace(
            inputs,
            noise_BTCHW=fixed_noise([sample], timestep, inputs.latents_BTCHW),
            timestep_B=torch.full_like(inputs.timestep_B, timestep),
        )

    def _denoise(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The noisy latents and the one-step estimate of the clean ones."""
        result = self.objective.loss(model, inputs)
        estimate = self.objective.schedule.denoised(
            result.noised, result.velocity, inputs.timestep_B
        )
        return result.noised, estimate

    def _decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Video uint8 [T, H, W, 3] of the first clip."""
        return self.codec.decode(latents_BTCHW)[0].cpu()
