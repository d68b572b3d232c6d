"""Do model, batch and ranks divide? Asked before anything is queued. Torch-free."""

from __future__ import annotations

from configs import Config, ConfigError
from training.lm.config import LMTrainConfig


def model_copies(config: Config, gpus: int) -> int:
    """Data-parallel copies of the model on `gpus` ranks. Raises ConfigError with the nearest numbers of ranks."""
    if not isinstance(config, LMTrainConfig):
        return gpus
    return check_world(gpus, copy_size(config), "parallel.tensor * parallel.pipeline")


def copy_size(config: Config) -> int:
    """Ranks that one copy of the model takes."""
    if not isinstance(config, LMTrainConfig):
        return 1
    return config.parallel.tensor * config.parallel.pipeline


def check_batch(config: Config, gpus: int) -> int:
    """Micro-batches of one rank in one step. Raises ConfigError."""
    copies = model_copies(config, gpus)
    micro, batch = config.data.micro_batch_size, config.data.global_batch_size
    unit = micro * copies
    if batch % unit:
        near = sorted({max(unit, batch // unit * unit), (batch // unit + 1) * unit})
        ranks = gpus // copies  # of one copy
        fit = [number for number in range(1, batch // micro + 1) if batch % (micro * number) == 0]
        others = [*[n for n in fit if n < copies][-1:], *[n for n in fit if n > copies][:1]]
        raise ConfigError(
            f"data.global_batch_size = {batch} does not divide into data.micro_batch_size * data-parallel copies = {micro} * {copies} "
            f"on {gpus} GPUs; the nearest that do: {' or '.join(map(str, near))}"
            + (f"; or {' or '.join(str(n * ranks) for n in others)} GPUs" if others else "")
        )
    return batch // unit


def check_world(gpus: int, unit: int, what: str) -> int:
    """Copies of the model."""
    if gpus % unit:
        near = sorted({max(unit, gpus // unit * unit), (gpus // unit + 1) * unit})
        raise ConfigError(f"{what} = {unit} does not divide {gpus} GPUs; the nearest numbers of GPUs that do: {' or '.join(map(str, near))}")
    return gpus // unit
