"""What the diffusion model makes of a training clip, as videos for TensorBoard.

Letters: B = 1 clip, T latent frames, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from landiff.data_pipeline.loading.loader import Sample
from landiff.model_zoo.frozen import build
from landiff.model_zoo.sample.latents import SamplerOptions, sample_latents, seeded_noise
from landiff.training import rng
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.step import Inputs, Objective

TIMESTEP_SHARE = 0.5  # of the schedule, for the one-step estimate


class Previewer:
    """Collective: in ZeRO-3 every forward gathers parameters, so all ranks run it, on a clip of their own."""

    def __init__(self, config: DiffusionTrainConfig, objective: Objective) -> None:
        assert config.preview_codec is not None
        self.config = config
        self.objective = objective
        self.codec = build(config.preview_codec, objective.device)

    @torch.no_grad()
    def __call__(self, model: nn.Module, sample: Sample) -> dict[str, Tensor]:
        """uint8 [T, H, W, 3] by tag, parts side by side.

        `preview/denoised`: the clip | noised half-way | one-step estimate of the clip. In phase control also
        `preview/sampled`: the clip | sampled from its caption and tokens, without guidance.
        """
        inputs = self._inputs(sample)
        model.eval()
        videos = {
            "preview/denoised": self._side_by_side(
                inputs.latents_BTCHW, *self._denoise(model, inputs)
            )
        }
        if self.config.phase == "control":
            noise = seeded_noise([rng.key(self.config.loop.seed, "preview")])
            options = SamplerOptions(num_steps=self.config.preview_steps, guidance=0.0)
            sampled = sample_latents(
                model,
                self.objective.schedule,
                inputs.text_BLD,
                inputs.features_BTchw,
                noise,
                options=options,
            )
            videos["preview/sampled"] = self._side_by_side(inputs.latents_BTCHW, sampled)
        model.train()
        return videos

    def _inputs(self, sample: Sample) -> Inputs:
        """The sample with its text, without a prefix, half-way up the schedule."""
        inputs = self.objective.inputs([sample])
        text = sample.tensors[self.config.text_column].float().to(self.objective.device)[None]
        timestep = torch.full_like(
            inputs.timestep_B, int(TIMESTEP_SHARE * self.config.schedule.num_timesteps)
        )
        return replace(
            inputs, text_BLD=text, timestep_B=timestep, prefix_B=torch.zeros_like(inputs.prefix_B)
        )

    def _denoise(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        result = self.objective.loss(model, inputs)
        return result.noised, self.objective.schedule.denoised(
            result.noised, result.velocity, inputs.timestep_B
        )

    def _side_by_side(self, *latents_BTCHW: Tensor) -> Tensor:
        return torch.cat([self.codec.decode(latents)[0].cpu() for latents in latents_BTCHW], dim=2)
