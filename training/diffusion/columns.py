"""Check whether a data set's columns and the zoo entries fit the diffusion model. Torch-free."""

from __future__ import annotations

from landiff.configs.base import ConfigError
from landiff.configs.problems import Problem
from landiff.data_pipeline.format.schema import Column, Manifest
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.registry import ZooEntry
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.checks import bucket_shapes, several_buckets
from landiff.training.diffusion.config import DiffusionTrainConfig


def check_diffusion_columns(
    manifest: Manifest, config: DiffusionTrainConfig, tokenizer: ZooEntry | None
) -> list[Problem]:
    """Whether the columns have the model's shapes. Clips may have more latent frames.

    With `data.buckets` each of them must divide into patches and feature cells. Unless data.adopt,
    the tokens must also come from `tokenizer`.
    """
    model = config.model.transformer
    shapes = {config.text_column: [model.text_length, model.text_dim]}
    problems = []
    if config.data.buckets is None:
        shapes[config.latents_column] = [
            model.latent_frames,
            model.latent_channels,
            model.latent_height,
            model.latent_width,
        ]
    else:
        problems += _check_latent_buckets(config, tokenizer)
    for name, expected in shapes.items():
        column = manifest.columns[name]
        shape = column.shape
        if name == config.latents_column and len(shape) == 4 and column.config.get("moments"):
            shape = [shape[0], shape[1] // 2, *shape[2:]]  # it holds mean and log-variance
        if name == config.latents_column and _is_long_enough(shape, model.latent_frames):
            shape = [model.latent_frames, *shape[1:]]
        if shape != expected:
            problems.append(
                Problem(
                    f"column {name} of {config.data.manifest} ({column.encoder}) has shape "
                    f"{column.shape}, but model.transformer needs {expected}; precompute the "
                    "column for this model, or choose the model that fits it"
                    f"{several_buckets(manifest) if name == config.latents_column else ''}"
                )
            )
    if config.phase == "control" and tokenizer is not None:
        column = manifest.columns[config.tokens_column]
        problems += _check_tokens(manifest, tokenizer_config(tokenizer), config)
        problems += _check_token_buckets(tokenizer_config(tokenizer), config)
        if not config.data.adopt:
            problems += _check_origin(column, tokenizer, config)
    return problems


def _check_latent_buckets(
    config: DiffusionTrainConfig, tokenizer: ZooEntry | None
) -> list[Problem]:
    """Whether the model can be trained on the latents of each of `data.buckets`."""
    transformer = config.model.transformer
    channels = transformer.latent_channels
    problems = []
    for name, shape in bucket_shapes(config.data, config.latents_column).items():
        _, found, height, width = shape
        if found not in (channels, 2 * channels):
            problems.append(
                Problem(
                    f"data.buckets: the latents of {name} have {found} channels, but "
                    f"model.transformer.latent_channels = {channels}; choose the codec of the model"
                )
            )
        if not config.fits(height, width):
            unit = f"patches of {transformer.patch_size}"
            if config.phase == "control":
                unit += f" and feature cells of {config.model.semantic.scale}"
            problems.append(
                Problem(
                    f"data.buckets: the latents of {name} are {height} x {width}, which {unit} "
                    "latent cells do not divide; leave the bucket out, or make clips of another "
                    "size"
                )
            )
        if tokenizer is not None:
            sizes = tokenizer_config(tokenizer)
            grid = (height // config.model.semantic.scale, width // config.model.semantic.scale)
            if sizes.cell_mask_tokens and grid != (sizes.grid_height, sizes.grid_width):
                problems.append(
                    Problem(
                        f"data.buckets: {name} has features of {grid[0]} x {grid[1]}, but "
                        f"{tokenizer.reference} has mask tokens for each cell of "
                        f"{sizes.grid_height} x {sizes.grid_width}; leave the bucket out, or train "
                        "a tokenizer without cell_mask_tokens"
                    )
                )
    return problems


def _check_token_buckets(tokenizer: TokenizerConfig, config: DiffusionTrainConfig) -> list[Problem]:
    """Whether the tokens of each of `data.buckets` decode to as many frames as its latents have."""
    tokens = bucket_shapes(config.data, config.tokens_column)
    latents = bucket_shapes(config.data, config.latents_column)
    layout = TokenLayout.of(tokenizer)
    problems = []
    for name in tokens.keys() & latents.keys():
        expected = layout.num_codes(latents[name][0]) if latents[name][0] else 0
        if tokens[name][0] and expected and tokens[name][0] != expected:
            problems.append(
                Problem(
                    f"data.buckets: clips of {name} have {tokens[name][0]} tokens, but "
                    f"{latents[name][0]} latent frames have {expected}; precompute the tokens for "
                    "this model"
                )
            )
    return problems


def _is_long_enough(shape: list[int], frames: int) -> bool:
    """Whether windows of `frames` frames can be used. A size of 0 means several sizes."""
    return len(shape) > 0 and (shape[0] == 0 or shape[0] >= frames)


def tokenizer_config(entry: ZooEntry) -> TokenizerConfig:
    """The config of a zoo entry of kind "tokenizer"."""
    assert isinstance(entry.config, TokenizerConfig), entry.reference
    return entry.config


def _check_tokens(
    manifest: Manifest, tokenizer: TokenizerConfig, config: DiffusionTrainConfig
) -> list[Problem]:
    """Whether the tokens decode to the latents' number of frames.

    A size of 0 in the manifest means several sizes. They are not checked here.
    """
    column = manifest.columns[config.tokens_column]
    if not column.shape or not column.shape[-1]:
        return []
    latents = manifest.columns[config.latents_column]
    expected = latents.shape[0]
    try:
        frames = TokenLayout.of(tokenizer).num_frames(column.shape[-1])
        if frames != expected:
            raise ConfigError(
                f"{column.shape[-1]} tokens are {frames} semantic frames, but column "
                f"{config.latents_column} holds {expected} latent frames"
            )
    except ValueError as error:
        return [
            Problem(
                f"column {config.tokens_column} of {config.data.manifest} ({column.encoder}): "
                f"{error}; precompute the tokens for this model, or choose the model that fits "
                "them"
            )
        ]
    return []


def _check_origin(column: Column, entry: ZooEntry, config: DiffusionTrainConfig) -> list[Problem]:
    """Whether the tokens come from the tokenizer that decodes them."""
    made_by = {column.encoder}
    for encoder in column.config.get("encoders", {}).values():
        made_by.add(str(encoder))
    if any(entry.fingerprint in text for text in made_by):
        return []
    return [
        Problem(
            f"column {config.tokens_column} of {config.data.manifest} was made by "
            f"{column.encoder}, but tokenizer = {config.tokenizer} is {entry.reference}; "
            "precompute the tokens with it, name the other tokenizer, or accept the tokens as "
            "they are with data.adopt=true"
        )
    ]


def check_diffusion_tokenizer(config: DiffusionTrainConfig, entry: ZooEntry) -> list[Problem]:
    """Whether the features that a tokenizer decodes have the size of the semantic condition."""
    tokenizer = tokenizer_config(entry)
    model = config.model
    scale = model.semantic.scale
    problems = []
    if tokenizer.feature_channels != model.semantic.feature_channels:
        problems.append(
            Problem(
                f"model.semantic.feature_channels = {model.semantic.feature_channels}, but the "
                f"tokenizer {entry.reference} decodes {tokenizer.feature_channels} channels; "
                "choose the tokenizer or the preset that fits"
            )
        )
    found = (tokenizer.grid_height * scale, tokenizer.grid_width * scale)
    expected = (model.transformer.latent_height, model.transformer.latent_width)
    if found != expected:
        problems.append(
            Problem(
                f"model.transformer.latent_height x latent_width = {expected[0]} x {expected[1]}, "
                f"but the tokenizer {entry.reference} decodes a grid of {tokenizer.grid_height} x "
                f"{tokenizer.grid_width}, which model.semantic.channel_multipliers upsamples to "
                f"{found[0]} x {found[1]}; choose the tokenizer or the preset that fits"
            )
        )
    return problems
