"""Division of ranks into model copies, and of a global batch into micro-batches. Torch-free."""

from __future__ import annotations

from landiff.configs import Config, ConfigError
from landiff.data_pipeline.loading.config import require_micro_batches
from landiff.data_pipeline.loading.phases import batch_sizes
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

    With a ramp it is that of its end. Raises ConfigError if ranks, model and batch do not divide
    evenly.
    """
    return config.data.micro_batches(model_copies(config, ranks))


def check_batches(config: TrainConfig, ranks: int) -> None:
    """Raise ConfigError if ranks, model and batch do not divide evenly in some step of the run."""
    copies = model_copies(config, ranks)
    for level in batch_sizes(config.data_phases).levels:
        try:
            require_micro_batches(level.global_batch_size, level.micro_batch_size, copies)
        except ConfigError as error:
            if level.first_step == 0 and config.data.ramp is None:
                raise
            raise ConfigError(f"from step {level.first_step} on, {error}") from None
