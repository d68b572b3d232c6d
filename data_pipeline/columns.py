"""Reading samples by offset: raw metadata and any columns, aligned by key, checked on the way.

A read is one `preadv` of the tar block header and the part behind it, straight into the memory that the
tensor then shares with its batch: no decoding, no copy after the kernel's, and a file that shrinks or a disk
that fails is an error here (with a memory map it would be a SIGBUS that ends the trainer).

What is noticed without `checksum`: another size, another member name, a tensor header that does not parse or fit.
With it: any change of the tensor's bytes (CRC-32). `landiff precompute verify` compares whole shards.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.remote import Remote
from data_pipeline.schema import (
    RAW,
    Column,
    Manifest,
    RawSample,
    ShardEntry,
    Sidecar,
    column_stem,
    fingerprint,
)
from data_pipeline.shards import ShardError, read_sidecar, sidecar_path

TAR_BLOCK = 512
OPEN_FILES = 256
ALIGNMENT = 64  # of parts in memory; safetensors' headers keep tensors on 8 from there
BUFFER_SLACK = 1 << 20
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # safetensors' names
CODES = {dtype: code for code, dtype in DTYPES.items()}


def pack_tensor(name: str, tensor: Tensor) -> bytes:
    """One tensor as a safetensors file whose bytes depend on nothing else."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    header = json.dumps({"__metadata__": {"crc32": f"{zlib.crc32(data):08x}"},
                         name: {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [0, len(data)]}},
                        separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def parse_tensor(part: Tensor, name: str, *, checksum: bool = False) -> Tensor:
    """The tensor `name` of a safetensors file in memory (uint8 [size]); shares its memory.

    Raises ValueError where the bytes are no such file, or with `checksum` where they are not those that were written.
    """
    size, content = part.numel(), memoryview(part.numpy())
    if size < 8:
        raise ValueError(f"{size} bytes are no safetensors file")
    (length,) = struct.unpack_from("<Q", content)
    if length > size - 8:
        raise ValueError(f"the safetensors header claims {length} bytes of {size}")
    try:
        header = json.loads(bytes(content[8 : 8 + length]))
        entry = header[name]
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the safetensors header holds no readable tensor {name!r} ({type(error).__name__}: {error})") from None
    if not 0 <= begin <= end <= size - 8 - length or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the safetensors header gives {dtype} {list(shape)} the bytes {begin}..{end} of {size - 8 - length}")
    begin, end = 8 + length + begin, 8 + length + end
    data = part[begin:end]
    if checksum:
        written = header.get("__metadata__", {}).get("crc32")
        if written is not None and int(written, 16) != (found := zlib.crc32(content[begin:end])):
            raise ValueError(f"the tensor's bytes have CRC-32 {found:08x}, they were written with {written}")
    if data.storage_offset() % dtype.itemsize:  # only where another writer left its header unpadded
        data = data.clone()
    return data.view(dtype).view(shape)


class DamagedSample(ShardError):
    """One sample of a shard cannot be read; the others may."""


@dataclass(frozen=True)
class _Index:
    """One shard of one folder: keys in order, and where the part that we read lies."""

    path: Path
    keys: list[str]
    offsets: list[int]
    sizes: list[int]


class _File:
    """An open file, closed when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class _Files:
    """Open files, the least recently used let go beyond `OPEN_FILES`. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _File] = OrderedDict()

    def read(self, path: Path, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`; the bytes read, fewer at the end of the file."""
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _File(path)
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
        done = 0
        while done < len(buffer):
            count = os.preadv(file.fd, [buffer[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def close(self) -> None:
        with self._lock:
            self._open.clear()


class FolderReader:
    """Reads one part of each sample of a folder of shards: the JSON of `raw/`, or the tensor of a column."""

    def __init__(self, data: Path, name: str, part: str, shards: Sequence[ShardEntry], *, column: Column | None = None,
                 raw_shards: Sequence[ShardEntry] = (), adopt: bool = False, keep: int = 64, checksum: bool = False,
                 remote: Remote | None = None) -> None:
        """`keep` shards' indices stay in memory. `column` and `raw_shards` are what a column must agree with."""
        self.folder, self.name, self.part = data / name, name, part
        self.checksum, self.remote = checksum, remote
        self.shards, self.column, self.raw_shards, self.adopt, self.keep = shards, column, raw_shards, adopt, keep
        self._files = _Files()
        self._indices: OrderedDict[int, _Index] = OrderedDict()
        self._lock = threading.Lock()

    def index(self, shard: int) -> _Index:
        with self._lock:
            index = self._indices.get(shard)
            if index is None:
                index = self._indices[shard] = self._read_index(shard)
                while len(self._indices) > self.keep:
                    self._indices.popitem(last=False)
            self._indices.move_to_end(shard)
            return index

    def size(self, shard: int, slot: int) -> int:
        """Bytes of memory that `read` wants for a sample."""
        return -(-(TAR_BLOCK + self.index(shard).sizes[slot]) // ALIGNMENT) * ALIGNMENT

    def read(self, shard: int, slot: int, memory: Tensor | None = None) -> Tensor:
        """The part of sample `slot` of a shard, uint8 [size], in `memory` (uint8, of `size` bytes) where it is given.

        Raises ShardError with the file and the key.
        """
        index = self.index(shard)
        size, key = index.sizes[slot], index.keys[slot]
        # 512 in front hold the tar's own header of this member: its name says whether index and tar agree
        memory = torch.empty(TAR_BLOCK + size, dtype=torch.uint8) if memory is None else memory[: TAR_BLOCK + size]
        content = memoryview(memory.numpy())
        try:
            count = self._read_bytes(shard, index, index.offsets[slot] - TAR_BLOCK, content)
        except OSError as error:
            raise ShardError(f"{index.path}, sample {key}: {error}") from error
        member = f"{key}.{self.part}".encode()
        found = bytes(content[:100]).rstrip(b"\0")
        if count < TAR_BLOCK + size or found != member:
            what = f"ends after {count} bytes" if count < TAR_BLOCK + size else f"holds {found[:60]!r}"
            raise DamagedSample(f"{index.path} is damaged: where {member.decode()} should be, {TAR_BLOCK + size} bytes long, "
                             f"it {what}; {self._redo()}")
        return memory[TAR_BLOCK:]

    def read_tensor(self, shard: int, slot: int, memory: Tensor | None = None) -> Tensor:
        stem = self.part.split(".", 1)[0]
        part = self.read(shard, slot, memory)
        try:
            return parse_tensor(part, stem, checksum=self.checksum)
        except ValueError as error:
            index = self.index(shard)
            raise ShardError(f"{index.path}, sample {index.keys[slot]}: {error}; {self._redo()}") from None

    def _read_bytes(self, shard: int, index: _Index, offset: int, buffer: memoryview) -> int:
        try:
            return self._files.read(index.path, offset, buffer)
        except FileNotFoundError:
            if self.remote is None:
                raise
            self.remote.fetch(self.name, self.shards[shard], self.part)  # it had to make room in the cache
            return self._files.read(index.path, offset, buffer)

    def close(self) -> None:
        self._files.close()

    def _read_index(self, shard: int) -> _Index:
        entry = self.shards[shard]
        tar = self.folder / f"{entry.name}.tar"
        stored = tar if self.remote is None else self.remote.fetch(self.name, entry, self.part)
        sidecar = read_sidecar(tar)
        if sidecar is None:
            raise ShardError(f"{sidecar_path(tar)} does not exist, but the manifest lists it; {self._redo()}")
        if sidecar.entry.sha256 != entry.sha256:
            raise ShardError(f"{tar} is not the shard that the manifest lists (sha256 {sidecar.entry.sha256[:16]}, there "
                             f"{entry.sha256[:16]}): it was made again since; run `landiff precompute finalize`")
        try:
            size = stored.stat().st_size
        except OSError as error:
            raise ShardError(f"{tar}: {error}; {self._redo()}") from error
        if size != entry.bytes:
            raise ShardError(f"{tar} is damaged: it has {size} bytes, its sidecar says {entry.bytes}; {self._redo()}")
        if self.column is not None and not self.adopt:
            self._check_origin(tar, sidecar, shard)
        try:
            places = [parts[self.part] for _, parts in sidecar.index]
        except KeyError:
            raise ShardError(f"{tar}: a sample has no part {self.part!r}; {self._redo()}") from None
        return _Index(stored, [key for key, _ in sidecar.index], [p[0] for p in places], [p[1] for p in places])

    def _check_origin(self, tar: Path, sidecar: Sidecar, shard: int) -> None:
        if sidecar.fingerprint != self.column.fingerprint:
            raise ShardError(f"{tar} was made with fingerprint {sidecar.fingerprint}, the rest of column {self.name!r} with "
                             f"{self.column.fingerprint}; {self._redo()}, or set data.adopt=true to take it as it is")
        if sidecar.raw_sha256 != self.raw_shards[shard].sha256:
            raise ShardError(f"{tar} was made from a raw shard with sha256 {sidecar.raw_sha256[:16]}, which is now "
                             f"{self.raw_shards[shard].sha256[:16]}; {self._redo()}, or set data.adopt=true to take it as it is")

    def _redo(self) -> str:
        command = "landiff shards" if self.name == RAW else "landiff precompute"
        return f"delete {self.folder.name}'s tar and sidecar of that name and run `{command}` again"


class Buffers:
    """Memory of batches, taken again when nobody holds a tensor in it any more: fresh pages cost as much as the read."""

    def __init__(self, kept: int) -> None:
        """Up to `kept` that are free or in use are remembered."""
        self._kept = kept
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()
        probe = [np.empty(0, np.uint8)]
        self._unused = sys.getrefcount(probe[0])  # of an array that only a list knows

    def take(self, size: int) -> Tensor:
        """uint8 [size or more]; every tensor that shares its memory keeps it from being taken again."""
        with self._lock:
            free = [at for at in range(len(self._arrays)) if sys.getrefcount(self._arrays[at]) == self._unused]
            fitting = [at for at in free if size <= self._arrays[at].size <= 2 * size + BUFFER_SLACK]
            if fitting:
                return torch.from_numpy(self._arrays[min(fitting, key=lambda at: self._arrays[at].size)])
            array = np.empty(size + size // 8 + BUFFER_SLACK // 16, np.uint8)
            if len(self._arrays) >= self._kept and free:
                self._arrays[free[0]] = array
            elif len(self._arrays) < self._kept:
                self._arrays.append(array)
            return torch.from_numpy(array)


@dataclass(frozen=True)
class Reads:
    """What to read for one sample."""

    shard: int
    position: int  # in the raw shard
    slots: dict[str, int]  # in each column
    sizes: tuple[int, ...]  # bytes of memory for its JSON and each column

    @property
    def size(self) -> int:
        return sum(self.sizes)


class AlignedColumns:
    """Samples of a data set with the wanted columns; clips that any of them set aside do not take part."""

    def __init__(self, data: Path, manifest: Manifest, columns: Sequence[str], *, adopt: bool = False, keep: int = 64,
                 checksum: bool = False, remote: Remote | None = None) -> None:
        """`keep`: indices of so many shards stay in memory. Raises ShardError where a column is missing or stale."""
        check_columns(manifest, columns, adopt=adopt)
        self.manifest, self.columns = manifest, tuple(columns)
        self._raw = FolderReader(data, RAW, "json", manifest.shards, keep=keep, remote=remote)
        self._readers: dict[str, FolderReader] = {}
        for name in columns:
            column = manifest.columns[name]
            self._readers[name] = FolderReader(data, name, f"{column_stem(name)}.safetensors", column.shards, column=column,
                                               raw_shards=manifest.shards, adopt=adopt, keep=keep, checksum=checksum, remote=remote)
        # {shard: raw positions left out}, and each column's own, for the shards where there are any
        self._excluded: dict[int, list[int]] = {}
        for shard, raw in enumerate(manifest.shards):
            missing: set[int] = set()
            for name in columns:
                entry = manifest.columns[name].shards[shard]
                if entry.samples + len(entry.missing) != raw.samples:
                    raise ShardError(f"column {name!r}, shard {entry.name}: {entry.samples} samples and {len(entry.missing)} set "
                                     f"aside are not the {raw.samples} of its raw shard; run `landiff precompute` again")
                missing.update(entry.missing)
            if missing:
                self._excluded[shard] = sorted(missing)
        self.counts = np.array([s.samples for s in manifest.shards], dtype=np.int64)
        for shard, missing_positions in self._excluded.items():
            self.counts[shard] -= len(missing_positions)

    @property
    def exclusions(self) -> str:
        """Fingerprint of the clips that don't take part."""
        return fingerprint(sorted(self._excluded.items()))

    def plan(self, shard: int, slot: int) -> Reads:
        """Where sample `slot`, among those of the shard that take part, lies in every folder. Raises ShardError."""
        position = _with_gaps(slot, self._excluded.get(shard, ()))
        raw_index = self._raw.index(shard)
        key = _key_at(raw_index, position)
        slots, sizes = {}, [self._raw.size(shard, position)]
        for name, reader in self._readers.items():
            missing = self.manifest.columns[name].shards[shard].missing
            own = position - sum(m < position for m in missing)
            index = reader.index(shard)
            found = _key_at(index, own)
            if found != key:
                raise ShardError(f"{index.path} is not aligned with {raw_index.path}: sample {own} is {found}, where {key} "
                                 "should be; delete it and run `landiff precompute` again")
            slots[name] = own
            sizes.append(reader.size(shard, own))
        return Reads(shard, position, slots, tuple(sizes))

    def read(self, reads: Reads, memory: Tensor) -> tuple[RawSample, dict[str, Tensor]]:
        """One sample, its tensors in `memory` (uint8, at least `reads.size`). Raises ShardError with file and key."""
        raw_index = self._raw.index(reads.shard)
        key = raw_index.keys[reads.position]
        text = self._raw.read(reads.shard, reads.position, memory)
        at = reads.sizes[0]
        try:
            meta = RawSample.model_validate_json(text.numpy().tobytes())
        except ValidationError as error:
            raise ShardError(f"{raw_index.path}, sample {key}: its JSON is not a raw sample: {error}") from None
        if meta.key != key:
            raise ShardError(f"{raw_index.path}, sample {key}: its JSON is that of {meta.key}; {self._raw._redo()}")
        tensors = {}
        for (name, reader), size in zip(self._readers.items(), reads.sizes[1:], strict=True):
            tensors[name] = reader.read_tensor(reads.shard, reads.slots[name], memory[at:])
            at += size
        return meta, tensors

    def close(self) -> None:
        for reader in (self._raw, *self._readers.values()):
            reader.close()


def _key_at(index: _Index, slot: int) -> str:
    if slot >= len(index.keys):
        raise ShardError(f"{sidecar_path(index.path)} lists {len(index.keys)} samples, the manifest more than {slot}; "
                         "run the command that made it again")
    return index.keys[slot]


def _with_gaps(slot: int, gaps: Sequence[int]) -> int:
    """The slot-th position that is not in `gaps` (sorted)."""
    position = slot
    for gap in gaps:
        if gap > position:
            break
        position += 1
    return position


def check_columns(manifest: Manifest, columns: Sequence[str], *, adopt: bool = False) -> None:
    """Raise ShardError unless every column exists and belongs to the manifest's raw shards."""
    absent = [name for name in columns if name not in manifest.columns]
    if absent:
        raise ShardError(f"the data set has no column {', '.join(map(repr, absent))}; it has: "
                         f"{', '.join(sorted(manifest.columns)) or 'none'}. Run `landiff precompute` with it in `columns`, "
                         "then `landiff precompute finalize`")
    for name in columns:
        column = manifest.columns[name]
        if [s.name for s in column.shards] != [s.name for s in manifest.shards]:
            raise ShardError(f"column {name!r} has {len(column.shards)} shards, the raw data {len(manifest.shards)}, or under "
                             "other names; run `landiff precompute` again")
        if column.raw_fingerprint not in ("", manifest.fingerprint) and not adopt:
            raise ShardError(f"column {name!r} was made from raw shards {column.raw_fingerprint}, the data set now is "
                             f"{manifest.fingerprint}; run `landiff precompute` again, or set data.adopt=true to take it as it is")


def encoders(column: Column) -> Mapping[str, str]:
    """{name: fingerprint} of the encoders that made a column."""
    return column.config.get("encoders", {})


def require_encoder(manifest: Manifest, column: str, fingerprint: str, what: str, *, adopt: bool = False) -> None:
    """Raise ShardError unless `column` was made by the encoder `fingerprint` (with others, perhaps).

    `what` names that encoder as the user knows it, e.g. "model.tokenizer = tokenizer@3f2a...".
    """
    check_columns(manifest, [column], adopt=adopt)
    made_by = encoders(manifest.columns[column])
    if fingerprint not in made_by.values() and not adopt:
        known = ", ".join(f"{name} {mark}" for name, mark in made_by.items()) or manifest.columns[column].encoder
        raise ShardError(f"column {column!r} was made by {known}, but {what} is {fingerprint}; run `landiff precompute` with "
                         "it, or set data.adopt=true to take the column as it is")
