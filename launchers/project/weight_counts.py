"""Numbers of weights that follow from the sizes of a model, without building it. Torch-free.

Matrices, convolutions and tables are counted, biases and norms are not: a few per cent of small
models, less than one per mille of large ones.
"""

from __future__ import annotations

from landiff.launchers.stages import AnyTrainConfig
from landiff.model_zoo.config import (
    DiffusionConfig,
    LMConfig,
    SemanticConditionConfig,
    TokenizerConfig,
    TransformerConfig,
)
from landiff.model_zoo.token_layout import NUM_MICRO_CONDITIONS, TokenLayout
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig


def weight_counts(config: AnyTrainConfig) -> tuple[int, int]:
    """(all, trained) weights of the model of a trainer. LoRA adapters are not counted."""
    if isinstance(config, LMTrainConfig):
        count = lm_weights(config.model)
        return count, 0 if config.lora is not None else count
    if not isinstance(config, DiffusionTrainConfig):
        count = tokenizer_weights(config.model)
        return count, count
    main = transformer_weights(config.model.transformer)
    if config.phase == "main":
        return main, 0 if config.lora is not None else main
    whole = diffusion_weights(config.model)
    return whole, 0 if config.lora is not None else whole - main


def lm_weights(model: LMConfig) -> int:
    """The language model."""
    width = model.hidden_size
    inner = model.micro_hidden_size
    scalars = NUM_MICRO_CONDITIONS
    if model.grid_condition:
        scalars += 2  # rows and columns
    blocks = model.num_layers * (4 * width**2 + 3 * width * model.ffn_size)
    tables = 2 * width * TokenLayout.of(model).vocab_size
    text = model.text_dim * width + width**2
    return blocks + tables + text + scalars * (model.micro_frequency_dim * inner + inner * width)


def tokenizer_weights(model: TokenizerConfig) -> int:
    """The semantic tokenizer."""
    width = model.hidden_size
    blocks = 2 * model.num_layers * 12 * width**2
    queries = (model.iframe_tokens + model.pframe_tokens) * width
    quantizer = 2 * (width + model.codebook_dim) * model.token_size
    head = 2 * width**2 + 3 * width * model.feature_channels
    return blocks + queries + quantizer + head


def diffusion_weights(model: DiffusionConfig) -> int:
    """The main transformer with control branch and semantic condition."""
    main = transformer_weights(model.transformer)
    branch = transformer_weights(model.transformer, model.control_layers)
    projections = model.control_layers * model.transformer.hidden_size**2
    semantic = semantic_weights(model.semantic, model.transformer.latent_channels)
    return main + branch + projections + semantic


def transformer_weights(config: TransformerConfig, layers: int | None = None) -> int:
    """The main transformer, or the first `layers` blocks with the input and without the output."""
    width = config.hidden_size
    embed = config.time_embed_dim
    patch = config.latent_channels * config.patch_size**2 * width
    found = patch + config.text_dim * width + width * embed + embed**2
    blocks = config.num_layers if layers is None else layers
    found += blocks * (12 * width**2 + 12 * embed * width)
    if layers is None:
        found += patch + 2 * embed * width
    return found


def semantic_weights(config: SemanticConditionConfig, latent_channels: int) -> int:
    """The semantic condition: convolutions of 3 x 3 from features to latents."""
    widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
    if config.upsampler == "linear":
        scale = 2 ** (len(widths) - 1)
        return config.feature_channels * scale**2 * latent_channels
    found = 9 * config.feature_channels * widths[-1] + 4 * 9 * widths[-1] ** 2
    before = widths[-1]
    for index in reversed(range(len(widths))):
        width = widths[index]
        shortcut = before * width if before != width else 0
        found += 9 * (before * width + width**2) + shortcut
        found += config.num_res_blocks * 2 * 9 * width**2
        before = width
        if index > 0:
            found += 9 * (width // 4) * width
    return found + 9 * widths[0] * config.out_channels + 9 * config.out_channels * latent_channels
