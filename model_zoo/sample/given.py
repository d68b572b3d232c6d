"""Conditions of a video in addition to text: its first frames, or all of its tokens.

Shape letters (docs/glossary.md): B batch, K codes of a clip, T frames (RGB frames of videos, latent
frames of latents and features), C channels, H, W height and width of RGB frames or latents, h, w
height and width in feature cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.model_zoo.frozen.base import LatentCodec, VisionFeatures
from landiff.model_zoo.frozen.config import semantic_frame_indices
from landiff.model_zoo.token_layout import TokenLayout
from landiff.model_zoo.tokenizer import SemanticTokenizer


@dataclass(frozen=True)
class Given:
    """The given part of a batch of videos.

    codes_BK: codes of the first semantic frames, or of all. They are not sampled.
    latents_BTCHW: the first latent frames, which the first chunk keeps as its clean prefix.
    """

    codes_BK: Tensor | None = None
    latents_BTCHW: Tensor | None = None

    def num_codes(self) -> int:
        """Given codes of each video."""
        return 0 if self.codes_BK is None else self.codes_BK.shape[1]

    def filled(self, batch: int) -> Given:
        """The same with the last video repeated up to `batch` videos."""

        def fill(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return torch.cat([values, *[values[-1:]] * (batch - len(values))])

        return Given(fill(self.codes_BK), fill(self.latents_BTCHW))

    def check(self, layout: TokenLayout, num_latent_frames: int, window: int, batch: int) -> None:
        """Raises ConfigError for codes or latents that do not fit the videos."""
        if self.codes_BK is not None:
            frames = _num_frames(layout, self.num_codes())
            if frames > num_latent_frames or len(self.codes_BK) != batch:
                raise ConfigError(
                    f"the tokens of {frames} frames are given for {len(self.codes_BK)} videos, but "
                    f"{batch} videos of {num_latent_frames} latent frames are wanted; set "
                    f"num_latent_frames={frames}"
                )
        if self.latents_BTCHW is not None:
            first = self.latents_BTCHW.shape[1]
            if first >= min(window, num_latent_frames):
                raise ConfigError(
                    f"{first} latent frames are given, so that a chunk of "
                    f"{min(window, num_latent_frames)} has no other; make the video longer, or "
                    "give fewer frames"
                )


def _num_frames(layout: TokenLayout, num_codes: int) -> int:
    """Semantic frames of given codes. Raises ConfigError if they are no whole frames."""
    try:
        return layout.num_frames(num_codes)
    except ValueError as error:
        raise ConfigError(f"given tokens do not fit the language model: {error}") from None


@torch.no_grad()
def codes_of(
    tokenizer: SemanticTokenizer, vision: VisionFeatures, frames_BTHWC: Tensor, time: int
) -> Tensor:
    """Codes of videos, uint8 [B, T, H, W, 3] -> int64 [B, K].

    time: RGB frames per latent frame after the first; T = 1 + time * (latent frames - 1).
    """
    count = 1 + (frames_BTHWC.shape[1] - 1) // time
    semantic_BTHWC = frames_BTHWC[:, semantic_frame_indices(frames_BTHWC.shape[1], count)]
    features = [vision(clip_1THWC) for clip_1THWC in semantic_BTHWC.split(1)]
    return torch.cat([tokenizer.encode(features_1TChw) for features_1TChw in features])


@torch.no_grad()
def first_frames(
    tokenizer: SemanticTokenizer,
    vision: VisionFeatures,
    codec: LatentCodec,
    frames_BTHWC: Tensor,
) -> Given:
    """The codes and latents of the first frames of videos, uint8 [B, T, H, W, 3].

    One frame is an image that a video begins with; more are a video that it continues.
    """
    latents = [codec.encode(clip_1THWC) for clip_1THWC in frames_BTHWC.split(1)]
    return Given(codes_of(tokenizer, vision, frames_BTHWC, codec.time), torch.cat(latents))
