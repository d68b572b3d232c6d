"""Previews of the diffusion model for a clip, as videos for TensorBoard.

Shape letters (docs/glossary.md): B = 1 clip, T latent frames, C latent channels, H W latent height
and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from landiff.configs.base import ConfigError
from landiff.data_pipeline.loading.loader import Sample
from landiff.model_zoo import keyed_random
from landiff.model_zoo.config import TransformerConfig
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.frozen import build
from landiff.model_zoo.sample.latents import (
    Noise,
    SamplerOptions,
    SamplerStep,
    sample_latents,
    sample_main_latents,
    seeded_noise,
)
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.step import Inputs, Objective
from landiff.training.diffusion.validation import fixed_inputs, fixed_noise
from landiff.training.distributed import World
from landiff.training.observe.previews import Preview
from landiff.training.observe.prompts import prompt_sample, prompt_states

TIMESTEP_FRACTION = 0.5  # of the schedule, for the one-step estimate
PREVIEW_SEED = 0  # of the noise, instead of loop.seed: previews of different runs can be compared


def prompt_samples(config: DiffusionTrainConfig, world: World) -> list[Sample]:
    """`preview_prompts` as samples that hold text states only. Collective.

    Raises ConfigError if the encoder returns another number of rows than the model takes.
    """
    if not config.preview_prompts:
        return []
    assert config.preview_text is not None
    states = prompt_states(config.run, config.preview_prompts, config.preview_text, world)
    rows = config.model.transformer.text_length
    samples = []
    for number, (prompt, text_LD) in enumerate(zip(config.preview_prompts, states, strict=True)):
        if len(text_LD) != rows:
            raise ConfigError(
                f"preview_text = {config.preview_text.kind} returns {len(text_LD)} rows for "
                f"preview_prompts.{number}, the model takes model.transformer.text_length = "
                f"{rows}; name the padded encoder of text_column"
            )
        samples.append(prompt_sample(number, prompt, {config.text_column: text_LD}))
    return samples


class Previewer:
    """Computes previews.

    Collective: with ZeRO-3 every forward gathers parameters, so all ranks must run it, each on a
    clip of its own.
    """

    def __init__(
        self, config: DiffusionTrainConfig, objective: Objective, beat: Callable[[], None]
    ) -> None:
        """`config.preview_codec` must be set. `beat` is called after each sampling step."""
        assert config.preview_codec is not None
        self.beat = beat
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

    @torch.no_grad()
    def prompt(self, model: nn.Module, sample: Sample, tag: str) -> Preview:
        """A video from noise with the text of a prompt, without guidance. Phase main."""
        assert isinstance(model, DiffusionTransformer), type(model)
        text_LD = sample.tensors[self.config.text_column]
        text_BLD = text_LD[None].float().to(self.objective.device)
        model.eval()
        sampled = self._sample_main(model, text_BLD, sample.key, model.config)
        model.train()
        return Preview(tag, {"sample from noise": self._decode(sampled)}, sample.meta.caption)

    def _sample(self, model: nn.Module, inputs: Inputs, key: str) -> Tensor:
        """Latents from the text, and from the features in phase control. `key` fixes the noise."""
        if inputs.features_BTchw is None:
            assert isinstance(model, DiffusionTransformer), type(model)
            frames, _, height, width = inputs.latents_BTCHW.shape[1:]
            sizes = model.config.sized(frames, height, width)
            return self._sample_main(model, inputs.text_BLD, key, sizes)
        assert isinstance(model, ControlledDiffusion), type(model)
        return sample_latents(
            model,
            self.objective.schedule,
            inputs.text_BLD,
            inputs.features_BTchw,
            self._noise(key),
            options=self._options,
            on_step=self._report,
        )

    def _sample_main(
        self, model: DiffusionTransformer, text_BLD: Tensor, key: str, sizes: TransformerConfig
    ) -> Tensor:
        """Latents of the sizes of a config from the text alone."""
        return sample_main_latents(
            model,
            self.objective.schedule,
            text_BLD,
            self._noise(key),
            options=self._options,
            sizes=sizes,
            on_step=self._report,
        )

    def _noise(self, key: str) -> Noise:
        return seeded_noise([keyed_random.key(PREVIEW_SEED, "preview", key)])

    @property
    def _options(self) -> SamplerOptions:
        return SamplerOptions(num_steps=self.config.preview_steps, guidance=0.0)

    def _report(self, _step: SamplerStep) -> None:
        self.beat()

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
