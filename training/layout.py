"""How ranks are divided into copies of a model, and a global batch into micro-batches.

Torch-free.
"""

from __future__ import annotations

from landiff.configs import Config
from landiff.training.lm.config import LMTrainConfig, data_parallel_size


def model_copies(config: Config, ranks: int) -> int:
    """Data-parallel copies of the model on `ranks` ranks.

    Raises ConfigError with the nearest numbers of ranks.
    """
    if isinstance(config, LMTrainConfig):
        return data_parallel_size(config.parallel, ranks)
    return ranks


def copy_size(config: Config) -> int:
    """Ranks that one copy of the model takes."""
    if not isinstance(config, LMTrainConfig):
        return 1
    return config.parallel.tensor * config.parallel.pipeline


def check_batch(config: Config, ranks: int) -> int:
    """Micro-batches of one rank in one step.

    Raises ConfigError where ranks, model and batch do not divide.
    """
    return config.data.micro_batches(model_copies(config, ranks))
