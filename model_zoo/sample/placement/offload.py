"""Weights that are on the device only while they are used, and otherwise in host memory.

Whole parts move to the device when they are used. Blocks or single layers of a large part can move
separately: the device then holds one block, and the weights outside of blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from landiff.model_zoo.sample.placement.quantized import plain_tensors

# What moves at once: a whole module, one of the blocks of its lists, or one layer of these.
Level = Literal["part", "block", "layer"]
OUTSIDE = -1  # in place of the number of a block


class OffloadedModule:
    """A module whose weights are on `device` between `enter` and `leave`.

    With the level "block" or "layer" the weights of blocks are there only during their `forward`.
    Where weights are not on the device they are empty tensors of the device, so that other uses
    fail. The weights must not change.
    """

    def __init__(self, module: nn.Module, device: torch.device, level: Level) -> None:
        self._hooks: list[Any] = []
        self._units: list[_Tensors] = []
        units = list(_units(module, level))
        owners = _owners(module, units)
        rest = []  # what is in no block, or in several
        for tensor in _tensors(module):
            if OUTSIDE in owners[id(tensor)] or len(owners[id(tensor)]) > 1:
                rest.append(tensor)
        self._rest = _Tensors(rest, device)
        for number, unit in enumerate(units):
            own = [tensor for tensor in _tensors(unit) if owners[id(tensor)] == {number}]
            moved = _Tensors(own, device)
            self._units.append(moved)
            self._hooks.append(unit.register_forward_pre_hook(moved.enter))
            self._hooks.append(unit.register_forward_hook(moved.leave, always_call=True))

    @property
    def device_bytes(self) -> int:
        """The most bytes of weights that are on the device at once."""
        return self._rest.num_bytes + max([unit.num_bytes for unit in self._units], default=0)

    def enter(self) -> None:
        """Moves everything to the device that does not move on its own."""
        self._rest.enter()

    def leave(self) -> None:
        """Frees the memory of the device."""
        self._rest.leave()

    def restore(self) -> None:
        """Puts all weights back into the module, in the memory of the host, for good."""
        for hook in self._hooks:
            hook.remove()
        for tensors in (self._rest, *self._units):
            tensors.restore()


class _Tensors:
    """Tensors that move together. They are empty at first."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self._device = device
        self._host = [(tensor, tensor.data) for tensor in tensors]
        self.leave()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(host.numel() * host.itemsize for _, host in self._host)

    def enter(self, *_: Any) -> None:
        """Copies the tensors to the device."""
        for tensor, host in self._host:
            tensor.data = host.to(self._device)

    def leave(self, *_: Any) -> None:
        """Frees the copies."""
        for tensor, host in self._host:
            tensor.data = torch.empty(0, dtype=host.dtype, device=self._device)

    def restore(self) -> None:
        """The tensors of the host. They do not move any more."""
        for tensor, host in self._host:
            tensor.data = host
        self._host = []


def _units(module: nn.Module, level: Level) -> Iterator[nn.Module]:
    """The modules that move on their own: elements of lists of modules, or layers in them."""
    if level == "part":
        return
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield from _units(child, level)
            continue
        for block in child:
            if level == "block":
                yield block
            else:
                yield from (layer for layer in block.modules() if not list(layer.children()))


def _owners(module: nn.Module, units: Sequence[nn.Module]) -> dict[int, set[int]]:
    """Numbers of the units that hold a tensor, by its id; `OUTSIDE` for other modules."""
    unit_of: dict[nn.Module, int] = {}
    for number, unit in enumerate(units):
        unit_of |= dict.fromkeys(unit.modules(), number)
    owners: dict[int, set[int]] = {}
    for part in module.modules():
        for tensor in _tensors(part, recurse=False):
            owners.setdefault(id(tensor), set()).add(unit_of.get(part, OUTSIDE))
    return owners


def _tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[Tensor]:
    """Parameters and buffers, each once; what a quantized parameter consists of in its place."""
    for parameter in module.parameters(recurse):
        yield from plain_tensors(parameter)
    yield from module.buffers(recurse)
