"""Files of torch.distributed.checkpoint (`*.distcp` and `.metadata`), described and not written.

torch's own writer copies, plans and writes in one collective call. Here each rank describes its
pieces of tensors; rank 0 also gets the metadata, which say where the pieces of all ranks are. These
change only if a size does, so that only the first save exchanges more than one number.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from landiff.training.checkpoint.parts import Part, StateFile, part_bytes, tensor_archive

METADATA = ".metadata"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, or an object, that this rank writes.

    key: name of the tensor or object.
    data: the box, or the bytes of an object.
    offsets: of the box in the tensor.
    shape: of the whole tensor.
    """

    key: str
    data: Tensor | bytes
    offsets: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a piece is in its file, without its data."""

    key: str
    path: str
    start: int
    length: int
    dtype: torch.dtype | None  # None for an object
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]


def boxes(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that make up the elements [start, stop) of a tensor, in order.

    At most 2 n - 1 boxes for n dimensions: some rows, and parts of the rows before and after.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    zeros = (0,) * (len(shape) - 1)
    first = start // row
    if start % row or stop < (first + 1) * row:
        end = min(stop, (first + 1) * row)
        for offsets, sizes in boxes(shape[1:], start - first * row, end - first * row):
            yield (first, *offsets), (1, *sizes)
        yield from boxes(shape, end, stop)
        return
    rows = stop // row - first
    yield (first, *zeros), (rows, *shape[1:])
    yield from boxes(shape, (first + rows) * row, stop)


class DistFiles:
    """The files of all saves of one engine."""

    def __init__(self) -> None:
        """Nothing is known of other ranks yet."""
        self._places: list[Place] | None = None
        self._metadata = b""  # on rank 0

    def files(self, pieces: Sequence[Piece], device: torch.device) -> list[StateFile]:
        """The files of this rank. Collective over all ranks; `device`: of their messages."""
        name = f"__{dist.get_rank()}_0.distcp"
        parts: list[Part] = []
        places = []
        position = 0
        for piece in pieces:
            content = [piece.data] if isinstance(piece.data, bytes) else tensor_archive(piece.data)
            length = sum(map(part_bytes, content))
            places.append(_place(piece, name, position, length))
            parts += content
            position += length
        changed = torch.tensor(int(places != self._places), device=device)
        dist.all_reduce(changed, op=dist.ReduceOp.MAX)
        if changed:
            self._places = places
            self._gather(places)
        files = [StateFile(name, parts)] if parts else []
        if dist.get_rank() == 0:
            files.append(StateFile(METADATA, [self._metadata]))
        return files

    def _gather(self, places: list[Place]) -> None:
        """Make the metadata from the places of all ranks, on rank 0."""
        if dist.get_rank() > 0:
            dist.gather_object(places)
            return
        gathered: list[list[Place]] = [[]] * dist.get_world_size()
        dist.gather_object(places, gathered)
        self._metadata = pickle.dumps(metadata_of([place for part in gathered for place in part]))


def _place(piece: Piece, path: str, start: int, length: int) -> Place:
    if isinstance(piece.data, bytes):
        return Place(piece.key, path, start, length, None, (), (), ())
    sizes = tuple(piece.data.shape)
    dtype = piece.data.dtype
    return Place(piece.key, path, start, length, dtype, piece.offsets, sizes, piece.shape)


def metadata_of(places: Sequence[Place]) -> Metadata:
    """The content of `.metadata`. The pieces of each tensor must be complete and disjoint."""
    entries: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for place in places:
        info = _StorageInfo(place.path, place.start, place.length)
        if place.dtype is None:
            assert place.key not in entries, place
            entries[place.key] = BytesStorageMetadata()
            stored[MetadataIndex(place.key)] = info
            continue
        if place.key not in entries:
            properties = TensorProperties(dtype=place.dtype)
            entries[place.key] = TensorStorageMetadata(properties, torch.Size(place.shape), [])
        entry = entries[place.key]
        assert (entry.properties.dtype, tuple(entry.size)) == (place.dtype, place.shape), place
        offsets = torch.Size(place.offsets)
        index = MetadataIndex(place.key, offsets, len(entry.chunks))
        assert index not in stored, place
        stored[index] = info
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(place.sizes)))
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            held = sum(prod(chunk.sizes) for chunk in entry.chunks)
            assert held == prod(entry.size), f"{held} of {prod(entry.size)} elements of {key}"
    return Metadata(entries, storage_data=stored, version="1.0.0")
