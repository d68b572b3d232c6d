"""What the diffusion model generates from a training clip, as videos for TensorBoard.

Shape letters (docs/glossary.md): B = 1 clip, T latent frames, C latent channels, H W latent height
and width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from landiff.data_pipeline.loading.loader import Sample
from landiff.model_zoo import keyed_random
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.frozen import build
from landiff.model_zoo.sample.latents import SamplerOptions, sample_latents, seeded_noise
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.step import Inputs, Objective

TIMESTEP_FRACTION = 0.5  # of the schedule, for the one-step estimate


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
    def __call__(self, model: nn.Module, sample: Sample) -> dict[str, Tensor]:
        """Videos uint8 [T, H, W, 3] by tag, their parts side by side.

        `preview/denoised`: the clip, the clip with noise of the middle timestep, and the one-step
        estimate of the clip. Phase control also has `preview/sampled`: the clip, and a sample from
        its text and tokens without guidance.
        """
        inputs = self._inputs(sample)
        model.eval()
        denoised = self._side_by_side(inputs.latents_BTCHW, *self._denoise(model, inputs))
        videos = {"preview/denoised": denoised}
        if inputs.features_BTchw is not None:
            assert isinstance(model, ControlledDiffusion), type(model)
            sampled = sample_latents(
                model,
                self.objective.schedule,
                inputs.text_BLD,
                inputs.features_BTchw,
                seeded_noise([keyed_random.key(self.config.loop.seed, "preview")]),
                options=SamplerOptions(num_steps=self.config.preview_steps, guidance=0.0),
            )
            videos["preview/sampled"] = self._side_by_side(inputs.latents_BTCHW, sampled)
        model.train()
        return videos

    def _inputs(self, sample: Sample) -> Inputs:
        """Inputs of a sample at the middle timestep, with its text and without a prefix."""
        inputs = self.objective.inputs([sample])
        text_LD = sample.tensors[self.config.text_column].float().to(self.objective.device)
        timestep = int(TIMESTEP_FRACTION * self.config.schedule.num_timesteps)
        return replace(
            inputs,
            text_BLD=text_LD[None],
            timestep_B=torch.full_like(inputs.timestep_B, timestep),
            prefix_B=torch.zeros_like(inputs.prefix_B),
        )

    def _denoise(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The noisy latents and the one-step estimate of the clean ones."""
        result = self.objective.loss(model, inputs)
        estimate = self.objective.schedule.denoised(
            result.noised, result.velocity, inputs.timestep_B
        )
        return result.noised, estimate

    def _side_by_side(self, *latents_BTCHW: Tensor) -> Tensor:
        """Decoded latents of the first clip, beside each other in one video."""
        videos = [self.codec.decode(latents)[0].cpu() for latents in latents_BTCHW]
        return torch.cat(videos, dim=2)
