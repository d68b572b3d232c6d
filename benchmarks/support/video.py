"""Sampling of one whole video with random weights, for `benchmarks.gpu`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from benchmarks import sample_lm
from benchmarks.support.case import Case
from benchmarks.support.models import dtype_of
from benchmarks.support.trained_zoo import set_random_codebook
from landiff.launchers.results.sampling.loading import in_precision
from landiff.model_zoo.config import TokenSamplingConfig
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.frozen.cogvideox_vae import wrap
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.sample import tokens
from landiff.model_zoo.sample.decode import Decoder
from landiff.model_zoo.sample.latents import SamplerOptions, sample_latents, seeded_noise
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.replace import replaced

GUIDANCE = 7.5  # of the language model, as in the release
SMALL_CODEC = {"block_out_channels": (32,) * 4, "layers_per_block": 1}


class VideoSampler:
    """Language model, tokenizer, diffusion model with control branch, and VAE, on one device."""

    def __init__(self, case: Case) -> None:
        sizes = case.sizes
        self.case = case
        self.frames = sizes.diffusion.transformer.latent_frames
        self.lm = sample_lm.build(sizes.lm, case.device, dtype_of(case.precision))
        with case.device:
            diffusion = ControlledDiffusion(sizes.diffusion)
            tokenizer = SemanticTokenizer(sizes.tokenizer)
            channels = sizes.diffusion.transformer.latent_channels
            codec_sizes: dict[str, Any] = {} if channels == 16 else SMALL_CODEC
            network = AutoencoderKLCogVideoX(latent_channels=channels, **codec_sizes)
        set_random_codebook(tokenizer)
        self.diffusion = in_precision(diffusion.eval(), case.precision)
        self.tokenizer = in_precision(tokenizer.eval(), case.precision)
        self.codec = wrap(network.eval(), str(dtype_of(case.precision)).removeprefix("torch."))
        self.schedule = NoiseSchedule(sizes.schedule)

    def compile_blocks(self) -> None:
        """Compiles the diffusion model, as `landiff sample` does on CUDA."""
        self.diffusion.compile_blocks()

    @torch.no_grad()
    def sample(self, *, graphs: bool | None) -> Tensor:
        """Frames of one video, uint8 [1, T, H, W, 3]. graphs: as in `Decoder`."""
        sizes = self.case.sizes
        draw = torch.Generator().manual_seed(0)
        text_BLD = torch.randn(1, self.case.text_length, sizes.lm.text_dim, generator=draw)
        prompts = tokens.Prompts(text_BLD.to(self.case.device), torch.full((1,), 0.1))
        config = TokenSamplingConfig(guidance=GUIDANCE)
        with replaced(tokens, "new_cache", partial(_decoder, graphs=graphs)):
            codes = tokens.sample_tokens(self.lm, prompts, self.frames, config, seeds=[0]).codes_BK
        features = self.tokenizer.decode(codes, self.frames).to(self.diffusion.dtype)
        model = sizes.diffusion.transformer
        states_BLD = torch.randn(1, model.text_length, model.text_dim, generator=draw)
        latents = sample_latents(
            self.diffusion,
            self.schedule,
            states_BLD.to(features),
            features,
            seeded_noise([1]),
            options=SamplerOptions(num_steps=self.case.sampling_steps),
        )
        return self.codec.decode(latents)


def _decoder(
    model: LanguageModel, rows: int, capacity: int, padding_R: Tensor | None, graphs: bool | None
) -> Decoder:
    return Decoder(model, rows, capacity, padding_R=padding_R, graphs=graphs)
