"""FLOPs and disk space of the columns of released sizes, for each clip.

`landiff precompute estimate` measures both on a few clips of the data, for all encoders. This is
for planning without data: encoders that take little time, and captions, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from landiff.data_pipeline.precompute.config import (
    FeaturesColumn,
    LatentsColumn,
    PrecomputeConfig,
    TextColumn,
    TokensColumn,
)
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.training.observe.flops import Flops, add_up, attention, product, tokenizer_flops

CAPTION_TOKENS = 64  # of a caption that is not padded
ENCODER_MFU = 0.3  # model FLOPs utilization of the encoders, in bf16
T5_LAYERS = 24
T5_LAYER = 4 * 4096**2 + 3 * 4096 * 10240  # weights of a layer of T5-XXL's encoder
T5_WIDTH = 4096
VIT_LAYERS = 12
VIT_WIDTH = 768
VAE_CHANNELS = (128, 256, 256, 512)  # of the levels of the CogVideoX VAE's encoder
VAE_BLOCKS = 3  # residual blocks of a level
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class ColumnCost:
    """FLOPs and bytes of a clip in one column."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: ColumnCost) -> ColumnCost:
        """The sum of both."""
        return ColumnCost(self.flops + other.flops, self.bytes + other.bytes)


def clip_cost(config: PrecomputeConfig, shape: ClipShape, tokenizer: TokenizerConfig) -> ColumnCost:
    """The cost of a clip in all columns of `config`.

    tokenizer: sizes of the one that makes tokens.
    """
    total = ColumnCost()
    height, width = shape.grid
    frames = shape.latent_frames
    for column in config.columns.values():
        if isinstance(column, TextColumn) and column.encoder.kind in ("flan-t5", "t5-v1.1"):
            rows = CAPTION_TOKENS
            if column.encoder.kind == "t5-v1.1":
                rows = column.encoder.max_length
            total += ColumnCost(t5_flops(rows), 2 * rows * T5_WIDTH)
        elif isinstance(column, LatentsColumn) and column.encoder.kind == "cogvideox-vae":
            cells = shape.latent_size[0] * shape.latent_size[1]
            total += ColumnCost(vae_flops(shape), 2 * frames * LATENT_CHANNELS * cells)
        elif isinstance(column, FeaturesColumn) and column.encoder.kind == "theia":
            total += ColumnCost(
                frames * vit_flops(height * width), 2 * frames * VIT_WIDTH * height * width
            )
        elif isinstance(column, TokensColumn) and column.encoder.kind == "theia":
            sized = tokenizer.sized(height, width)
            codes = sized.iframe_tokens + (frames - 1) * sized.pframe_tokens
            # Half of a tokenizer is its encoder.
            encoder = tokenizer_flops(sized, frames).forward / 2
            total += ColumnCost(frames * vit_flops(height * width) + encoder, 2 * codes)
    return total


def t5_flops(rows: int) -> float:
    """The encoder of T5-XXL on a caption of so many tokens."""
    layer = product(rows, T5_LAYER) + attention(rows**2, T5_WIDTH)
    return (layer * T5_LAYERS).forward


def vit_flops(patches: int) -> float:
    """ViT-B/16 on a frame."""
    tokens = patches + 1
    layer = product(tokens, 12 * VIT_WIDTH**2) + attention(tokens**2, VIT_WIDTH)
    return (layer * VIT_LAYERS).forward + product(tokens, 3 * 16**2 * VIT_WIDTH).forward


def vae_flops(shape: ClipShape) -> float:
    """The encoder of the CogVideoX VAE on a clip: 3 x 3 x 3 convolutions at four resolutions."""
    frames, height, width = shape.num_frames, shape.height, shape.width
    parts: list[Flops] = [product(frames * height * width, 27 * 3 * VAE_CHANNELS[0])]
    before = VAE_CHANNELS[0]
    for level, channels in enumerate(VAE_CHANNELS):
        cells = float(frames * height * width)
        shortcut = before * channels if before != channels else 0
        parts.append(product(cells, 27 * (before * channels + channels**2) + shortcut))
        parts.append(product(cells, (VAE_BLOCKS - 1) * 2 * 27 * channels**2))
        before = channels
        if level + 1 < len(VAE_CHANNELS):
            height //= 2
            width //= 2
            if level < 2:
                frames = (frames - 1) // 2 + 1
            parts.append(product(frames * height * width, 9 * channels**2))
    cells = float(frames * height * width)
    parts.append(product(cells, 2 * 2 * 27 * before**2 + 27 * before * 2 * LATENT_CHANNELS))
    return add_up(parts).forward
