"""Videos rendered from semantic tokens without text.

Shape letters (docs/glossary.md): B batch, K codes of a clip, T frames, H, W height and width, C
colours, L text rows, D width of a text state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.frozen.base import LatentCodec
from landiff.model_zoo.sample.generate import SampleProgress, draw_latents
from landiff.model_zoo.sample.latents import SamplerOptions
from landiff.model_zoo.sample.sizes import stream_lengths
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.model_zoo.token_layout import TokenLayout
from landiff.model_zoo.tokenizer import SemanticTokenizer


@dataclass(frozen=True)
class Renderer:
    """The models that turn tokens into video, on one device.

    clean_frames: of a chunk after the first, as in `generate`.
    """

    tokenizer: SemanticTokenizer
    diffusion: ControlledDiffusion
    codec: LatentCodec
    schedule: NoiseSchedule
    steps: int
    clean_frames: int = 7

    @torch.no_grad()
    def __call__(
        self, codes_BK: Tensor, seeds: Sequence[int], progress: SampleProgress | None = None
    ) -> Tensor:
        """Videos uint8 [B, T, H, W, C] of clips of equal length, with null text.

        A clip that is not a whole number of chunks is rendered without its last frames.

        seeds: of the noise, one per clip. progress: as of `draw_latents`.
        """
        layout = TokenLayout.of(self.tokenizer.config)
        sizes = self.diffusion.config.transformer
        all_frames = layout.num_frames(codes_BK.shape[1])
        num_frames, _ = stream_lengths(all_frames, sizes.latent_frames, self.clean_frames)
        codes_BK = codes_BK[:, : layout.num_codes(num_frames)]
        features_BTChw = self.tokenizer.decode(codes_BK, num_frames)
        text_BLD = features_BTChw.new_zeros(len(codes_BK), sizes.text_length, sizes.text_dim)
        latents_BTCHW = draw_latents(
            self.diffusion,
            self.schedule,
            text_BLD,
            features_BTChw,
            SamplerOptions(num_steps=self.steps, guidance=0.0),
            seeds=seeds,
            clean_frames=self.clean_frames,
            progress=progress,
        )
        return self.codec.decode(latents_BTCHW)
