"""Modules whose weights are created one at a time, in their final dtype and on their final device.

torch creates modules in float32 on the CPU, to be cast and moved afterwards. That takes 4 bytes of
host memory per weight in each rank. In `weights_in`, each weight is allocated where it stays. Its
random numbers are drawn in float32 on the CPU and then copied, so the weights are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.rules import check_against

DRAWS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)


class _DrawnOnCpu(TorchDispatchMode):
    """Draws the random numbers of in-place initializations in float32 on the CPU.

    drawing: whether numbers are drawn. Otherwise the weights stay undefined.
    """

    def __init__(self, drawing: bool) -> None:
        super().__init__()
        self.drawing = drawing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with these changes."""
        if func not in DRAWS:
            # Its numbers would depend on dtype and device.
            assert torch.Tag.nondeterministic_seeded not in func.tags, func
            return func(*args, **(kwargs or {}))
        weight, *limits = args
        if self.drawing:
            numbers = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
            weight.copy_(func(numbers, *limits, **(kwargs or {})))
        return weight


@contextmanager
def weights_in(dtype: torch.dtype, device: torch.device, *, drawing: bool = True) -> Iterator[None]:
    """Context in which modules are created with weights in `dtype` on `device`.

    The weights are those of a float32 module on the CPU that is cast and moved afterwards, and
    torch's global generator draws the same numbers. Host memory beside the weights: one of them in
    float32.

    drawing: False leaves random weights undefined, for modules whose weights are all replaced.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, _DrawnOnCpu(drawing):
            yield
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def copy_weights(model: nn.Module, weights: LazyTensors, source: str) -> None:
    """Read all weights of a model, one at a time, into its own dtypes and device.

    source: what `weights` are, for messages. Raises ConversionError if names or shapes do not fit.
    """
    state = model.state_dict()
    check_against(weights.meta, {name: tensor.shape for name, tensor in state.items()}, source)
    for name, tensor in state.items():
        tensor.copy_(weights[name])
