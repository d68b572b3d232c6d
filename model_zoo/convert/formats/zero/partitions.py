"""Where the elements of each tensor lie in the flat vectors of a ZeRO checkpoint.

The layout of the vectors is described in `formats.deepspeed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch

from landiff.configs import ConfigError
from landiff.model_zoo.convert.formats.zero.state import ScatteredTensor
from landiff.model_zoo.convert.lazy import Stored

Vectors = Sequence[Sequence[Stored]]  # flat vectors by rank and group
Shapes = Sequence[Mapping[str, torch.Size]]  # shapes of trainable parameters by group and name


def whole(stored: Stored) -> ScatteredTensor:
    """A tensor that lies in one place."""
    return ScatteredTensor(torch.Size(stored.shape), (stored,))


def frozen_of_stage_2(model: Mapping[str, Any], trainable: Set[str]) -> dict[str, ScatteredTensor]:
    """Frozen parameters and buffers in ZeRO 1 and 2, whole in the single model file."""
    found = {}
    for name, tensor in model["module"].items():
        if name not in trainable and isinstance(tensor, Stored):
            found[name] = whole(tensor)
    return found


def frozen_of_stage_3(models: Sequence[Mapping[str, Any]]) -> dict[str, ScatteredTensor]:
    """Frozen parameters and buffers in ZeRO 3.

    Buffers are whole in every model file. Frozen parameters are divided into equal slices; the last
    ones are padded.
    """
    first = models[0]
    found = {name: whole(first["module"][name]) for name in first["buffer_names"]}
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        slices = [model["frozen_param_fragments"][name] for model in models]
        found[name] = _concatenated(torch.Size(shape), slices)
    return found


def trainable_of_stage_2(
    shapes: Shapes, shards: Sequence[Mapping[str, Any]], vectors: Vectors
) -> dict[str, ScatteredTensor]:
    """Trainable parameters, or a moment of them, in ZeRO 1 and 2.

    The file of each rank lists its fragments; in the order of ranks, these make up the parameters.
    """
    pieces: dict[str, list[Stored]] = {name: [] for name, _ in _all_shapes(shapes)}
    for rank, shard in enumerate(shards):
        _refuse_inner_padding(shard)
        for group, fragments in enumerate(shard["param_slice_mappings"]):
            for name, address in fragments.items():
                piece = _part_of_vector(vectors[rank][group], address.start, address.numel)
                pieces[name].append(piece)
    found = {}
    for name, shape in _all_shapes(shapes):
        held = sum(piece.shape[0] for piece in pieces[name])
        assert held == shape.numel(), f"{name}: the shards hold {held} of {shape.numel()} elements"
        found[name] = ScatteredTensor(shape, tuple(pieces[name]))
    return found


def trainable_of_stage_3(
    shapes: Shapes, shards: Sequence[Mapping[str, Any]], vectors: Vectors
) -> dict[str, ScatteredTensor]:
    """Trainable parameters, or a moment of them, in ZeRO 3.

    The slices of a parameter are equally large and lie at the same position in the vectors of every
    rank. The last slice is padded.
    """
    found = {}
    index = 0  # of the vector
    start = 0  # of the slice in the vector
    for name, shape in _all_shapes(shapes):
        size = math.ceil(shape.numel() / len(shards))
        while start >= vectors[0][index].shape[0] and index + 1 < len(vectors[0]):
            index += 1
            start = 0
        remaining = shape.numel()
        pieces = []
        for rank_vectors in vectors:
            numel = min(size, remaining)
            pieces.append(_part_of_vector(rank_vectors[index], start, numel))
            remaining -= numel
        found[name] = ScatteredTensor(shape, tuple(pieces))
        start += size
    return found


def _all_shapes(shapes: Shapes) -> Iterator[tuple[str, torch.Size]]:
    """Name and shape of all parameters, group by group."""
    for group in shapes:
        yield from group.items()


def _refuse_inner_padding(shard: Mapping[str, Any]) -> None:
    for padding in shard.get("param_alignment_paddings") or []:
        if isinstance(padding, list) and any(padding):
            raise ConfigError(
                "this checkpoint pads parameters inside its flat groups, which is not supported"
            )


def _concatenated(shape: torch.Size, vectors: Sequence[Stored]) -> ScatteredTensor:
    """A tensor that fills `vectors` one after the other; elements beyond it are padding."""
    remaining = shape.numel()
    pieces = []
    for vector in vectors:
        numel = min(remaining, torch.Size(vector.shape).numel())
        pieces.append(_part_of_vector(vector, 0, numel))
        remaining -= numel
    assert remaining == 0, f"{remaining} of {shape.numel()} elements are missing in the shards"
    return ScatteredTensor(shape, tuple(pieces))


def _part_of_vector(vector: Stored, start: int, numel: int) -> Stored:
    """Elements [start, start + numel) of a vector, which may be a view of a larger one."""
    assert len(vector.shape) == 1 and vector.stride in (None, (1,)), vector
    return Stored(vector.path, vector.start, vector.dtype, (numel,), (1,), vector.offset + start)
