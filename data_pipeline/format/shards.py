"""Tar shards: written whole or not at all, read by offset.

The tar bytes are a pure function of the samples (no clock, no user, no process in them), so equal input
gives equal shards.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from pydantic import ValidationError

from landiff.configs.base import ConfigError
from landiff.configs.documents import MAX_INDEX_BYTES, read_bytes
from landiff.configs.files import fsync_dir, sha256_file, temporary_name, write_text
from landiff.configs.loader import parse_json_as, read_json_as
from landiff.data_pipeline.format.schema import MANIFEST, RAW, Manifest, Reject, ShardEntry, Sidecar

HEAD = 8 << 10
MAX_HEAD = 4 << 20  # bytes before the index; a sidecar with more is read whole
INDEX, INDEX_END = b',"index":[', b"]}"  # how the last field of a sidecar begins and ends


class ShardError(ConfigError):
    """A shard, sidecar or manifest is missing or does not say what it must."""


class ShardWriter:
    """Write one tar and its sidecar; leaving the `with` block commits both, an exception leaves nothing.

    with ShardWriter(folder, "000000", fingerprint=...) as writer:
        writer.add(key, {"mp4": clip, "json": text})
    """

    def __init__(
        self, folder: Path, name: str, *, fingerprint: str, raw_sha256: str = "", bucket: str = ""
    ) -> None:
        self.path = folder / f"{name}.tar"
        self.name = name
        self.fingerprint = fingerprint
        self.raw_sha256 = raw_sha256
        self.bucket = bucket
        self.rejects: list[Reject] = []
        self.missing: list[int] = []
        self.dtype = ""
        self.shape: list[int] = []
        self.truncated = 0
        self.value_range: tuple[int, int] | None = None
        self._index: list[tuple[str, dict[str, tuple[int, int]]]] = []
        self._temporary = temporary_name(self.path)

    def __enter__(self) -> ShardWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append one sample. `key` holds no dot or slash; part names are file extensions without the first dot."""
        if not key or "." in key or "/" in key:
            raise ShardError(
                f"sample key {key!r} must be non-empty and hold no dot or slash: WebDataset cuts names there"
            )
        places = {}
        for part, data in parts.items():
            info = tarfile.TarInfo(f"{key}.{part}")
            info.size = len(data)
            info.mode = 0o644
            self._tar.addfile(info, io.BytesIO(data))
            end = self._tar.offset
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            places[part] = (end - padded, len(data))
        self._index.append((key, places))

    def reject(
        self, key: str, stage: str, reason: str, detail: str = "", position: int | None = None
    ) -> None:
        """Set a clip aside; it is counted in the sidecar and the manifest. A column gives the clip's raw position."""
        if position is not None:
            self.missing.append(position)
        self.rejects.append(Reject(key=key, stage=stage, reason=reason, detail=detail))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
        except BaseException:
            kind = OSError
            raise
        finally:
            try:
                self._file.close()
            finally:
                if kind is not None:
                    self.discard()
        if kind is None:
            self.sidecar = Sidecar(
                entry=ShardEntry(
                    name=self.name,
                    samples=len(self._index),
                    bytes=self._temporary.stat().st_size,
                    sha256=sha256_file(self._temporary),
                    bucket=self.bucket,
                    missing=tuple(sorted(self.missing)),
                ),
                index=self._index,
                rejects=self.rejects,
                fingerprint=self.fingerprint,
                raw_sha256=self.raw_sha256,
                dtype=self.dtype,
                shape=self.shape,
                truncated=self.truncated,
                value_range=self.value_range,
            )
            self.commit()

    def commit(self) -> None:
        """Give tar and sidecar their names; called at the end of the `with` block."""
        os.replace(self._temporary, self.path)
        fsync_dir(self.path.parent)
        write_text(sidecar_path(self.path), self.sidecar.model_dump_json(indent=None))

    def discard(self) -> None:
        """Delete what was written; instead of `commit`."""
        self._temporary.unlink(missing_ok=True)


def sidecar_path(tar: Path) -> Path:
    return tar.with_suffix(".json")


def read_sidecar(tar: Path, *, index: bool = True) -> Sidecar | None:
    """The sidecar that commits `tar`, or None while it isn't committed. Raises ShardError when it is damaged.

    Without `index`, what is in front of the samples' places, which make most of it.
    """
    path = sidecar_path(tar)
    try:
        if not index:
            with open(path, "rb") as file, suppress(ValidationError):  # of another order of fields
                return Sidecar.model_validate_json(_before_index(file))
        sidecar = read_json_as(Sidecar, path, limit=MAX_INDEX_BYTES, any_text=True)
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise ShardError(
            f"{path} is not a shard sidecar: {error}; delete it and run the command again"
        ) from None
    _check_places(path, sidecar)
    return sidecar


def _check_places(path: Path, sidecar: Sidecar) -> None:
    """Raise ShardError where a part lies outside of the tar: a reader would ask for as much memory as the sidecar claims."""
    for key, parts in sidecar.index:
        for part, (offset, size) in parts.items():
            if offset < tarfile.BLOCKSIZE or size < 0 or offset + size > sidecar.entry.bytes:
                raise ShardError(
                    f"{path} is damaged: it says that {key}.{part} has {size} bytes at {offset}, its tar has "
                    f"{sidecar.entry.bytes} bytes; delete both and run the command again"
                )


def _before_index(file: BinaryIO) -> bytes:
    """The JSON of a sidecar with nothing in its index; where the file does not end as it must, no JSON."""
    data = b""
    while len(data) < MAX_HEAD and (chunk := file.read(HEAD)):
        data += chunk
        at = data.find(INDEX)  # quotes in a text have a backslash in front, so this is the field
        if at >= 0:
            file.seek(-len(INDEX_END), os.SEEK_END)
            return data[:at] + INDEX + file.read()
    return data


def read_manifest(data: Path) -> Manifest:
    """The manifest of a data folder (or the manifest file itself). Raises ShardError when missing or damaged."""
    path = data if data.suffix == ".json" else data / MANIFEST
    try:
        document = read_bytes(path, MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise ShardError(
            f"{path} does not exist; run `landiff shards` first, and `landiff precompute` for its columns"
        ) from None
    return parse_manifest(document, path)


def parse_manifest(document: bytes, path: Path | str) -> Manifest:
    """The manifest in a document that was read from `path`. Raises ShardError when it is damaged."""
    try:
        return parse_json_as(Manifest, document, path, any_text=True)
    except ConfigError as error:
        raise ShardError(
            f"{path} is not a manifest of format 1: {error}. Delete it, then run `landiff shards finalize` and "
            "`landiff precompute finalize` with the configs that made the data: they write it anew from the finished shards"
        ) from None


def read_part(data: Path, manifest: Manifest, key: str, part: str, folder: str = RAW) -> bytes:
    """One part of one sample, looked for in all shards: for showing single clips, not for training."""
    for entry in manifest.shards:
        tar = data / folder / f"{entry.name}.tar"
        sidecar = read_sidecar(tar)
        places = dict(sidecar.index).get(key) if sidecar is not None else None
        if places is not None and part in places:
            offset, size = places[part]
            with open(tar, "rb") as file:
                file.seek(offset)
                return file.read(size)
    raise ShardError(f"{data / folder} holds no part {part!r} of a sample {key}")


def write_manifest(data: Path, manifest: Manifest) -> None:
    """Replace the manifest. What a source ignored is written where it ignored anything."""
    unused = set() if manifest.ignored_counts else {"ignored_counts", "ignored_examples"}
    write_text(data / MANIFEST, manifest.model_dump_json(indent=1, exclude=unused))


def count_rejects(rejects: Sequence[Reject]) -> dict[str, int]:
    """ "stage/reason" -> number of clips."""
    counts: dict[str, int] = {}
    for reject in rejects:
        name = f"{reject.stage}/{reject.reason}"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
