"""Boxes of tensors that are stored in several parts."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest
import torch

from landiff.model_zoo.convert import lazy
from landiff.model_zoo.convert.formats.dist_checkpoint import METADATA, DistReader
from landiff.model_zoo.convert.rules import ConversionError
from landiff.training.checkpoint.dist_files import Place, metadata_of
from landiff.training.checkpoint.parts import (
    Part,
    StateFile,
    part_bytes,
    tensor_archive,
    write_file,
)

WHOLE = torch.arange(4 * 3 * 5, dtype=torch.float32).view(4, 3, 5)
Sizes = tuple[int, ...]
PARTS: list[tuple[Sizes, Sizes]] = [  # offsets and sizes
    ((0, 0, 0), (2, 3, 5)),
    ((2, 0, 0), (1, 2, 5)),
    ((2, 2, 0), (1, 1, 2)),
    ((2, 2, 2), (1, 1, 3)),
    ((3, 0, 0), (1, 3, 5)),
]


def box(tensor: torch.Tensor, offsets: Sizes, sizes: Sizes) -> torch.Tensor:
    ranges = zip(offsets, sizes, strict=True)
    return tensor[tuple(slice(start, start + size) for start, size in ranges)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one tensor in five parts, and of a single number."""
    parts: list[Part] = []
    places = []
    position = 0
    stored: list[tuple[str, torch.Tensor, Sizes, Sizes]] = []
    stored += [("tensor", WHOLE, *part) for part in PARTS]
    stored.append(("number", torch.tensor(7.0), (), ()))
    for key, tensor, offsets, sizes in stored:
        content = tensor_archive(box(tensor, offsets, sizes).contiguous())
        length = sum(map(part_bytes, content))
        shape = tuple(tensor.shape)
        place = Place(key, "a.distcp", position, length, tensor.dtype, offsets, sizes, shape)
        places.append(place)
        parts += content
        position += length
    write_file(tmp_path, StateFile("a.distcp", parts))
    metadata = metadata_of(places)
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    return tmp_path


def test_every_box_is_read_from_the_parts_that_it_shares_elements_with(folder):
    reader = DistReader(folder)
    ranges = [itertools.combinations(range(size + 1), 2) for size in WHOLE.shape]
    count = 0
    for (a, b), (c, d), (e, f) in itertools.product(*map(list, ranges)):
        if (a + 2 * b + 3 * c + d + e + f) % 9:  # a ninth of the 900 boxes
            continue
        target = torch.full((b - a, d - c, f - e), -1.0)
        reader.read_box("tensor", (a, c, e), target)
        assert torch.equal(target, WHOLE[a:b, c:d, e:f])
        count += 1
    assert count >= 90
    number = torch.zeros(())
    reader.read_box("number", (), number)
    assert number == 7


def test_of_a_part_only_shared_rows_are_read(folder, monkeypatch):
    read: list[int] = []
    original = lazy.Stored.part

    def part(self: lazy.Stored, start: int, numel: int) -> torch.Tensor:
        read.append(numel)
        return original(self, start, numel)

    monkeypatch.setattr(lazy.Stored, "part", part)
    target = torch.zeros(1, 2, 5)
    DistReader(folder).read_box("tensor", (1, 1, 0), target)
    assert torch.equal(target, WHOLE[1:2, 1:3])
    assert read == [2 * 5]  # of the 30 elements of the first part


def test_an_incomplete_tensor_is_refused(folder):
    reader = DistReader(folder)
    reader.entries["tensor"].chunks.pop(1)
    with pytest.raises(ConversionError, match="holds 5 of the 15 elements of tensor"):
        reader.read_box("tensor", (2, 0, 0), torch.zeros(1, 3, 5))
