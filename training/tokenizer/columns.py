"""Check whether the features column of a data set fits the tokenizer. Torch-free."""

from __future__ import annotations

from landiff.configs.problems import Problem
from landiff.data_pipeline.format.schema import Manifest
from landiff.training.checks import bucket_shapes, several_buckets
from landiff.training.tokenizer.config import COLUMN, TokenizerTrainConfig


def check_features(config: TokenizerTrainConfig, manifest: Manifest) -> list[Problem]:
    """Whether the features have the model's channels and grid.

    With `data.buckets` the grid may be any, unless `cell_mask_tokens` binds the model to its own.
    """
    if config.data.buckets is not None:
        return _check_feature_buckets(config)
    column = manifest.columns[COLUMN]
    model = config.model
    expected = [model.feature_channels, model.grid_height, model.grid_width]
    if column.shape[1:] == expected:
        return []
    return [
        Problem(
            f"model.feature_channels, grid_height, grid_width = {expected}, but the features "
            f"column of {config.data.manifest} ({column.encoder}) holds {column.shape[1:]}; set "
            "them to that, or precompute the features again"
            f"{several_buckets(manifest)}"
        )
    ]


def _check_feature_buckets(config: TokenizerTrainConfig) -> list[Problem]:
    """Whether the model takes the features of each of `data.buckets`."""
    model = config.model
    problems = []
    for name, (_, channels, rows, columns) in bucket_shapes(config.data, COLUMN).items():
        if channels != model.feature_channels:
            problems.append(
                Problem(
                    f"data.buckets: the features of {name} have {channels} channels, but "
                    f"model.feature_channels = {model.feature_channels}; set it to that"
                )
            )
        own = (model.grid_height, model.grid_width)
        if model.cell_mask_tokens and (rows, columns) != own:
            problems.append(
                Problem(
                    f"data.buckets: the features of {name} are {rows} x {columns}, but with "
                    f"model.cell_mask_tokens the model has mask tokens for each cell of "
                    f"{own[0]} x {own[1]}; leave the bucket out, or set cell_mask_tokens = false"
                )
            )
    return problems
