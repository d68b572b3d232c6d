"""Features and their reconstruction as a video.

Shape letters (docs/glossary.md): T semantic frames, C feature channels, h w rows and columns of the
grid, M all vectors of a clip, H W height and width of the video.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREVIEW_PIXELS = 16  # height and width of a feature cell


def paint(
    features_TChw: Tensor, decoded_TChw: Tensor, pixels: int = PREVIEW_PIXELS
) -> tuple[Tensor, Tensor]:
    """Both maps as videos, uint8 [T, H, W, 3].

    Red, green and blue are the first three principal components of `features_TChw`.
    """
    channels = features_TChw.shape[1]
    flat_MC = features_TChw.transpose(0, 1).reshape(channels, -1).T
    mean_C = flat_MC.mean(0)
    centered_MC = flat_MC - mean_C
    _, axes_CC = torch.linalg.eigh(centered_MC.T @ centered_MC)  # ascending eigenvalues
    axes_C3 = axes_CC[:, -3:].flip(-1)
    scale_3 = 3 * (centered_MC @ axes_C3).std(0).clamp(min=1e-6)
    images = []
    for part_TChw in (features_TChw, decoded_TChw):
        color_Thw3 = (part_TChw.permute(0, 2, 3, 1) - mean_C) @ axes_C3 / scale_3
        image = ((color_Thw3 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        images.append(image.repeat_interleave(pixels, 1).repeat_interleave(pixels, 2).cpu())
    return images[0], images[1]
