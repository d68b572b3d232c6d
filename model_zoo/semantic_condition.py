"""Semantic condition of the diffusion model: turns vision features into a latent to be added.

Semantic frame i influences latent frame i only. The last convolution of the residual upsampler
starts at zero, so an untrained condition adds nothing. The linear one has no such layer: it is only
read by the control branch, whose projections start at zero.

Shape letters (docs/glossary.md): B batch, T latent frames, N = B · T frames of the whole batch,
C channels, h, w height and width in feature cells, H, W height and width in latent cells.

Source: LanDiff (arXiv 2503.04606); a latent-diffusion decoder with pixel-shuffle upsampling
(docs/specification.md §5.3).
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional

from landiff.model_zoo.config import SemanticConditionConfig

GROUPS = 32
NORM_EPS = 1e-6


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=NORM_EPS)


def _conv3(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """Two convolutions, each after group norm and swish, plus a shortcut."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = _conv3(channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = _conv3(out_channels, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if channels != out_channels:
            self.shortcut = nn.Conv2d(channels, out_channels, kernel_size=1)

    def forward(self, x_NChw: Tensor) -> Tensor:
        """[N, channels, h, w] -> [N, out_channels, h, w]."""
        y_NChw = self.conv1(functional.silu(self.norm1(x_NChw)))
        y_NChw = self.conv2(functional.silu(self.norm2(y_NChw)))
        return self.shortcut(x_NChw) + y_NChw


class UpsamplerLevel(nn.Module):
    """Residual blocks of one size, then upsampling by 2 with pixel shuffle if `upsample` is set."""

    def __init__(self, channels: int, out_channels: int, num_blocks: int, upsample: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(widths))
        self.upsample = None
        if upsample:
            self.upsample = _conv3(out_channels // 4, out_channels)

    def forward(self, x_NChw: Tensor) -> Tensor:
        """[N, channels, h, w] -> [N, out_channels, h, w], or of twice the size if it upsamples."""
        for block in self.blocks:
            x_NChw = block(x_NChw)
        if self.upsample is None:
            return x_NChw
        return self.upsample(functional.pixel_shuffle(x_NChw, 2))


class SemanticCondition(nn.Module):
    """Upsampler (by 2 in every level but one) and projection to the channels of the latents."""

    def __init__(self, config: SemanticConditionConfig, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        if config.upsampler == "linear":
            cells = self.scale**2
            self.linear = nn.Conv2d(config.feature_channels, cells * latent_channels, 1)
            return
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        if any(width % GROUPS for width in widths):
            raise ValueError(
                f"semantic.base_channels * channel_multipliers = {widths} must be multiples of "
                f"{GROUPS}, the number of groups of the group norm"
            )
        self.conv_in = _conv3(config.feature_channels, widths[-1])
        self.middle = nn.ModuleList(ResidualBlock(widths[-1], widths[-1]) for _ in range(2))
        # Levels run from the last, smallest one to level 0. Each receives the width of the level
        # that runs before it.
        inputs = [*widths[1:], widths[-1]]
        num_blocks = config.num_res_blocks + 1
        self.levels = nn.ModuleList()
        for index, (channels, width) in enumerate(zip(inputs, widths, strict=True)):
            self.levels.append(UpsamplerLevel(channels, width, num_blocks, upsample=index > 0))
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], config.out_channels)
        self.projection = _conv3(config.out_channels, latent_channels)
        for parameter in self.projection.parameters():
            nn.init.zeros_(parameter)

    @property
    def scale(self) -> int:
        """Latent cells per feature cell along one side."""
        return 2 ** (len(self.config.channel_multipliers) - 1)

    def upsample(self, features_NChw: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, out_channels, H, W]."""
        x_NChw = self.conv_in(features_NChw)
        for block in self.middle:
            x_NChw = block(x_NChw)
        for level in reversed(self.levels):
            x_NChw = level(x_NChw)
        return self.conv_out(functional.silu(self.norm_out(x_NChw)))

    def forward(self, features_BTChw: Tensor) -> Tensor:
        """[B, T, C, h, w] -> latent [B, T, C, H, W] in the dtype of the weights.

        Raises ValueError for features of another number of channels.
        """
        channels = self.config.feature_channels
        if features_BTChw.ndim != 5 or features_BTChw.shape[2] != channels:
            raise ValueError(
                f"the condition takes features [B, T, {channels}, h, w], not "
                f"{list(features_BTChw.shape)}"
            )
        features_NChw = features_BTChw.flatten(0, 1).to(next(self.parameters()).dtype)
        if self.config.upsampler == "linear":
            latents_NCHW = functional.pixel_shuffle(self.linear(features_NChw), self.scale)
        else:
            latents_NCHW = self.projection(self.upsample(features_NChw))
        return latents_NCHW.unflatten(0, features_BTChw.shape[:2])
