"""Weights of transformer blocks as 8-bit integers, to sample with less memory. Needs torchao.

Each row of a weight is one float32 scale times integers from -128 to 127. Activations keep their
dtype: a layer casts its own weight to it while it runs. Embeddings, norms, biases, and the layers
before and after the blocks are not quantized.

Importing this module imports neither torch nor torchao.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from landiff.configs.base import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKAGE = "torchao"
WAY_OUT = "install it with pip install 'landiff-pretrain[quantize]', or do not quantize"
# A weight in an element of a list of modules: of a block, or of a projection of the control branch.
BLOCK_WEIGHT = re.compile(r".*\.\d+\.(?:.*\.)?weight")


def is_block_weight(name: str, num_dims: int) -> bool:
    """Whether a weight of this name and number of dimensions is one of those that are quantized."""
    return num_dims == 2 and BLOCK_WEIGHT.fullmatch(name) is not None


def quantized_bytes(rows: int, columns: int) -> int:
    """Bytes of a quantized weight: its integers, and a scale and a zero point for each row."""
    return rows * columns + rows * (4 + 1)


def quantize_blocks(model: nn.Module) -> None:
    """Quantizes the linear layers in the blocks of a model to int8, in place.

    Raises ConfigError if torchao is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(f"int8 weights need the package {PACKAGE}, which is missing; {WAY_OUT}")
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_chosen(layer: nn.Module, name: str) -> bool:
        if not isinstance(layer, nn.Linear) or is_quantized(layer.weight):
            return False
        return is_block_weight(f"{name}.weight", layer.weight.ndim)

    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), is_chosen)


def is_quantized(tensor: Tensor) -> bool:
    """Whether this is a weight that torchao has quantized."""
    return type(tensor).__module__.partition(".")[0] == PACKAGE


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself, or those that a quantized one consists of."""
    if not is_quantized(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        yield getattr(tensor, name)


def refuse_quantized(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises ConfigError if one of the tensors is quantized.

    what: that quantized weights cannot be, for the message.
    """
    for name, tensor in tensors.items():
        if is_quantized(tensor):
            raise ConfigError(
                f"weights quantized to int8, such as {name}, cannot be {what}; load the model "
                "again without quantization"
            )
