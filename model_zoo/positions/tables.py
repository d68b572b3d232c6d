"""Position table and rotary embedding of the diffusion transformer.

Shape letters (docs/glossary.md): T latent frames, N video tokens, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landiff.model_zoo.config import TransformerConfig
from landiff.model_zoo.layers import rotary_angles, sinusoid


def position_table(
    num_frames: int,
    rows: int,
    columns: int,
    dim: int,
    spatial_interpolation: float,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sines and cosines of the position of each patch, float32 [T, rows, columns, dim].

    The first quarter of the channels encodes the frame, the next 3/8 the column and the last 3/8
    the row (§5.1). Columns and rows are divided by `spatial_interpolation`.
    """
    time_table = _axis_table(num_frames, 1.0, dim // 4, device)
    column_table = _axis_table(columns, spatial_interpolation, dim * 3 // 8, device)
    row_table = _axis_table(rows, spatial_interpolation, dim * 3 // 8, device)
    parts = [
        time_table[:, None, None].expand(-1, rows, columns, -1),
        column_table[None, None].expand(num_frames, rows, -1, -1),
        row_table[None, :, None].expand(num_frames, -1, columns, -1),
    ]
    return torch.cat(parts, dim=-1)


def _axis_table(size: int, interpolation: float, dim: int, device: torch.device | str) -> Tensor:
    """Sines, then cosines, of the positions along one axis: float32 [size, dim]."""
    positions = torch.arange(size, dtype=torch.float64, device=device) / interpolation
    return sinusoid(positions, dim, dtype=torch.float64, sines_first=True)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary embedding of all video tokens, float32 [N, d / 2] each."""

    cos_Nd: Tensor
    sin_Nd: Tensor


def video_rotation(
    config: TransformerConfig, num_frames: int, rows: int, columns: int, device: torch.device
) -> Rotation | None:
    """Rotary embedding of frame, row and column of each patch; None if the config has none."""
    theta = config.rotary_theta
    if theta is None:
        return None
    head_dim = config.hidden_size // config.num_heads
    axes = [torch.arange(size, device=device) for size in (num_frames, rows, columns)]
    positions_N3 = torch.cartesian_prod(*axes)
    dims = (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)
    angles = []
    for axis, dim in enumerate(dims):
        angles.append(rotary_angles(positions_N3[:, axis], dim, theta, dtype=torch.float64))
    angles_Nd = torch.cat(angles, dim=1)
    return Rotation(angles_Nd.cos(), angles_Nd.sin())


def position_table_numel(config: TransformerConfig) -> int:
    """Elements of the position table of the release, a parameter with rows for text and video."""
    rows = config.latent_height // config.patch_size
    columns = config.latent_width // config.patch_size
    return (config.text_length + config.latent_frames * rows * columns) * config.hidden_size
