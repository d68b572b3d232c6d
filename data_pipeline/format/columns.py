"""Random access to samples: raw metadata and any columns, aligned by key and checked.

A read is one `preadv` of the tar header block and the part after it, directly into the memory that
the tensor then shares with its batch. Nothing is decoded or copied. A file that becomes shorter or
a disk that fails raises an error; with a memory map, it would be a SIGBUS that ends the trainer.

Detected without `checksum`: a different size, a different member name, a tensor header that does
not parse or fit. With `checksum`: any change of the tensor's bytes (CRC-32). `landiff precompute
verify` compares whole shards.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from landiff.data_pipeline.format.column_checks import check_column_fingerprints
from landiff.data_pipeline.format.schema import (
    RAW,
    Column,
    Manifest,
    RawSample,
    ShardEntry,
    Sidecar,
    column_stem,
    content_fingerprint,
)
from landiff.data_pipeline.format.shards import ShardError, read_sidecar, sidecar_path
from landiff.data_pipeline.format.tensors import parse_tensor

TAR_BLOCK = 512
OPEN_FILES = 256
FETCHES = 10  # of a shard that is deleted from the cache again before it is opened
ALIGNMENT = 64  # bytes, of parts in memory; safetensors headers keep tensors at multiples of 8


class DamagedSample(ShardError):
    """One sample of a shard cannot be read; the others may be readable."""


class RemoteShards(Protocol):
    """Source of shards that are not on this machine; see `landiff.data_pipeline.loading.remote`."""

    def fetch(self, folder: str, entry: ShardEntry, part: str) -> Path:
        """Download a shard if necessary. Returns its local path. Raises ShardError."""
        ...


@dataclass(frozen=True)
class _ShardIndex:
    """Keys of one shard in order, and the positions of the part that is read."""

    path: Path
    keys: list[str]
    offsets: list[int]
    sizes: list[int]


class _File:
    """An open file that is closed when its last user releases it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def _fill(file: _File, offset: int, memory: np.ndarray) -> int:
    """Read into `memory` (uint8). Returns the bytes read, fewer than its size at the file's end."""
    done = os.preadv(file.fd, [memory.data], offset)
    while 0 < done < memory.size:
        count = os.preadv(file.fd, [memory[done:].data], offset + done)
        if not count:
            break
        done += count
    return done


class FolderReader:
    """Reads one part of the samples in a folder of shards: JSON of `raw/`, tensors of a column."""

    def __init__(
        self,
        data: Path,
        name: str,
        part: str,
        shards: Sequence[ShardEntry],
        *,
        column: Column | None = None,
        raw_shards: Sequence[ShardEntry] = (),
        adopt: bool = False,
        keep: int = 64,
        checksum: bool = False,
        remote: RemoteShards | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            data: The data folder.
            name: Name of the folder in it.
            part: Extension of the members to read, e.g. "tokens.safetensors".
            shards: The shards of the folder.
            column: The manifest's entry of the column, which the shards must agree with.
            raw_shards: The raw shards that the column must have been computed from.
            adopt: Accept shards that do not agree with `column` and `raw_shards`.
            keep: Number of shards whose index stays in memory.
            checksum: Compare tensors with their CRC-32.
            remote: Source of shards that are not in `data`.
        """
        self.folder = data / name
        self.name = name
        self.part = part
        self.stem = part.split(".", 1)[0]
        self.shards = shards
        self.column = column
        self.raw_shards = raw_shards
        self.adopt = adopt
        self.checksum = checksum
        self.remote = remote
        # Two threads may read the same index at the same time, but none waits for another.
        self.index = lru_cache(keep)(self._read_index)
        self._file = lru_cache(OPEN_FILES)(_File)

    def read(self, shard: int, slot: int, memory: np.ndarray | None = None) -> np.ndarray:
        """The part of sample `slot` of a shard: uint8 [size], in `memory` if that is given.

        `memory`: uint8 [TAR_BLOCK + size or more]. Raises ShardError with the file and the key.
        """
        index = self.index(shard)
        key = index.keys[slot]
        size = TAR_BLOCK + index.sizes[slot]
        # The tar header of the member is read too: its name shows whether index and tar agree.
        memory = np.empty(size, np.uint8) if memory is None else memory[:size]
        try:
            count = self._read_bytes(shard, index, index.offsets[slot] - TAR_BLOCK, memory)
        except OSError as error:
            raise ShardError(f"{index.path}, sample {key}: {error}") from error
        member = f"{key}.{self.part}".encode()
        found = memory[:100].tobytes().rstrip(b"\0")
        if count < size or found != member:
            what = f"ends after {count} bytes" if count < size else f"holds {found[:60]!r}"
            raise DamagedSample(
                f"{index.path} is damaged: where {member.decode()} should be, {size} bytes long, "
                f"it {what}; {self.redo()}"
            )
        return memory[TAR_BLOCK:]

    def read_tensor(self, shard: int, slot: int, memory: np.ndarray | None = None) -> Tensor:
        """The tensor of sample `slot` of a shard; `memory` as in `read`. Raises ShardError."""
        part = self.read(shard, slot, memory)
        try:
            return parse_tensor(part, self.stem, checksum=self.checksum)
        except ValueError as error:
            index = self.index(shard)
            raise ShardError(
                f"{index.path}, sample {index.keys[slot]}: {error}; {self.redo()}"
            ) from None

    def fetch(self, shard: int) -> Path:
        """The local tar of a shard, downloaded if it is remote. Raises ShardError."""
        entry = self.shards[shard]
        if self.remote is None:
            return self.folder / f"{entry.name}.tar"
        return self.remote.fetch(self.name, entry, self.part)

    def close(self) -> None:
        """Close all files."""
        self._file.cache_clear()

    def redo(self) -> str:
        """Advice for a damaged shard, for the end of a message."""
        command = "landiff shards" if self.name == RAW else "landiff precompute"
        return f"delete {self.folder.name}'s tar and sidecar of that name and run `{command}` again"

    def _read_bytes(self, shard: int, index: _ShardIndex, offset: int, memory: np.ndarray) -> int:
        """Read into `memory` from `offset` of a shard. Returns the bytes read. Raises OSError."""
        for _ in range(FETCHES):
            try:
                return _fill(self._file(index.path), offset, memory)
            except FileNotFoundError:
                if self.remote is None:
                    raise
                self.fetch(shard)  # it was deleted from the cache for other shards
        raise ShardError(
            f"{index.path} was deleted from the cache {FETCHES} times before it could be read, "
            "because other processes need the space; raise data.cache_gigabytes"
        )

    def _read_index(self, shard: int) -> _ShardIndex:
        """The index of a shard that agrees with the manifest. Raises ShardError."""
        entry = self.shards[shard]
        tar = self.folder / f"{entry.name}.tar"
        stored = self.fetch(shard)
        sidecar = read_sidecar(tar)
        if sidecar is None:
            raise ShardError(
                f"{sidecar_path(tar)} does not exist, but the manifest lists it; {self.redo()}"
            )
        if sidecar.entry.sha256 != entry.sha256:
            raise ShardError(
                f"{tar} is not the shard that the manifest lists (sha256 "
                f"{sidecar.entry.sha256[:16]}, there {entry.sha256[:16]}): it was made again "
                "since; run `landiff precompute finalize`"
            )
        if self.remote is None:  # of remote data, `fetch` checks it, and others may delete it
            self._check_size(tar, entry)
        if len(sidecar.index) != entry.samples:
            raise ShardError(
                f"{sidecar_path(tar)} lists {len(sidecar.index)} samples, the manifest "
                f"{entry.samples}; {self.redo()}"
            )
        if self.column is not None and not self.adopt:
            self._check_origin(tar, sidecar, self.column, self.raw_shards[shard])
        try:
            places = [parts[self.part] for _, parts in sidecar.index]
        except KeyError:
            raise ShardError(f"{tar}: a sample has no part {self.part!r}; {self.redo()}") from None
        return _ShardIndex(
            path=stored,
            keys=[key for key, _ in sidecar.index],
            offsets=[offset for offset, _ in places],
            sizes=[size for _, size in places],
        )

    def _check_size(self, tar: Path, entry: ShardEntry) -> None:
        try:
            size = tar.stat().st_size
        except OSError as error:
            raise ShardError(f"{tar}: {error}; {self.redo()}") from error
        if size != entry.bytes:
            raise ShardError(
                f"{tar} is damaged: it has {size} bytes, its sidecar says {entry.bytes}; "
                f"{self.redo()}"
            )

    def _check_origin(self, tar: Path, sidecar: Sidecar, column: Column, raw: ShardEntry) -> None:
        """Raise ShardError unless the column's encoder computed a shard from the raw shard."""
        if sidecar.fingerprint != column.fingerprint:
            raise ShardError(
                f"{tar} was made with fingerprint {sidecar.fingerprint}, the rest of column "
                f"{self.name!r} with {column.fingerprint}; {self.redo()}, or set data.adopt=true "
                "to use it anyway"
            )
        if sidecar.raw_sha256 != raw.sha256:
            raise ShardError(
                f"{tar} was made from a raw shard with sha256 {sidecar.raw_sha256[:16]}, which is "
                f"now {raw.sha256[:16]}; {self.redo()}, or set data.adopt=true to use it anyway"
            )


@dataclass(frozen=True)
class _AlignedShard:
    """The clips of one shard that have all columns."""

    keys: list[str]
    # By folder: raw first, then the columns.
    slots: list[list[int]]  # position of each clip in the shard of that folder
    sizes: list[list[int]]  # aligned bytes of memory for its part and the tar header block

    def size(self, slot: int) -> int:
        """Bytes of memory for all parts of one clip."""
        return sum([sizes[slot] for sizes in self.sizes])


class AlignedColumns:
    """Samples of a data set with some columns, without the clips that any of them rejected.

    `counts`: int64 [shards], number of these samples per shard.
    """

    def __init__(
        self,
        data: Path,
        manifest: Manifest,
        columns: Sequence[str],
        *,
        adopt: bool = False,
        keep: int = 64,
        checksum: bool = False,
        remote: RemoteShards | None = None,
    ) -> None:
        """For the keyword arguments see `FolderReader`.

        Raises ShardError if a column is missing or stale.
        """
        check_column_fingerprints(manifest, columns, adopt=adopt)
        self.manifest = manifest
        self.columns = tuple(columns)
        self._raw = FolderReader(data, RAW, "json", manifest.shards, keep=keep, remote=remote)
        self._videos: FolderReader | None = None  # of remote data, only the JSON is downloaded
        if remote is None:
            self._videos = FolderReader(data, RAW, "mp4", manifest.shards, keep=1)
        self._readers: dict[str, FolderReader] = {}
        for name in columns:
            column = manifest.columns[name]
            self._readers[name] = FolderReader(
                data,
                name,
                f"{column_stem(name)}.safetensors",
                column.shards,
                column=column,
                raw_shards=manifest.shards,
                adopt=adopt,
                keep=keep,
                checksum=checksum,
                remote=remote,
            )
        self._rejected = _excluded_positions(manifest, columns)
        self._excluded = self._rejected  # in a view, held-out clips too
        self._keep = keep
        self._aligned = lru_cache(keep)(self._align)
        self.counts = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
        for number, positions in self._excluded.items():
            self.counts[number] -= len(positions)

    @property
    def exclusions(self) -> str:
        """Fingerprint of the clips that a column rejected."""
        return content_fingerprint(sorted(self._rejected.items()))

    def without(self, held_out: Mapping[int, Sequence[int]]) -> AlignedColumns:
        """The same data set with further clips left out, by shard and position in the raw shard.

        It shares the open files.
        """
        view = copy.copy(self)
        view._excluded = dict(self._excluded)
        view.counts = self.counts.copy()
        for number, positions in held_out.items():
            left_out = {*self._excluded.get(number, ()), *positions}
            view._excluded[number] = sorted(left_out)
            view.counts[number] = self.manifest.shards[number].samples - len(left_out)
        view._aligned = lru_cache(self._keep)(view._align)
        return view

    def present(self, shard: int, position: int) -> bool:
        """Whether the clip at a raw position is not left out."""
        return position not in self._excluded.get(shard, ())

    def slot(self, shard: int, position: int) -> int:
        """The slot, as `read` takes it, of the clip at a raw position that is present."""
        return self._aligned(shard).slots[0].index(position)

    def key(self, shard: int, position: int) -> str:
        """Key of the clip at a raw position, whether or not it is left out. Raises ShardError."""
        return self._raw.index(shard).keys[position]

    def meta(self, shard: int, position: int) -> RawSample:
        """Metadata of the clip at a raw position, whether or not it is left out.

        Raises ShardError.
        """
        return self._read_meta(shard, position, self.key(shard, position), None)

    def video(self, shard: int, position: int) -> bytes | None:
        """The encoded clip at a raw position, None if its shard is remote. Raises ShardError."""
        if self._videos is None:
            return None
        return self._videos.read(shard, position).tobytes()

    def size(self, shard: int, slot: int) -> int:
        """Bytes of memory that `read` needs for this sample. Raises ShardError."""
        return self._aligned(shard).size(slot)

    def read(
        self, shard: int, slot: int, memory: np.ndarray
    ) -> tuple[RawSample, dict[str, Tensor]]:
        """Metadata and tensors (by column) of sample `slot` of a shard, without rejected clips.

        `memory`: uint8 [`size` or more], which the tensors share. Raises ShardError with file and
        key.
        """
        aligned = self._aligned(shard)
        meta = self._read_meta(shard, aligned.slots[0][slot], aligned.keys[slot], memory)
        tensors: dict[str, Tensor] = {}
        offset = aligned.sizes[0][slot]
        for number, (name, reader) in enumerate(self._readers.items(), start=1):
            tensors[name] = reader.read_tensor(shard, aligned.slots[number][slot], memory[offset:])
            offset += aligned.sizes[number][slot]
        return meta, tensors

    def fetch(self, shard: int) -> None:
        """Download a remote shard before it is read. Raises ShardError."""
        for reader in (self._raw, *self._readers.values()):
            reader.fetch(shard)

    def bytes_of(self, shard: int) -> int:
        """Bytes of the columns of a shard in a cache. Of `raw`, only the JSON is downloaded."""
        return sum(reader.shards[shard].bytes for reader in self._readers.values())

    def close(self) -> None:
        """Close all files."""
        for reader in (self._raw, *self._readers.values()):
            reader.close()
        if self._videos is not None:
            self._videos.close()

    def _read_meta(
        self, shard: int, position: int, key: str, memory: np.ndarray | None
    ) -> RawSample:
        """The metadata of the clip at a raw position, which must have the given key."""
        text = self._raw.read(shard, position, memory)
        try:
            meta = RawSample.model_validate_json(text.tobytes())
        except ValidationError as error:
            path = self._raw.index(shard).path
            raise ShardError(
                f"{path}, sample {key}: its JSON is not a raw sample: {error}"
            ) from None
        if meta.key != key:
            path = self._raw.index(shard).path
            raise ShardError(
                f"{path}, sample {key}: its JSON is that of {meta.key}; {self._raw.redo()}"
            )
        return meta

    def _align(self, shard: int) -> _AlignedShard:
        """The clips of a shard that have all columns. Raises ShardError if keys do not agree."""
        raw = self._raw.index(shard)
        excluded = set(self._excluded.get(shard, ()))
        positions = [position for position in range(len(raw.keys)) if position not in excluded]
        keys = [raw.keys[position] for position in positions]
        aligned = _AlignedShard(keys, [positions], [_aligned_sizes(raw, positions)])
        for name, reader in self._readers.items():
            index = reader.index(shard)
            missing = set(self.manifest.columns[name].shards[shard].missing)
            present = [position for position in range(len(raw.keys)) if position not in missing]
            slot_of = {position: slot for slot, position in enumerate(present)}
            slots = [slot_of[position] for position in positions]
            for slot, key in zip(slots, keys, strict=True):
                if index.keys[slot] != key:
                    raise ShardError(
                        f"{index.path} is not aligned with {raw.path}: sample {slot} is "
                        f"{index.keys[slot]}, where {key} should be; delete it and run "
                        "`landiff precompute` again"
                    )
            aligned.slots.append(slots)
            aligned.sizes.append(_aligned_sizes(index, slots))
        return aligned


def _excluded_positions(manifest: Manifest, columns: Sequence[str]) -> dict[int, list[int]]:
    """Raw positions of the clips that a column rejected, for the shards that have any.

    Raises ShardError if a column's counts do not agree with the raw shard.
    """
    excluded: dict[int, list[int]] = {}
    for number, raw in enumerate(manifest.shards):
        missing: set[int] = set()
        for name in columns:
            entry = manifest.columns[name].shards[number]
            if entry.samples + len(entry.missing) != raw.samples:
                raise ShardError(
                    f"column {name!r}, shard {entry.name}: {entry.samples} samples and "
                    f"{len(entry.missing)} rejected clips are not the {raw.samples} of its raw "
                    "shard; run `landiff precompute` again"
                )
            missing.update(entry.missing)
        if missing:
            excluded[number] = sorted(missing)
    return excluded


def _aligned_sizes(index: _ShardIndex, slots: Sequence[int]) -> list[int]:
    """Bytes of each part with its tar header block, rounded up to `ALIGNMENT`."""
    blocks = [-(-(TAR_BLOCK + index.sizes[slot]) // ALIGNMENT) for slot in slots]
    return [count * ALIGNMENT for count in blocks]
