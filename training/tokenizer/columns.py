"""Check whether the features column of a data set fits the tokenizer. Torch-free."""

from __future__ import annotations

from landiff.configs.problems import Problem
from landiff.data_pipeline.format.schema import Manifest
from landiff.training.tokenizer.config import COLUMN, TokenizerTrainConfig


def check_features(config: TokenizerTrainConfig, manifest: Manifest) -> list[Problem]:
    """Whether the features have the model's channels and grid."""
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
        )
    ]
