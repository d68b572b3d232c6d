"""A DeepSpeed checkpoint by parameter name, and placeholders for the DeepSpeed classes in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from landiff.model_zoo.convert.lazy import LazyTensors, Stored

# ---------------------------------------------------------------- placeholders of DeepSpeed classes


class LossScaler:
    """Placeholder for DeepSpeed's static loss scaler."""

    def __init__(self, scale: float) -> None:
        """Keep the scale under DeepSpeed's names."""
        self.cur_scale = scale
        self.dynamic = False


class DynamicLossScaler:
    """Placeholder for DeepSpeed's dynamic loss scaler, with whatever attributes it has."""


class FragmentAddress:
    """Placeholder for the location of a parameter's fragment in a rank's flat vector."""

    def __init__(self, numel: int, start: int) -> None:
        """Keep the number of elements and the first element."""
        self.numel = numel
        self.start = start


class ZeroStage:
    """Placeholder for DeepSpeed's enumeration of ZeRO stages."""

    def __init__(self, stage: int) -> None:
        """Keep the stage as an integer."""
        self.stage = stage

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """Pickle as a call with the stage, as an enumeration does."""
        return ZeroStage, (self.stage,)


# Class in the pickle -> its placeholder. All other classes are refused.
CLASSES: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": ZeroStage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": DynamicLossScaler,
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
}


# ---------------------------------------------------------------- tensors by parameter name


class TensorPlace(Protocol):
    """A tensor that can be read whole or in part."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        ...

    def part(self, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor."""
        ...

    def read(self) -> Tensor:
        """The whole tensor."""
        ...


@dataclass(frozen=True)
class ScatteredTensor:
    """A tensor whose elements lie in several places, in order."""

    shape: torch.Size
    pieces: tuple[Stored, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all pieces."""
        return self.pieces[0].dtype

    def part(self, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor; nothing else is read."""
        found = []
        for piece in self.pieces:
            size = torch.Size(piece.shape).numel()
            first = max(start, 0)
            end = min(start + numel, size)
            if first < end:
                found.append(piece.part(first, end - first))
            start -= size
        if not found:
            return torch.empty(0, dtype=self.dtype)
        if len(found) == 1:
            return found[0]
        return torch.cat(found)

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.part(0, self.shape.numel()).view(self.shape)


@dataclass(frozen=True)
class LazyTensorPlace:
    """A tensor of a lazy mapping, as a `TensorPlace`."""

    tensors: LazyTensors
    name: str

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.tensors.meta[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.tensors.meta[self.name].dtype

    def part(self, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor."""
        return self.read().reshape(-1)[start : start + numel]

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.tensors.read(self.name)


@dataclass(frozen=True)
class TensorsByName(Mapping[str, Tensor]):
    """Mapping of tensors that are read on access and not cached."""

    places: Mapping[str, TensorPlace]

    def __getitem__(self, name: str) -> Tensor:
        """Read the tensor `name`."""
        return self.places[name].read()

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor `name`. Mapping's own method would read it."""
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.places)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self.places)


@dataclass(frozen=True)
class OptimizerGroup:
    """A parameter group of the optimizer."""

    names: tuple[str, ...]  # in the order of the flat vectors
    settings: Mapping[str, Any]  # lr, betas, ...


@dataclass(frozen=True)
class DeepSpeedState:
    """A checkpoint by parameter name, independent of ZeRO stage and world size."""

    zero_stage: int  # 0: whole weights without an optimizer
    world_size: int
    # Trainable parameters as float32 master weights; frozen parameters and buffers as stored.
    places: Mapping[str, TensorPlace]
    groups: tuple[OptimizerGroup, ...]
    buffers: tuple[str, ...]
    working: Mapping[str, torch.dtype]  # dtype of each parameter and buffer in the module
    # "exp_avg" | "exp_avg_sq" -> float32 moments by name of trainable parameter
    moment_places: Mapping[str, Mapping[str, TensorPlace]]
    optimizer_steps: int  # Adam's own step count
    # State of the optimizer per vector that is not a vector itself: the step, in its stored form.
    numbers: Mapping[str, Any] = field(default_factory=dict)
    # Other entries of the optimizer files, equal on all ranks.
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    # Other entries of the model file: step counts, schedules, the user's client state.
    rest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> TensorsByName:
        """All parameters and buffers, read on access."""
        return TensorsByName(self.places)

    @property
    def moments(self) -> dict[str, TensorsByName]:
        """The moments of the optimizer, read on access."""
        return {key: TensorsByName(places) for key, places in self.moment_places.items()}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of all parameters and buffers."""
        return {name: place.shape for name, place in self.places.items()}

    @property
    def trainable(self) -> frozenset[str]:
        """Names of the parameters that the optimizer trains."""
        names: set[str] = set()
        for group in self.groups:
            names.update(group.names)
        return frozenset(names)
