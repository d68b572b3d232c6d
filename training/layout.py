"""Division of ranks into model copies, and of a global batch into micro-batches. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping

from landiff.configs import Config, ConfigError
from landiff.data_pipeline.loading.config import require_micro_batches
from landiff.data_pipeline.loading.phases import batch_sizes
from landiff.training.config import TrainConfig
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig


def model_copies(config: Config, ranks: int) -> int:
    """Number of data-parallel copies of the model on `ranks` ranks.

    Raises ConfigError with the nearest valid numbers of ranks if they do not divide evenly.
    """
    if isinstance(config, DiffusionTrainConfig):
        _require_equal_nodes(config, ranks)
    sizes = copy_sizes(config)
    size = math.prod(sizes.values())
    if ranks % size == 0:
        return ranks // size
    below = ranks // size * size
    near = [below, below + size] if below else [size]
    raise ConfigError(
        f"{' * '.join(sizes)} = {' * '.join(map(str, sizes.values()))} does not divide the {ranks} "
        f"launched ranks; launch a multiple of {size} or lower {', '.join(sizes)}; the nearest "
        f"numbers of ranks that do: {' or '.join(map(str, near))}"
    )


def _require_equal_nodes(config: DiffusionTrainConfig, ranks: int) -> None:
    """Raise ConfigError if hierarchical ZeRO has ranks left over."""
    size = config.zero.hpz_partition_size
    if ranks > size and ranks % size:
        below = ranks // size * size
        raise ConfigError(
            f"zero.hpz_partition_size = {size} does not divide the {ranks} launched ranks; the "
            f"nearest numbers of ranks that it does: {below} or {below + size}"
        )


def data_rank(config: Config, rank: int, ranks: int) -> tuple[int, int]:
    """Number of the copy of the model that `rank` belongs to, and number of copies.

    All ranks of a copy read the same clips. For engines whose copies are neighboring ranks.
    """
    return rank // copy_size(config), model_copies(config, ranks)


def copy_size(config: Config) -> int:
    """Number of ranks that one copy of the model takes."""
    return math.prod(copy_sizes(config).values())


def copy_sizes(config: Config) -> Mapping[str, int]:
    """Ranks that divide one copy of the model, by config key, without those of 1.

    Their product is the ranks of a copy.
    """
    sizes: dict[str, int] = {}
    if isinstance(config, LMTrainConfig):
        for name in ("tensor", "pipeline", "context"):
            sizes[f"parallel.{name}"] = getattr(config.parallel, name)
    if isinstance(config, DiffusionTrainConfig):
        sizes["sequence_parallel"] = config.sequence_parallel
    return {name: size for name, size in sizes.items() if size > 1}


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
