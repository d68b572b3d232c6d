"""Output of `LanDiffPipeline`, and its output types.

Shape letters (docs/glossary.md): B batch, K codes of a clip, T frames, C channels, H, W height and
width of RGB frames or latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor


@dataclass
class LanDiffPipelineOutput(BaseOutput):
    """Videos of a call.

    frames: as the `output_type` of the call says.
    codes: semantic tokens, int64 [B, K].
    """

    frames: Any
    codes: Tensor


def _to_array(frames_BTHWC: Tensor) -> np.ndarray:
    return (frames_BTHWC.float() / 255).numpy()


def _to_tensor(frames_BTHWC: Tensor) -> Tensor:
    return (frames_BTHWC.float() / 255).permute(0, 1, 4, 2, 3)


def _to_images(frames_BTHWC: Tensor) -> list[list[Image.Image]]:
    videos = []
    for frames_THWC in frames_BTHWC:
        videos.append([Image.fromarray(np.asarray(frame)) for frame in frames_THWC])
    return videos


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "np": _to_array,
    "pt": _to_tensor,
    "pil": _to_images,
    "uint8": lambda frames_BTHWC: frames_BTHWC,
    "latent": lambda latents_BTCHW: latents_BTCHW,
}
"""Output type -> function from uint8 frames [B, T, H, W, 3] to the output."""
