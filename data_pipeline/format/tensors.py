"""One tensor in one safetensors file, in bytes and in memory without a copy; and memory that is used again."""

from __future__ import annotations

import json
import struct
import sys
import threading
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from landiff.configs.safetensors_header import parse_header

BUFFER_SLACK = 1 << 20
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # safetensors' names
CODES = {dtype: code for code, dtype in DTYPES.items()}
BEFORE_CRC = b'{"__metadata__":{"crc32":"'  # how `pack_tensor` begins a header
CRC = slice(len(BEFORE_CRC), len(BEFORE_CRC) + 8)
HEADERS_KEPT = 4096  # parsed ones; of a column whose samples differ in length, one for each length


def pack_tensor(name: str, tensor: Tensor) -> bytes:
    """One tensor as a safetensors file whose bytes depend on nothing else."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    header = json.dumps(
        {
            "__metadata__": {"crc32": f"{zlib.crc32(data):08x}"},
            name: {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [0, len(data)],
            },
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


@dataclass(frozen=True)
class _Layout:
    """What a safetensors header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # in the bytes behind the header
    end: int
    crc32: str  # of the tensor's bytes, "" where the header has none


def parse_tensor(part: np.ndarray, name: str, *, checksum: bool = False) -> Tensor:
    """The tensor `name` of a safetensors file in memory (uint8 [size], writable, its address a multiple of 8); shares its memory.

    Raises ValueError where the bytes are no such file, or with `checksum` where they are not those that were written.
    """
    size = part.size
    if size < 8:
        raise ValueError(f"{size} bytes are no safetensors file")
    (length,) = struct.unpack_from("<Q", part)
    if length > size - 8:
        raise ValueError(f"the safetensors header claims {length} bytes of {size}")
    header, written = part[8 : 8 + length].tobytes(), b""
    if header.startswith(BEFORE_CRC):  # all else of it is the same for all samples of a shape
        header, written = header[: CRC.start] + header[CRC.stop :], header[CRC]
    layout = _parse_header(header, name)
    if layout.end > size - 8 - length:
        raise ValueError(
            f"the safetensors header gives {layout.dtype} {list(layout.shape)} the bytes {layout.begin}..{layout.end} "
            f"of {size - 8 - length}"
        )
    begin, end = 8 + length + layout.begin, 8 + length + layout.end
    if checksum and (expected := written.decode("latin-1") or layout.crc32):
        found = f"{zlib.crc32(part[begin:end]):08x}"
        if found != expected:
            raise ValueError(
                f"the tensor's bytes have CRC-32 {found}, they were written with {expected}"
            )
    if begin == end:
        return torch.empty(layout.shape, dtype=layout.dtype)
    if begin % layout.dtype.itemsize:  # only where another writer left its header unpadded
        part, begin, end = part[begin:end].copy(), 0, end - begin
    return torch.frombuffer(
        part, dtype=layout.dtype, count=(end - begin) // layout.dtype.itemsize, offset=begin
    ).view(layout.shape)


@lru_cache(HEADERS_KEPT)
def _parse_header(header: bytes, name: str) -> _Layout:
    """Raises ValueError where it does not describe a tensor `name`."""
    entries, metadata = parse_header(header, "the safetensors header")
    entry = entries.get(name)
    if entry is None or entry.dtype not in DTYPES:
        raise ValueError(f"the safetensors header holds no readable tensor {name!r}")
    return _Layout(
        DTYPES[entry.dtype], entry.shape, entry.begin, entry.end, metadata.get("crc32", "")
    )


class Buffers:
    """Memory of batches, taken again when nobody holds a tensor in it any more: fresh pages cost as much as the read."""

    def __init__(self, kept: int) -> None:
        """Up to `kept` that are free or in use are remembered."""
        self._kept = kept
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()
        probe = [np.empty(0, np.uint8)]
        self._unused = sys.getrefcount(probe[0])  # of an array that only a list knows

    def take(self, size: int) -> np.ndarray:
        """uint8 [size or more]; every array and tensor that shares its memory keeps it from being taken again."""
        with self._lock:
            free = [
                at
                for at in range(len(self._arrays))
                if sys.getrefcount(self._arrays[at]) == self._unused
            ]
            fitting = [
                at for at in free if size <= self._arrays[at].size <= 2 * size + BUFFER_SLACK
            ]
            if fitting:
                return self._arrays[min(fitting, key=lambda at: self._arrays[at].size)]
            array = np.empty(size + size // 8 + BUFFER_SLACK // 16, np.uint8)
            if len(self._arrays) >= self._kept and free:
                self._arrays[free[0]] = array
            elif len(self._arrays) < self._kept:
                self._arrays.append(array)
            return array
