"""Do the columns of a data set fit the diffusion model? Asked before anything is built."""

from __future__ import annotations

from configs.base import ConfigError
from data_pipeline.schema import Column, Manifest
from model_zoo import registry
from training.diffusion.config import DiffusionTrainConfig


def check_columns(manifest: Manifest, config: DiffusionTrainConfig) -> None:
    """Raise ConfigError for a column that is missing, of another shape, or (unless data.adopt) of another tokenizer."""
    model = config.model.transformer
    shapes = {
        config.latents_column: [model.latent_frames, model.latent_channels, model.latent_height, model.latent_width],
        config.text_column: [model.text_length, model.text_dim],
    }
    for name in config.columns:
        column = manifest.columns.get(name)
        if column is None:
            raise ConfigError(
                f"the data set {config.data.manifest} has no column {name!r} (it has: {', '.join(manifest.columns) or 'none'}); "
                "run `landiff precompute` with it, and `landiff precompute finalize`"
            )
        shape = column.shape
        if name == config.latents_column and len(shape) == 4 and column.config.get("moments"):
            shape = [shape[0], shape[1] // 2, *shape[2:]]  # mean and log-variance
        if name in shapes and shape != shapes[name]:
            raise ConfigError(
                f"column {name} of {config.data.manifest} ({column.encoder}) has shape {column.shape}, but model.transformer "
                f"wants {shapes[name]}; precompute the column for this model, or choose the model that fits it"
            )
    if config.phase == "control" and not config.data.adopt:
        _check_tokenizer(manifest.columns[config.tokens_column], config)


def _check_tokenizer(column: Column, config: DiffusionTrainConfig) -> None:
    """The tokens must be of the tokenizer that decodes them: another one's codes are noise to it."""
    entry = registry.resolve(config.zoo, config.tokenizer, kind="tokenizer")
    made_by = {column.encoder, *map(str, column.config.get("encoders", {}).values())}
    if not any(entry.fingerprint in text for text in made_by):
        raise ConfigError(
            f"column {config.tokens_column} of {config.data.manifest} was made by {column.encoder}, but tokenizer = "
            f"{config.tokenizer} is {entry.reference}; precompute the tokens with it, name the other tokenizer, or "
            "take the tokens as they are with data.adopt=true"
        )
