"""Tensors as safetensors files in memory, without copies, and reusable buffers for batches."""

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
}
"""torch data types by their names in safetensors."""

CODES = {dtype: code for code, dtype in DTYPES.items()}
BEFORE_CRC = b'{"__metadata__":{"crc32":"'  # start of a header that `pack_tensor` writes
CRC = slice(len(BEFORE_CRC), len(BEFORE_CRC) + 8)  # position of the CRC in such a header
HEADERS_KEPT = 4096  # parsed headers in memory; a column needs one per length of its samples


def pack_tensor(name: str, tensor: Tensor) -> bytes:
    """One tensor as the bytes of a safetensors file, which depend only on name and tensor."""
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
class _TensorEntry:
    """One tensor in a safetensors header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # position of its bytes after the header
    end: int
    crc32: str  # of the tensor's bytes; "" if the header has none


def parse_tensor(part: np.ndarray, name: str, *, checksum: bool = False) -> Tensor:
    """The tensor `name` of a safetensors file in memory, which it shares.

    `part`: uint8 [size], writable, at an address that is a multiple of 8. Raises ValueError if it
    is not such a file, or with `checksum` if the bytes of the tensor have changed since they were
    written.
    """
    size = part.size
    if size < 8:
        raise ValueError(f"{size} bytes are not a safetensors file")
    length = int.from_bytes(part[:8].tobytes(), "little")
    if length > size - 8:
        raise ValueError(f"the safetensors header claims {length} bytes of {size}")
    header = part[8 : 8 + length].tobytes()
    written = b""
    if header.startswith(BEFORE_CRC):
        # Without its CRC, the header is the same for all samples of a shape, and is parsed once.
        written = header[CRC]
        header = header[: CRC.start] + header[CRC.stop :]
    entry = _parse_header(header, name)
    if entry.end > size - 8 - length:
        raise ValueError(
            f"the safetensors header gives {entry.dtype} {list(entry.shape)} the bytes "
            f"{entry.begin}..{entry.end} of {size - 8 - length}"
        )
    begin = 8 + length + entry.begin
    end = 8 + length + entry.end
    if checksum:
        _check_crc(part[begin:end], written.decode("latin-1") or entry.crc32)
    if begin == end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    count = (end - begin) // entry.dtype.itemsize
    if begin % entry.dtype.itemsize:  # another program wrote its header without padding
        part = part[begin:end].copy()
        begin = 0
    flat = torch.frombuffer(part, dtype=entry.dtype, count=count, offset=begin)
    return flat.view(entry.shape)


def _check_crc(data: np.ndarray, expected: str) -> None:
    """Raise ValueError if the CRC-32 of `data` is not `expected`; "" is not checked."""
    if not expected:
        return
    found = f"{zlib.crc32(data.data):08x}"
    if found != expected:
        raise ValueError(
            f"the tensor's bytes have CRC-32 {found}, they were written with {expected}"
        )


@lru_cache(HEADERS_KEPT)
def _parse_header(header: bytes, name: str) -> _TensorEntry:
    """The entry of tensor `name`. Raises ValueError if there is none."""
    entries, metadata = parse_header(header, "the safetensors header")
    entry = entries.get(name)
    if entry is None or entry.dtype not in DTYPES:
        raise ValueError(f"the safetensors header holds no readable tensor {name!r}")
    return _TensorEntry(
        dtype=DTYPES[entry.dtype],
        shape=entry.shape,
        begin=entry.begin,
        end=entry.end,
        crc32=metadata.get("crc32", ""),
    )


class Buffers:
    """Memory for batches, reused when no array or tensor refers to it.

    Allocating fresh pages costs as much as reading the data.
    """

    def __init__(self, kept: int) -> None:
        """`kept`: maximum number of buffers, free or in use, that are reused."""
        self._kept = kept
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()
        probe = [np.empty(0, np.uint8)]
        self._unused = sys.getrefcount(probe[0])  # of an array that only a list refers to

    def take(self, size: int) -> np.ndarray:
        """A buffer: uint8 [at least size], in use until nothing refers to its memory."""
        with self._lock:
            free = []
            for index in range(len(self._arrays)):
                if sys.getrefcount(self._arrays[index]) == self._unused:
                    free.append(index)
            largest = 2 * size + BUFFER_SLACK
            fitting = [index for index in free if size <= self._arrays[index].size <= largest]
            if fitting:
                return self._arrays[min(fitting, key=lambda index: self._arrays[index].size)]
            array = np.empty(size + size // 8 + BUFFER_SLACK // 16, np.uint8)
            if len(self._arrays) >= self._kept and free:
                self._arrays[free[0]] = array
            elif len(self._arrays) < self._kept:
                self._arrays.append(array)
            return array
