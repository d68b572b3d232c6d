"""Division of ranks into model copies, and of a global batch into micro-batches. Torch-free."""

from __future__ import annotations

from landiff.configs import Config
from landiff.training.config import TrainConfig
from landiff.training.lm.config import LMTrainConfig, data_parallel_size


def model_copies(config: Config, ranks: int) -> int:
    """Number of data-parallel copies of the model on `ranks` ranks.

    Raises ConfigError with the nearest valid numbers of ranks.
    """
    if isinstance(config, LMTrainConfig):
        return data_parallel_size(config.parallel, ranks)
    return ranks


def copy_size(config: Config) -> int:
    """Number of ranks that one copy of the model takes."""
    if isinstance(config, LMTrainConfig):
        return config.parallel.tensor * config.parallel.pipeline
    return 1


def check_batch(config: TrainConfig, ranks: int) -> int:
    """Number of micro-batches of one rank in one step.

    Raises ConfigError if ranks, model and batch do not divide evenly.
    """
    return config.data.micro_batches(model_copies(config, ranks))
