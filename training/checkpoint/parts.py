"""Files of a checkpoint as sequences of bytes and tensors, before they are written.

An engine describes its files (`Engine.state_files`), and the writer decides when the tensors are
copied: directly into the file, or into a staging buffer from which another process writes them
(training/checkpoint/background.py). The bytes on disk are the same.

    safetensors_file    the format of the library `safetensors`
    torch_archive       the zip archive that `torch.load` reads
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import _TYPES as SAFETENSORS_TYPES
from torch import Tensor
from torch.serialization import location_tag

from landiff.configs.base import Config
from landiff.configs.disk_errors import naming

ALIGNMENT = 64  # of tensors in an archive, as in those of `torch.save`
CRC_BYTES = 4
HEADER_ALIGNMENT = 8  # of the tensors in a safetensors file


@dataclass(frozen=True, eq=False)
class Crc32:
    """Stands for the CRC-32 of a tensor part of the same file that precedes it: 4 bytes.

    It is known once the tensor is on the host, so whoever writes the file computes it.
    """

    tensor: Tensor


Part = bytes | Tensor | Crc32
"""Tensors are contiguous and of dtype uint8, with one dimension."""


@dataclass(frozen=True)
class SameFile:
    """A file of an earlier checkpoint."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class StateFile:
    """One file of a checkpoint that this rank writes.

    path: relative to the checkpoint.
    parts: its content. The tensors are views of the engine's, so that the next step changes them.
    constant: the content is the same in all checkpoints that this process writes.
    same_as: a committed file with this content and its hash, to which a hard link is made instead.
    """

    path: str
    parts: Sequence[Part]
    constant: bool = False
    same_as: SameFile | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return sum(map(part_bytes, self.parts))


def part_bytes(part: Part) -> int:
    """Size of a part."""
    if isinstance(part, Crc32):
        return CRC_BYTES
    return part.numel() if isinstance(part, Tensor) else len(part)


def byte_tensor(tensor: Tensor) -> Tensor:
    """The content of a tensor as a part; a view if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def contents(parts: Sequence[Part]) -> Iterator[bytes | memoryview]:
    """The bytes of parts in order. Of device tensors, one is on the host at a time."""
    wanted = {id(part.tensor) for part in parts if isinstance(part, Crc32)}
    known: dict[int, bytes] = {}
    for part in parts:
        if isinstance(part, Crc32):
            yield known[id(part.tensor)]
        elif isinstance(part, Tensor):
            view = part.cpu().numpy().data
            if id(part) in wanted:
                known[id(part)] = crc_bytes(zlib.crc32(view))
            yield view
        else:
            yield part


def content_sha256(parts: Sequence[Part]) -> str:
    """SHA-256 of the bytes of parts in hex, without writing them."""
    digest = hashlib.sha256()
    for content in contents(parts):
        digest.update(content)
    return digest.hexdigest()


def crc_bytes(crc: int) -> bytes:
    """A CRC-32 as it stands in archives."""
    return crc.to_bytes(CRC_BYTES, "little")


def write_file(folder: Path, file: StateFile) -> str:
    """Write a file, which is durable on return. Returns its SHA-256 in hex."""
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with naming(path), open(path, "wb") as opened:
        for content in contents(file.parts):
            opened.write(content)
            digest.update(content)
        opened.flush()
        os.fsync(opened.fileno())
    return digest.hexdigest()


def write_files(folder: Path, files: Sequence[StateFile]) -> None:
    """Write files into a folder."""
    for file in files:
        write_file(folder, file)


def json_file(path: str, config: Config) -> StateFile:
    """A file with the values of a config."""
    return StateFile(path, [config.model_dump_json(indent=1).encode()])


# ---------------------------------------------------------------- safetensors


def safetensors_file(path: str, tensors: Mapping[str, Tensor]) -> StateFile:
    """A file that `safetensors.torch.load_file` reads."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    # Wide dtypes first, so that each tensor is aligned to its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    parts: list[Part] = []
    end = 0
    for name in order:
        tensor = tensors[name]
        start = end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        if start < end:
            parts.append(byte_tensor(tensor))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return StateFile(path, [struct.pack("<Q", len(text)) + text, *parts])


# ---------------------------------------------------------------- torch archives

_LOCAL = struct.Struct("<IHHHHHIIIHH")  # local file header of a zip archive
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")  # entry of the central directory
_END = struct.Struct("<IQHHIIQQQQ" + "IIQI" + "IHHHHIIH")  # end of the archive, three records
_VERSION = 45  # of the zip format, which has sizes of 64 bits
_CRC_FOLLOWS = 1 << 3  # flag of an entry whose CRC-32 stands after its data
_DATE = 0x21  # 1980-01-01
_IN_EXTRA = 0xFFFFFFFF  # a size or offset that stands in the extra field


class _Pickler(pickle.Pickler):
    """Pickles like `torch.save`: in place of storages their keys, and the storages aside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[torch.UntypedStorage] = []
        self._keys: dict[int, str] = {}

    def persistent_id(self, value: Any) -> Any:
        """The key of a storage with type, device and size; None for all other values."""
        if isinstance(value, torch.storage.TypedStorage):
            storage = value._untyped_storage
            kind = getattr(torch, value._pickle_storage_type())
            size = value._size()
        elif torch.is_storage(value):
            storage = value.untyped()
            kind = torch.UntypedStorage
            size = value.nbytes()
        else:
            return None
        if storage._cdata not in self._keys:
            self._keys[storage._cdata] = str(len(self._keys))
            self.storages.append(storage)
        return ("storage", kind, self._keys[storage._cdata], location_tag(storage), size)


def torch_archive(value: Any) -> list[Part]:
    """The parts of an archive from which `torch.load` reads `value`.

    Like `torch.save`, but the data of tensors are not copied. Storages are written whole.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    storages = []
    for storage in pickler.storages:
        storages.append(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
    return _archive(buffer.getvalue(), storages)


def tensor_archive(tensor: Tensor) -> list[Part]:
    """The parts of an archive with one tensor, on the CPU, without the rest of its storage."""
    return _archive(_pickled_tensor(tuple(tensor.shape), tensor.dtype), [byte_tensor(tensor)])


@cache
def _pickled_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """A contiguous tensor as an archive describes it."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(torch.empty(shape, dtype=dtype, device="cpu"))
    return buffer.getvalue()


def _archive(description: bytes, storages: Sequence[Tensor]) -> list[Part]:
    """An archive of a pickled object and the content of its storages."""
    archive = _Archive()
    archive.add("data.pkl", description)
    # With the records `.format_version` and `.storage_alignment`, torch would compute where tensors
    # are as if its own writer had written the headers, which are shorter.
    archive.add("byteorder", sys.byteorder.encode())
    for key, storage in enumerate(storages):
        archive.add(f"data/{key}", storage)
    archive.add("version", b"3\n")
    return archive.end()


class _Archive:
    """A zip archive without compression, all sizes and offsets with 64 bits."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.entries: list[list[Part]] = []  # of the central directory
        self.size = 0

    def _append(self, part: Part) -> None:
        self.parts.append(part)
        self.size += part_bytes(part)

    def add(self, name: str, content: bytes | Tensor) -> None:
        """Append a file."""
        path = f"archive/{name}".encode()
        start = self.size
        size = part_bytes(content)
        flags = 0
        crc = 0
        if isinstance(content, bytes):
            crc = zlib.crc32(content)
        else:
            flags = _CRC_FOLLOWS
        sizes = struct.pack("<HHQQ", 1, 16, size, size)
        before = start + _LOCAL.size + len(path) + len(sizes) + 4
        padding = -before % ALIGNMENT
        extra = sizes + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        common = (flags, 0, 0, _DATE)
        header = _LOCAL.pack(
            0x04034B50, _VERSION, *common, crc, _IN_EXTRA, _IN_EXTRA, len(path), len(extra)
        )
        self._append(header + path + extra)
        self._append(content)
        offset = struct.pack("<HHQQQ", 1, 24, size, size, start)
        entry = _CENTRAL.pack(
            0x02014B50,
            *(_VERSION, _VERSION, *common),
            *(crc, _IN_EXTRA, _IN_EXTRA, len(path), len(offset)),
            *(0, 0, 0, 0, _IN_EXTRA),
        )
        if isinstance(content, bytes):
            self.entries.append([entry + path + offset])
            return
        self._append(struct.pack("<I", 0x08074B50))
        self._append(Crc32(content))
        self._append(struct.pack("<QQ", size, size))
        self.entries.append([entry[:16], Crc32(content), entry[20:] + path + offset])

    def end(self) -> list[Part]:
        """Append the central directory. Returns all parts."""
        start = self.size
        for entry in self.entries:
            for part in entry:
                self._append(part)
        count = len(self.entries)
        size = self.size - start
        end = _END.pack(
            *(0x06064B50, 44, _VERSION, _VERSION, 0, 0, count, count, size, start),
            *(0x07064B50, 0, self.size, 1),
            *(0x06054B50, 0, 0, 0xFFFF, 0xFFFF, _IN_EXTRA, _IN_EXTRA, 0),
        )
        self._append(end)
        return self.parts
