"""Linear layers with float8 matrix multiplications, with torchao.

The three matrix multiplications of a layer (output, gradient of the input, gradient of the weight)
have float8 operands. Inputs and weights are rounded to e4m3 (3 mantissa bits), gradients of outputs
to e5m2 (2 mantissa bits, for a wider range). Scaling is dynamic and per tensor: the largest element
is mapped to the largest float8 value. Accumulation is in float32, and results have the dtype of the
input.

Names, dtypes and gradients of the parameters, and checkpoints, do not depend on `fp8`.

torchao is imported in the functions: it takes seconds, and most runs do not need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from landiff.configs.base import ConfigError

OLDEST_CAPABILITY = (8, 9)  # of GPUs with float8 units: Ada. Hopper is 9.0.


def is_supported(device: torch.device) -> bool:
    """Whether a device supports float8 matrix multiplication. The CPU emulates it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def require_device(device: torch.device) -> None:
    """Raises ConfigError for a GPU that does not support float8 matrix multiplication."""
    if is_supported(device):
        return
    needed = "{}.{}".format(*OLDEST_CAPABILITY)
    found = "{}.{}".format(*torch.cuda.get_device_capability(device))
    raise ConfigError(
        f"fp8 = true needs a GPU of compute capability {needed} or newer, and "
        f"{torch.cuda.get_device_name(device)} has {found}; train on another GPU, or set fp8 = "
        "false"
    )


def convert(model: nn.Module, is_chosen: Callable[[str], bool]) -> None:
    """Converts linear layers of a model to float8, in place. Parameters stay the same objects.

    is_chosen: whether the layer of a name is one of them.
    """
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(
        model, module_filter_fn=lambda _, name: is_chosen(name), config=_settings()
    )


def product(weight: nn.Parameter) -> nn.Module:
    """A layer [..., columns] -> [..., rows] that multiplies by `weight` [rows, columns] in float8.

    Its parameter is `weight` itself.
    """
    from torchao.float8 import convert_to_float8_training

    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = weight
    return convert_to_float8_training(layer, config=_settings())


def _settings() -> Any:
    """torchao's settings. Without CUDA it multiplies the rounded operands in float32.

    The gradient of a weight is a sum over tokens, which are padded to a multiple of 16.
    """
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig(emulate=not torch.cuda.is_available(), pad_inner_dim=True)
