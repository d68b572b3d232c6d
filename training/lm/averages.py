"""Moving averages of Megatron-core's float32 weights in its distributed checkpoints.

On disk they look like one of Adam's moments: whole tensors of the shape of each parameter,
`optimizer.state.ema.<name>`. They load into any parallel layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
    MixedPrecisionOptimizer,
)
from torch import Tensor, nn

from landiff.model_zoo.convert.formats.megatron import EMA_PREFIX
from landiff.training.ema import Ema


@dataclass(frozen=True)
class MasterWeight:
    """A float32 tensor that the optimizer updates, and which part of a parameter it is."""

    parameter: nn.Parameter
    weight: Tensor  # the parameter, a copy of it, or a flat part with the distributed optimizer
    start: int = 0  # first element of the flattened parameter


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The parts of a chained optimizer, or the optimizer itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def master_weights(optimizer: MegatronOptimizer) -> list[MasterWeight]:
    """This rank's part of the float32 weights that the optimizer updates."""
    found: list[MasterWeight] = []
    for part in parts_of(optimizer):
        if isinstance(part, DistributedOptimizer):
            found += _divided_weights(part)
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            pairs = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
            for parameters, weights in pairs:
                found += map(MasterWeight, parameters, weights)
            for parameters in part.fp32_from_fp32_groups:
                found += map(MasterWeight, parameters, parameters)
        else:
            parameters = part.get_parameters()
            found += map(MasterWeight, parameters, parameters)
    return found


def _divided_weights(part: DistributedOptimizer) -> Iterator[MasterWeight]:
    """The weights of one rank of the distributed optimizer: parts of some parameters."""
    groups = part.optimizer.param_groups
    for parameter, (group, order) in part.model_param_group_index_map.items():
        start = part._get_model_param_range_map(parameter)["param"].start
        yield MasterWeight(parameter, groups[group]["params"][order], start)


@torch.no_grad()
def copy_to_model(optimizer: MegatronOptimizer) -> None:
    """Cast the float32 weights to those of the model; if they are divided, this rank's part."""
    for part in parts_of(optimizer):
        if isinstance(part, MixedPrecisionOptimizer):
            part._copy_main_params_to_model_params()


class OwnedParts:
    """This rank's parts of float32 tensors that are divided over data-parallel ranks.

    A stand-in without data represents the whole tensor, flat or in its shape. Megatron-core gives
    names to it and to parts of it.
    """

    def __init__(self) -> None:
        """Nothing is owned."""
        # by the address of a stand-in's storage, which the tensor keeps alive
        self._owned: dict[int, tuple[Tensor, list[tuple[int, Tensor]]]] = {}

    def stand_in(self, shape: Sequence[int]) -> Tensor:
        """A stand-in for a whole tensor."""
        tensor = torch.empty(tuple(shape), dtype=torch.float32, device="meta")
        self._owned[tensor.untyped_storage()._cdata] = (tensor, [])
        return tensor

    def add(self, stand_in: Tensor, start: int, values: Tensor) -> None:
        """This rank holds elements from `start` of the flattened tensor."""
        flat = values.detach().view(-1)
        self._owned[stand_in.untyped_storage()._cdata][1].append((start, flat))

    def parts(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What this rank holds of a stand-in or of a contiguous part of it.

        Yields first element in the flattened `tensor`, and flat values.
        """
        assert tensor.is_contiguous(), tensor.shape
        begin = int(tensor.storage_offset())
        end = begin + tensor.numel()
        for start, values in self._owned[tensor.untyped_storage()._cdata][1]:
            low = max(begin, start)
            high = min(end, start + values.numel())
            if low < high:
                yield low - begin, values[low - start : high - start]


class ShardedAverages:
    """The moving averages of an optimizer's float32 weights, as entries of a sharded state."""

    def __init__(self, ema: Ema, masters: Sequence[MasterWeight], *, divided: bool) -> None:
        """`masters`: in the order of `ema.weights`. divided: over the data-parallel ranks."""
        self.ema = ema
        self.divided = divided
        self.held: dict[nn.Parameter, tuple[int, Tensor]] = {}  # start and average
        for master, average in zip(masters, ema.averages, strict=ema.enabled):
            self.held[master.parameter] = (master.start, average.view(-1))

    @torch.no_grad()
    def state(self, weights: Mapping[str, Any], owned: OwnedParts | None) -> dict[str, Any]:
        """Entries for the averages of all parameters in the sharded state `weights`.

        `owned` gets this rank's parts if the averages are divided. None for loading, which fills
        whole tensors. Empty without averages.
        """
        if not self.ema.enabled:
            return {}
        sharded = {}
        for entry in _parameters(weights):
            shape = entry.data.shape
            if owned is None:
                whole = torch.zeros(shape, dtype=torch.float32, device="cpu")
            elif not self.divided:
                whole = self.held[entry.data][1].view(shape)
            else:
                whole = owned.stand_in(shape)
                if entry.data in self.held:
                    owned.add(whole, *self.held[entry.data])
            prefix = EMA_PREFIX.removesuffix(".")
            sharded[entry.key] = make_sharded_optimizer_tensor(entry, whole, prefix)
        return sharded

    @torch.no_grad()
    def load(self, weights: Mapping[str, Any], whole: Mapping[str, Tensor]) -> None:
        """Take the averages in `whole`, which have the keys of `state`. They are not divided."""
        for entry in _parameters(weights):
            self.held[entry.data][1].copy_(whole[entry.key].view(-1))


def _parameters(weights: Mapping[str, Any]) -> Iterator[Any]:
    """The entries of a sharded state that are trained parameters.

    All ranks iterate in the same order.
    """
    entries, _ = extract_sharded_tensors_and_factories(dict(weights))
    for entry in nested_values(entries):
        if is_trained(entry):
            yield entry


def is_trained(entry: Any) -> bool:
    """Whether an entry of a sharded state is a trained parameter."""
    data = getattr(entry, "data", None)
    return isinstance(data, nn.Parameter) and data.requires_grad
