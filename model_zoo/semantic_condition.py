"""Semantic condition of the diffusion model: vision features -> a latent that is added to the noisy one.

Letters: B batch, T latent frames, C feature channels, h w feature rows and columns, Z latent channels, H W latent
height and width, G channels inside, N = B * T frames.

forward(features_BTChw) -> latent_BTZHW, frame by frame: semantic frame i touches latent frame i only. The last
convolution starts at zero, so an untrained condition adds nothing.
Source: LanDiff (arXiv 2503.04606); a latent-diffusion decoder with pixel-shuffle upsampling.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.config import SemanticConditionConfig

GROUPS = 32
NORM_EPS = 1e-6


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=NORM_EPS)


def _conv3(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = _conv3(channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = _conv3(out_channels, out_channels)
        self.shortcut = nn.Conv2d(channels, out_channels, kernel_size=1) if channels != out_channels else nn.Identity()

    def forward(self, x_NGhw: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x_NGhw)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.shortcut(x_NGhw) + y


class Level(nn.Module):
    """Residual blocks at one size, then twice the size by pixel shuffle unless it is the last level."""

    def __init__(self, channels: int, out_channels: int, num_blocks: int, upsample: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(widths))
        self.upsample = _conv3(out_channels // 4, out_channels) if upsample else None

    def forward(self, x_NGhw: Tensor) -> Tensor:
        for block in self.blocks:
            x_NGhw = block(x_NGhw)
        return x_NGhw if self.upsample is None else self.upsample(F.pixel_shuffle(x_NGhw, 2))


class SemanticCondition(nn.Module):
    """Upsampler (2x for every level but one) and the projection to latent channels."""

    def __init__(self, config: SemanticConditionConfig, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        widths = [config.base_channels * m for m in config.channel_multipliers]
        wrong = [w for w in widths if w % GROUPS]
        if wrong:
            raise ValueError(
                f"semantic.base_channels * channel_multipliers = {widths} must be multiples of {GROUPS}, "
                "the number of groups of the group norm"
            )
        self.conv_in = _conv3(config.feature_channels, widths[-1])
        self.middle = nn.ModuleList(ResidualBlock(widths[-1], widths[-1]) for _ in range(2))
        inputs = [*widths[1:], widths[-1]]  # what level i receives: the width of the smaller one before it
        self.levels = nn.ModuleList(
            Level(inputs[i], widths[i], config.num_res_blocks + 1, upsample=i > 0) for i in range(len(widths))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], config.out_channels)
        self.projection = _conv3(config.out_channels, latent_channels)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    @property
    def scale(self) -> int:
        """Latent cells per feature cell along one side."""
        return 2 ** (len(self.levels) - 1)

    def upsample(self, features_NChw: Tensor) -> Tensor:
        """-> NGHW with out_channels. Level 0, the last, has the full size."""
        x = self.conv_in(features_NChw)
        for block in self.middle:
            x = block(x)
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))

    def forward(self, features_BTChw: Tensor) -> Tensor:
        channels = self.config.feature_channels
        if features_BTChw.ndim != 5 or features_BTChw.shape[2] != channels:
            raise ValueError(f"the condition takes features [B, T, {channels}, h, w], not {list(features_BTChw.shape)}")
        features_NChw = features_BTChw.flatten(0, 1).to(self.conv_in.weight.dtype)
        return self.projection(self.upsample(features_NChw)).unflatten(0, features_BTChw.shape[:2])
