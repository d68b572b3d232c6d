"""Checks of the tokenizer trainer's config before its ranks start. Torch-free."""

from __future__ import annotations

from landiff.configs.problems import Problem
from landiff.training.checks import (
    Launch,
    check_groups,
    check_trainer,
    different_fields,
    find_entry,
)
from landiff.training.tokenizer.columns import check_features
from landiff.training.tokenizer.config import TokenizerTrainConfig

# Fields of the model that determine shapes and meaning of its weights.
SHAPES = (
    "feature_channels",
    "grid_height",
    "grid_width",
    "hidden_size",
    "num_heads",
    "num_layers",
    "token_size",
    "codebook_size",
    "codebook_dim",
    "iframe_tokens",
    "pframe_tokens",
    "segment_frames",
    "normalize_features",
)


def check(config: TokenizerTrainConfig, launch: Launch) -> list[Problem]:
    """All problems that are known before ranks start."""
    phases, problems = check_trainer(config, launch)
    if launch.inputs_exist:
        start, found = find_entry("init_from", config.zoo, config.init_from, "tokenizer")
        problems += found
        if start is not None:
            problems += different_fields("model", config.model, start, SHAPES)
    problems += check_parameter_groups(config)
    for phase in phases:
        problems += check_features(phase.config, phase.manifest)
    return problems


def check_parameter_groups(config: TokenizerTrainConfig) -> list[Problem]:
    """Whether every entry of `optim.groups` applies to some parameter."""
    if not config.optim.groups:
        return []
    import torch

    from landiff.model_zoo.tokenizer import SemanticTokenizer

    with torch.device("meta"):
        model = SemanticTokenizer(config.model)
    return check_groups(config.optim, [name for name, _ in model.named_parameters()])
