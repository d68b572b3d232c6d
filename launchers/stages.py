"""The stages that read a config: config class and checks of each, and how trainers are started.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from landiff.configs import Config
from landiff.configs.problems import Problem
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.config import (
    EvaluateConfig,
    SampleConfig,
    ShardsJobConfig,
    VideoMetricsConfig,
)
from landiff.training.checks import Launch
from landiff.training.diffusion.checks import check as check_diffusion
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.checks import check as check_lm
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.checks import check as check_tokenizer
from landiff.training.tokenizer.config import TokenizerTrainConfig

AnyTrainConfig = TokenizerTrainConfig | LMTrainConfig | DiffusionTrainConfig
"""The config of any of the three trainers."""


@dataclass(frozen=True)
class Trainer:
    """One of the three training programs."""

    module: str  # every rank runs `python -m MODULE CONFIG_FILE`
    config_class: type[TokenizerTrainConfig] | type[LMTrainConfig] | type[DiffusionTrainConfig]
    check: Callable[[Any, Launch], list[Problem]]  # Any: an instance of config_class


TRAINERS = {
    "tokenizer": Trainer("landiff.training.tokenizer", TokenizerTrainConfig, check_tokenizer),
    "lm": Trainer("landiff.training.lm", LMTrainConfig, check_lm),
    "diffusion": Trainer("landiff.training.diffusion", DiffusionTrainConfig, check_diffusion),
}
STAGE_CONFIGS: dict[str, type[Config]] = {
    "shards": ShardsJobConfig,
    "precompute": PrecomputeConfig,
    "tokenizer": TokenizerTrainConfig,
    "lm": LMTrainConfig,
    "diffusion": DiffusionTrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
}
"""Config class of each stage, in the order of the pipeline."""
EVALUATIONS: dict[str, tuple[str, type[Config]]] = {
    "conditions": ("evaluate", EvaluateConfig),
    "videos": ("videos", VideoMetricsConfig),
    "vbench": ("sample", SampleConfig),
}
"""The actions of `landiff evaluate`: name of their checks (launchers/checks.py), and config."""
