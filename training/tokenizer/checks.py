"""Checks of the tokenizer trainer's config before its ranks start. Torch-free."""

from __future__ import annotations

from landiff.configs.problems import Problem
from landiff.training.checks import Launch, check_trainer
from landiff.training.tokenizer.columns import check_features
from landiff.training.tokenizer.config import TokenizerTrainConfig


def check(config: TokenizerTrainConfig, launch: Launch) -> list[Problem]:
    """All problems that are known before ranks start."""
    manifests, problems = check_trainer(config, launch)
    if manifests:
        problems += check_features(config, manifests[0])
    return problems
