"""Model FLOPs of training, computed from the sizes of the models, and peaks of GPUs. Torch-free.

Engines report the FLOPs of their batches, and `landiff plan` those of a config, with the functions
of this module.

Matrix multiplications are counted: 2 FLOPs for each weight and row, and 4 · width for each pair of
a query and a key that it attends to. The backward pass costs the same for the gradients of the
weights, and the same again for those of the inputs if an earlier layer is trained; attention costs
twice its forward pass. Norms, activations, padding and recomputation are not counted.

With `adapter` only LoRA adapters are trained: the backward pass computes no gradients of the other
weights. The adapters themselves are not counted, nor what the first block saves because nothing
before it is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from landiff.model_zoo.config import (
    DiffusionConfig,
    LMConfig,
    SemanticConditionConfig,
    TokenizerConfig,
    TransformerConfig,
)
from landiff.model_zoo.token_layout import NUM_MICRO_CONDITIONS, TokenLayout

PEAK_TFLOPS = {
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "A100": 312,
    "B200": 2250,
    "GB200": 2500,
    "GH200": 989,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H200": 989,
    "H800": 989,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 5090": 209,
    "RTX A6000": 155,
}
"""Dense bf16 TFLOP/s of the data sheets, by a part of the name that torch gives the device."""

TRAINED = 2.0
"""Backward passes of a layer: gradients of its weights and of its inputs."""
HALF = 1.0
"""The same if the weights are frozen, or if nothing before the layer is trained."""
FROZEN = 0.0


@dataclass(frozen=True)
class Flops:
    """FLOPs of the forward and of the backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """FLOPs of both passes."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        """The sum, pass by pass."""
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: float) -> Flops:
        """`count` times these FLOPs."""
        return Flops(self.forward * count, self.backward * count)


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s in bf16 of a GPU, from the name that torch gives it. None if it is unknown."""
    best = ""
    for name in PEAK_TFLOPS:
        words = rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
        if len(name) > len(best) and re.search(words, device_name, re.IGNORECASE):
            best = name
    return PEAK_TFLOPS[best] * 1e12 if best else None


def add_up(parts: Iterable[Flops]) -> Flops:
    """The sum of all parts."""
    total = Flops()
    for part in parts:
        total += part
    return total


def product(rows: float, weights: float, backward: float = TRAINED) -> Flops:
    """A linear layer of `weights` elements on `rows` rows."""
    forward = 2.0 * rows * weights
    return Flops(forward, backward * forward)


def attention(pairs: float, width: int, backward: float = TRAINED) -> Flops:
    """Attention of all heads, which together are `width` wide, over pairs of query and key."""
    forward = 4.0 * pairs * width
    return Flops(forward, backward * forward)


# ---------------------------------------------------------------- language model


def lm_flops(model: LMConfig, length: int, text: int, *, adapter: bool = False) -> Flops:
    """One clip of `length` positions, `text` of them text, in the language model."""
    linear = HALF if adapter else TRAINED
    first = FROZEN if adapter else HALF  # layers that conditions enter
    second = FROZEN if adapter else TRAINED
    width = model.hidden_size
    block = 4 * width**2 + 3 * width * model.ffn_size
    head = width * TokenLayout.of(model).vocab_size
    inner = model.micro_hidden_size
    scalars = NUM_MICRO_CONDITIONS
    if model.grid_condition:
        scalars += 2  # rows and columns
    return add_up(
        [
            product(length, model.num_layers * block + head, linear),
            attention(model.num_layers * length * (length + 1) / 2, width),
            product(text, model.text_dim * width, first),
            product(text, width**2, second),
            product(scalars, model.micro_frequency_dim * inner, first),
            product(scalars, inner * width, second),
        ]
    )


# ---------------------------------------------------------------- semantic tokenizer


def tokenizer_flops(model: TokenizerConfig, frames: int) -> Flops:
    """One segment of `frames` semantic frames in encoder, quantizer and decoder."""
    width = model.hidden_size
    visual = frames * model.grid_height * model.grid_width
    latents = model.iframe_tokens + (frames - 1) * model.pframe_tokens
    block = product(visual + latents, 12 * width**2)
    pairs = encoder_pairs(model, frames) + decoder_pairs(model, frames)
    return add_up(
        [
            block * (2 * model.num_layers),
            attention(model.num_layers * pairs, width),
            product(visual, model.feature_channels * width, HALF),
            product(latents, 2 * width * model.token_size),
            product(latents, 2 * model.token_size * model.codebook_dim),
            product(latents, model.codebook_size * model.codebook_dim, FROZEN),
            product(visual, 2 * width**2 + 2 * width * model.feature_channels),
        ]
    )


def encoder_pairs(model: TokenizerConfig, frames: int) -> float:
    """Pairs of a query and a key in the encoder, see `landiff.model_zoo.positions.frame_spans`."""
    cells = model.grid_height * model.grid_width
    latents = 0
    pairs = 0.0
    for frame in range(frames):
        codes = model.pframe_tokens if frame else model.iframe_tokens
        pairs += (cells + codes) * cells * (frame + 1)
        latents += codes
    return pairs + latents * (latents + 1) / 2


def decoder_pairs(model: TokenizerConfig, frames: int) -> float:
    """Pairs of a query and a key in the decoder, see `landiff.model_zoo.positions.frame_spans`."""
    cells = model.grid_height * model.grid_width
    visible = 0
    pairs = 0.0
    for frame in range(frames):
        codes = model.pframe_tokens if frame else model.iframe_tokens
        visible += cells + codes
        pairs += (cells + codes) * visible
    return pairs


# ---------------------------------------------------------------- diffusion model


def num_tokens(config: TransformerConfig) -> int:
    """Latent and text tokens of one clip in the diffusion transformer."""
    rows = config.latent_height // config.patch_size
    columns = config.latent_width // config.patch_size
    return config.latent_frames * rows * columns + config.text_length


def main_flops(config: TransformerConfig, *, adapter: bool = False) -> Flops:
    """One clip in phase `main`: forward and backward pass of the main transformer."""
    if adapter:
        return add_up(
            [
                _input(config, FROZEN, FROZEN),
                _blocks(config, config.num_layers, HALF, FROZEN, TRAINED),
                _output(config, HALF, FROZEN),
            ]
        )
    return add_up([_input(config), _blocks(config, config.num_layers), _output(config)])


def control_flops(model: DiffusionConfig, *, adapter: bool = False) -> Flops:
    """One clip in phase `control`: the control branch with its condition, and the frozen main part.

    Gradients pass through the frozen transformer down to its second block, where the control branch
    first acts. Decoding the semantic tokens is not counted.
    """
    config = model.transformer
    frozen = [
        _input(config, FROZEN, FROZEN),
        _blocks(config, 1, FROZEN, FROZEN),
        _blocks(config, config.num_layers - 1, HALF, FROZEN, TRAINED),
        _output(config, HALF, FROZEN),
    ]
    layers = model.control_layers
    projections = layers * config.hidden_size**2
    semantic = semantic_flops(model.semantic, config)
    if adapter:
        branch = [
            _input(config, FROZEN, FROZEN),
            _blocks(config, layers, HALF, FROZEN, TRAINED),
            product(num_tokens(config), projections, HALF),
            Flops(semantic.forward),
        ]
    else:
        branch = [
            _input(config, TRAINED),
            _blocks(config, layers),
            product(num_tokens(config), projections),
            semantic,
        ]
    return add_up([*frozen, *branch])


def _input(config: TransformerConfig, patches: float = HALF, text: float = HALF) -> Flops:
    """Patches, text and timestep of one clip to tokens; with backward passes of the first two."""
    width = config.hidden_size
    embed = config.time_embed_dim
    video = num_tokens(config) - config.text_length
    trained = text != FROZEN
    return add_up(
        [
            product(video, config.latent_channels * config.patch_size**2 * width, patches),
            product(config.text_length, config.text_dim * width, text),
            product(1, width * embed, HALF if trained else FROZEN),
            product(1, embed**2, TRAINED if trained else FROZEN),
        ]
    )


def _blocks(
    config: TransformerConfig,
    count: int,
    linear: float = TRAINED,
    modulation: float = TRAINED,
    attend: float | None = None,
) -> Flops:
    """`count` blocks on one clip, with the backward passes of their parts."""
    tokens = num_tokens(config)
    width = config.hidden_size
    block = [
        product(tokens, 12 * width**2, linear),
        product(1, 12 * config.time_embed_dim * width, modulation),
        attention(tokens**2, width, linear if attend is None else attend),
    ]
    return add_up(block) * count


def _output(
    config: TransformerConfig, linear: float = TRAINED, modulation: float = TRAINED
) -> Flops:
    """Tokens of one clip to velocity."""
    width = config.hidden_size
    video = num_tokens(config) - config.text_length
    return add_up(
        [
            product(video, width * config.latent_channels * config.patch_size**2, linear),
            product(1, 2 * config.time_embed_dim * width, modulation),
        ]
    )


def semantic_flops(config: SemanticConditionConfig, transformer: TransformerConfig) -> Flops:
    """The frames of one clip in the semantic condition."""
    widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
    scale = 2 ** (len(widths) - 1)
    cells = transformer.latent_height // scale * (transformer.latent_width // scale)
    rows = float(transformer.latent_frames * cells)
    if config.upsampler == "linear":
        return product(rows, config.feature_channels * scale**2 * transformer.latent_channels, HALF)
    parts = [product(rows, 9 * config.feature_channels * widths[-1], HALF)]
    parts.append(product(rows, 4 * 9 * widths[-1] ** 2))  # two residual blocks of two convolutions
    before = widths[-1]
    for index in reversed(range(len(widths))):
        width = widths[index]
        shortcut = before * width if before != width else 0
        parts.append(product(rows, 9 * (before * width + width**2) + shortcut))
        parts.append(product(rows, config.num_res_blocks * 2 * 9 * width**2))
        before = width
        if index > 0:
            rows *= 4
            parts.append(product(rows, 9 * width // 4 * width))
    parts.append(product(rows, 9 * widths[0] * config.out_channels))
    parts.append(product(rows, 9 * config.out_channels * transformer.latent_channels))
    return add_up(parts)
