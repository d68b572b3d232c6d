"""Memory of models of any size, counted with tensors that have no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode


def make_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace the weights of a module on the meta device by fake ones. Call in a FakeTensorMode."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            fake = nn.Parameter(
                torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad
            )
            fake.__dict__.update(parameter.__dict__)
            setattr(part, name, fake)
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def kept_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a forward pass, without the weights of `module`."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    storages: dict[int, Any] = {}  # held, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    assert result is not None
    return sum(storage.nbytes() for storage in storages.values())


def fake_mode() -> FakeTensorMode:
    """A mode in which tensors have sizes and no data. Real ones may be mixed in."""
    return FakeTensorMode(allow_non_fake_inputs=True)
