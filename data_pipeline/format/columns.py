"""Reading samples by offset: raw metadata and any columns, aligned by key, checked on the way.

A read is one `preadv` of the tar block header and the part behind it, straight into the memory that the
tensor then shares with its batch: no decoding, no copy after the kernel's, and a file that shrinks or a disk
that fails is an error here (with a memory map it would be a SIGBUS that ends the trainer).

What is noticed without `checksum`: another size, another member name, a tensor header that does not parse or fit.
With it: any change of the tensor's bytes (CRC-32). `landiff precompute verify` compares whole shards.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

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
from landiff.data_pipeline.loading.remote import Remote

TAR_BLOCK = 512
OPEN_FILES = 256
ALIGNMENT = 64  # of parts in memory; safetensors' headers keep tensors on 8 from there


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


def _fill(file: _File, offset: int, memory: np.ndarray) -> int:
    """Read from `offset` until `memory` (uint8) is full; the bytes read, fewer at the end of the file."""
    done = os.preadv(file.fd, [memory], offset)
    while 0 < done < memory.size:
        count = os.preadv(file.fd, [memory[done:]], offset + done)
        if not count:
            break
        done += count
    return done


class FolderReader:
    """Reads one part of each sample of a folder of shards: the JSON of `raw/`, or the tensor of a column."""

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
        remote: Remote | None = None,
    ) -> None:
        """`keep` shards' indices stay in memory. `column` and `raw_shards` are what a column must agree with."""
        self.folder, self.name, self.part, self.stem = (
            data / name,
            name,
            part,
            part.split(".", 1)[0],
        )
        self.checksum, self.remote = checksum, remote
        self.shards, self.column, self.raw_shards, self.adopt = shards, column, raw_shards, adopt
        # the most recently used stay; two threads may make the same one at once, and none waits for another's
        self.index = lru_cache(keep)(self._read_index)  # of a shard
        self._file = lru_cache(OPEN_FILES)(_File)

    def read(self, shard: int, slot: int, memory: np.ndarray | None = None) -> np.ndarray:
        """The part of sample `slot` of a shard, uint8 [size], in `memory` (uint8, `TAR_BLOCK` more or longer) where it is given.

        Raises ShardError with the file and the key.
        """
        index = self.index(shard)
        size, key = TAR_BLOCK + index.sizes[slot], index.keys[slot]
        # 512 in front hold the tar's own header of this member: its name says whether index and tar agree
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
                f"{index.path} is damaged: where {member.decode()} should be, {size} bytes long, it {what}; {self.redo()}"
            )
        return memory[TAR_BLOCK:]

    def read_tensor(self, shard: int, slot: int, memory: np.ndarray | None = None) -> Tensor:
        part = self.read(shard, slot, memory)
        try:
            return parse_tensor(part, self.stem, checksum=self.checksum)
        except ValueError as error:
            index = self.index(shard)
            raise ShardError(
                f"{index.path}, sample {index.keys[slot]}: {error}; {self.redo()}"
            ) from None

    def fetch(self, shard: int) -> Path:
        """Where the tar of a shard is on this machine, brought here where it is remote. Raises ShardError."""
        entry = self.shards[shard]
        return (
            self.folder / f"{entry.name}.tar"
            if self.remote is None
            else self.remote.fetch(self.name, entry, self.part)
        )

    def _read_bytes(self, shard: int, index: _Index, offset: int, memory: np.ndarray) -> int:
        try:
            return _fill(self._file(index.path), offset, memory)
        except FileNotFoundError:
            if self.remote is None:
                raise
            self.fetch(shard)  # it had to make room in the cache
            return _fill(self._file(index.path), offset, memory)

    def close(self) -> None:
        self._file.cache_clear()

    def _read_index(self, shard: int) -> _Index:
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
                f"{tar} is not the shard that the manifest lists (sha256 {sidecar.entry.sha256[:16]}, there "
                f"{entry.sha256[:16]}): it was made again since; run `landiff precompute finalize`"
            )
        try:
            size = stored.stat().st_size
        except OSError as error:
            raise ShardError(f"{tar}: {error}; {self.redo()}") from error
        if size != entry.bytes:
            raise ShardError(
                f"{tar} is damaged: it has {size} bytes, its sidecar says {entry.bytes}; {self.redo()}"
            )
        if len(sidecar.index) != entry.samples:
            raise ShardError(
                f"{sidecar_path(tar)} lists {len(sidecar.index)} samples, the manifest {entry.samples}; {self.redo()}"
            )
        if self.column is not None and not self.adopt:
            self._check_origin(tar, sidecar, shard)
        try:
            places = [parts[self.part] for _, parts in sidecar.index]
        except KeyError:
            raise ShardError(f"{tar}: a sample has no part {self.part!r}; {self.redo()}") from None
        return _Index(
            stored,
            [key for key, _ in sidecar.index],
            [p[0] for p in places],
            [p[1] for p in places],
        )

    def _check_origin(self, tar: Path, sidecar: Sidecar, shard: int) -> None:
        if sidecar.fingerprint != self.column.fingerprint:
            raise ShardError(
                f"{tar} was made with fingerprint {sidecar.fingerprint}, the rest of column {self.name!r} with "
                f"{self.column.fingerprint}; {self.redo()}, or set data.adopt=true to take it as it is"
            )
        if sidecar.raw_sha256 != self.raw_shards[shard].sha256:
            raise ShardError(
                f"{tar} was made from a raw shard with sha256 {sidecar.raw_sha256[:16]}, which is now "
                f"{self.raw_shards[shard].sha256[:16]}; {self.redo()}, or set data.adopt=true to take it as it is"
            )

    def redo(self) -> str:
        """What to do about a damaged shard, for the end of a message."""
        command = "landiff shards" if self.name == RAW else "landiff precompute"
        return f"delete {self.folder.name}'s tar and sidecar of that name and run `{command}` again"


@dataclass(frozen=True)
class _Rows:
    """The clips of one shard that take part, and where each lies in `raw` and in every column."""

    keys: list[str]
    slots: list[list[int]]  # by folder, raw first
    sizes: list[
        list[int]
    ]  # the same: bytes of memory for the part and the tar block in front of it, aligned

    def size(self, slot: int) -> int:
        return sum([sizes[slot] for sizes in self.sizes])


class AlignedColumns:
    """Samples of a data set with the wanted columns; clips that any of them set aside do not take part."""

    def __init__(
        self,
        data: Path,
        manifest: Manifest,
        columns: Sequence[str],
        *,
        adopt: bool = False,
        keep: int = 64,
        checksum: bool = False,
        remote: Remote | None = None,
    ) -> None:
        """`keep`: indices of so many shards stay in memory. Raises ShardError where a column is missing or stale."""
        check_column_fingerprints(manifest, columns, adopt=adopt)
        self.manifest, self.columns, self.remote = manifest, tuple(columns), remote
        self._raw = FolderReader(data, RAW, "json", manifest.shards, keep=keep, remote=remote)
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
        # {shard: raw positions left out}, and each column's own, for the shards where there are any
        self._excluded: dict[int, list[int]] = {}
        for shard, raw in enumerate(manifest.shards):
            missing: set[int] = set()
            for name in columns:
                entry = manifest.columns[name].shards[shard]
                if entry.samples + len(entry.missing) != raw.samples:
                    raise ShardError(
                        f"column {name!r}, shard {entry.name}: {entry.samples} samples and {len(entry.missing)} set "
                        f"aside are not the {raw.samples} of its raw shard; run `landiff precompute` again"
                    )
                missing.update(entry.missing)
            if missing:
                self._excluded[shard] = sorted(missing)
        self._rows = lru_cache(keep)(self._align)  # of a shard
        self.counts = np.array([s.samples for s in manifest.shards], dtype=np.int64)
        for shard, missing_positions in self._excluded.items():
            self.counts[shard] -= len(missing_positions)

    @property
    def exclusions(self) -> str:
        """Fingerprint of the clips that don't take part."""
        return content_fingerprint(sorted(self._excluded.items()))

    def size(self, shard: int, slot: int) -> int:
        """Bytes of memory that `read` wants for sample `slot` of those of a shard that take part. Raises ShardError."""
        return self._rows(shard).size(slot)

    def read(
        self, shard: int, slot: int, memory: np.ndarray
    ) -> tuple[RawSample, dict[str, Tensor]]:
        """That sample, its tensors in `memory` (uint8, of its `size` or longer). Raises ShardError with file and key."""
        rows = self._rows(shard)
        meta = self._read_meta(shard, rows.slots[0][slot], rows.keys[slot], memory)
        at, tensors = rows.sizes[0][slot], {}
        for (name, reader), slots, sizes in zip(
            self._readers.items(), rows.slots[1:], rows.sizes[1:], strict=True
        ):
            tensors[name] = reader.read_tensor(shard, slots[slot], memory[at:])
            at += sizes[slot]
        return meta, tensors

    def _read_meta(self, shard: int, position: int, key: str, memory: np.ndarray) -> RawSample:
        text = self._raw.read(shard, position, memory)
        try:
            meta = RawSample.model_validate_json(text.tobytes())
        except ValidationError as error:
            raise ShardError(
                f"{self._raw.index(shard).path}, sample {key}: its JSON is not a raw sample: {error}"
            ) from None
        if meta.key != key:
            raise ShardError(
                f"{self._raw.index(shard).path}, sample {key}: its JSON is that of {meta.key}; {self._raw.redo()}"
            )
        return meta

    def _align(self, shard: int) -> _Rows:
        raw = self._raw.index(shard)
        excluded = set(self._excluded.get(shard, ()))
        positions = [position for position in range(len(raw.keys)) if position not in excluded]
        rows = _Rows(
            [raw.keys[position] for position in positions], [positions], [_sizes(raw, positions)]
        )
        for name, reader in self._readers.items():
            index, missing = (
                reader.index(shard),
                set(self.manifest.columns[name].shards[shard].missing),
            )
            own = {
                position: slot
                for slot, position in enumerate(p for p in range(len(raw.keys)) if p not in missing)
            }
            slots = [own[position] for position in positions]
            for slot, key in zip(slots, rows.keys, strict=True):
                if index.keys[slot] != key:
                    raise ShardError(
                        f"{index.path} is not aligned with {raw.path}: sample {slot} is {index.keys[slot]}, where {key} "
                        "should be; delete it and run `landiff precompute` again"
                    )
            rows.slots.append(slots)
            rows.sizes.append(_sizes(index, slots))
        return rows

    def fetch(self, shard: int) -> None:
        """Have a remote shard here before it is read. Raises ShardError."""
        for reader in (self._raw, *self._readers.values()):
            reader.fetch(shard)

    def bytes_of(self, shard: int) -> int:
        """What the columns of a shard take in a cache; of `raw`, the JSON alone is fetched."""
        return sum(reader.shards[shard].bytes for reader in self._readers.values())

    def close(self) -> None:
        for reader in (self._raw, *self._readers.values()):
            reader.close()


def _sizes(index: _Index, slots: Sequence[int]) -> list[int]:
    return [-(-(TAR_BLOCK + index.sizes[slot]) // ALIGNMENT) * ALIGNMENT for slot in slots]
