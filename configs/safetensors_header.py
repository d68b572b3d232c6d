"""Bounded reader for the header of a safetensors file. Torch-free.

A file consists of 8 bytes (length of the header, little-endian), the header (a JSON object that
maps names to dtype, shape and byte range) and the bytes of the tensors. The header is checked
completely before memory is allocated for tensors.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landiff.configs.documents import DocumentError, parse_json, shown

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMENSIONS = 32
METADATA = "__metadata__"
ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of a file; its bytes are [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file. `data_start` is the position of the first tensor's bytes."""

    entries: dict[str, HeaderEntry]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """The header of a file, checked against the file's size. Raises DocumentError, OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2:
            raise DocumentError(f"{path} is not a safetensors file, or a damaged one")
        if length > size - 8:
            raise DocumentError(
                f"{path} is not a safetensors file, or a damaged one: its header would have "
                f"{length} bytes, the file has {size}"
            )
        if length > MAX_HEADER:
            raise DocumentError(f"{path} has a header of {length} bytes, more than {MAX_HEADER}")
        data = file.read(length)
    origin = f"{path}: the safetensors header"
    entries, metadata = parse_header(data, origin)
    expected = 8 + length + filled_bytes(entries, origin)
    if expected != size:
        raise DocumentError(
            f"{path} has {size} bytes, its header describes {expected}; it is damaged"
        )
    return Header(entries, metadata, 8 + length)


def parse_header(data: bytes, origin: str) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    """The header in `data` as (entries by name, metadata). Raises DocumentError."""
    document = parse_json(data, origin)
    if not isinstance(document, dict):
        raise DocumentError(f"{origin} is not an object of tensors")
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise DocumentError(f"{origin}: {METADATA} is not an object")
    entries = {name: _entry(name, entry, origin) for name, entry in document.items()}
    return entries, {key: str(value) for key, value in metadata.items()}


def _entry(name: str, entry: Any, origin: str) -> HeaderEntry:
    """A checked entry. Raises DocumentError if its dtype, shape and byte range do not agree."""
    where = f"{origin}, tensor {shown(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise DocumentError(f"{where} has no dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise DocumentError(f"{where} has the unknown dtype {shown(str(dtype))}")
    shape = entry["shape"]
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise DocumentError(f"{where} has the shape {shown(str(shape))}")
    offsets = entry["data_offsets"]
    if not _are_counts(offsets) or len(offsets) != 2:
        raise DocumentError(f"{where} has the data_offsets {shown(str(offsets))}")
    size = math.prod(shape) * ITEM_BITS[dtype] // 8
    begin, end = offsets
    if end - begin != size:
        raise DocumentError(
            f"{where}: {dtype} {shown(str(shape))} has {size} bytes, its data_offsets "
            f"{begin}..{end} have {end - begin}"
        )
    return HeaderEntry(dtype, tuple(shape), begin, end)


def _are_counts(values: Any) -> bool:
    """Whether `values` is a list of integers of at least 0."""
    if not isinstance(values, list):
        return False
    return all(type(value) is int and value >= 0 for value in values)


def filled_bytes(entries: dict[str, HeaderEntry], origin: str) -> int:
    """Total bytes of the tensors. Raises DocumentError if their ranges overlap or leave a gap."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = "overlaps the tensor before it" if entry.begin < position else "leaves a gap"
            raise DocumentError(
                f"{origin}, tensor {shown(name)}: its byte range {fault}; the file is damaged"
            )
        position = entry.end
    return position
