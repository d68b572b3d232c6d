"""Scalars of the device on the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def read_scalars(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as floats. One copy from the device for any number of tensors."""
    scalars: dict[str, float] = {}
    tags = []
    tensors: list[Tensor] = []
    for tag, value in values.items():
        if isinstance(value, Tensor):
            scalars[tag] = 0.0  # keeps the order; replaced below
            tags.append(tag)
            tensors.append(value.detach().reshape(()).double())
        else:
            scalars[tag] = float(value)
    if tensors:
        device = tensors[0].device
        copied = torch.stack([tensor.to(device) for tensor in tensors]).tolist()
        scalars.update(zip(tags, copied, strict=True))
    return scalars
