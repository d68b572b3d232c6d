"""Device of a job without ranks, and copies to a device.

Trainers get their device from training/distributed.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from landiff.configs.base import ConfigError


def pick_device(name: str) -> torch.device:
    """Device of a name. `auto` is the first GPU, or the CPU if there is none.

    Raises ConfigError for a name that torch does not know, or a device that this machine lacks.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device = {name} cannot be used: {reason}; set device=auto or device=cpu"
        ) from None
    return device


def keeping_dtype(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `function` does to the device of a tensor, without its cast. For `nn.Module._apply`."""

    def moved(tensor: Tensor) -> Tensor:
        result = function(tensor)
        if result.dtype != tensor.dtype:
            return tensor.to(result.device)
        return result

    return moved


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`, copied to a GPU without waiting for it.

    Copies from pageable memory would wait: they are made from pinned memory, which PyTorch keeps
    for later copies once it is free.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
