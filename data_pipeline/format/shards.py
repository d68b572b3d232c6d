"""Tar shards: written atomically, read by offset.

The bytes of a tar depend only on its samples (they contain no time, user or process), so equal
input gives equal shards.
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

HEAD = 8 << 10  # bytes per read of the start of a sidecar
MAX_HEAD = 4 << 20  # bytes before the index; a sidecar with more is read completely
INDEX = b',"index":['  # start of the last field of a sidecar
INDEX_END = b"]}"  # end of a sidecar


class ShardError(ConfigError):
    """A shard, sidecar or manifest is missing, damaged or inconsistent."""


class ShardWriter:
    """Writes a tar and its sidecar. The end of the `with` block commits them; errors discard them.

    with ShardWriter(folder, "000000", fingerprint=...) as writer:
        writer.add(key, {"mp4": clip, "json": text})
    """

    def __init__(
        self, folder: Path, name: str, *, fingerprint: str, raw_sha256: str = "", bucket: str = ""
    ) -> None:
        """Prepare `<folder>/<name>.tar`. For the other arguments see `Sidecar` and `ShardEntry`."""
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
        """Open the temporary tar."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append one sample; `parts` maps file extensions without the first dot to contents.

        Raises ShardError for an empty key or one with a dot or slash.
        """
        if not key or "." in key or "/" in key:
            raise ShardError(
                f"sample key {key!r} must be non-empty and without dots or slashes: WebDataset "
                "cuts names there"
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
        """Record a rejected clip. A column passes the `position` of the clip in the raw shard."""
        if position is not None:
            self.missing.append(position)
        self.rejects.append(Reject(key=key, stage=stage, reason=reason, detail=detail))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit the shard, or discard it after an error."""
        if kind is not None:
            self._close_and_discard()
            return
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except BaseException:
            self._close_and_discard()
            raise
        self.sidecar = self._make_sidecar()
        self.commit()

    def _close_and_discard(self) -> None:
        try:
            self._file.close()
        finally:
            self.discard()

    def _make_sidecar(self) -> Sidecar:
        entry = ShardEntry(
            name=self.name,
            samples=len(self._index),
            bytes=self._temporary.stat().st_size,
            sha256=sha256_file(self._temporary),
            bucket=self.bucket,
            missing=tuple(sorted(self.missing)),
        )
        return Sidecar(
            entry=entry,
            index=self._index,
            rejects=self.rejects,
            fingerprint=self.fingerprint,
            raw_sha256=self.raw_sha256,
            dtype=self.dtype,
            shape=self.shape,
            truncated=self.truncated,
            value_range=self.value_range,
        )

    def commit(self) -> None:
        """Give tar and sidecar their final names. Called at the end of the `with` block."""
        os.replace(self._temporary, self.path)
        fsync_dir(self.path.parent)
        write_text(sidecar_path(self.path), self.sidecar.model_dump_json(indent=None))

    def discard(self) -> None:
        """Delete the temporary tar."""
        self._temporary.unlink(missing_ok=True)


def sidecar_path(tar: Path) -> Path:
    """The sidecar of a tar."""
    return tar.with_suffix(".json")


def read_sidecar(tar: Path, *, index: bool = True) -> Sidecar | None:
    """The sidecar that commits `tar`, or None if `tar` is not committed.

    With `index=False` the index, which is most of the file, is not read and is empty in the result.
    Raises ShardError if the sidecar is damaged.
    """
    path = sidecar_path(tar)
    try:
        if not index:
            with open(path, "rb") as file, suppress(ValidationError):  # if the index is not last
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
    """Raise ShardError if a part is outside the tar.

    A reader allocates as much memory as the sidecar gives as its size.
    """
    for key, parts in sidecar.index:
        for part, (offset, size) in parts.items():
            if offset < tarfile.BLOCKSIZE or size < 0 or offset + size > sidecar.entry.bytes:
                raise ShardError(
                    f"{path} is damaged: it says that {key}.{part} has {size} bytes at {offset}, "
                    f"its tar has {sidecar.entry.bytes} bytes; delete both and run the command "
                    "again"
                )


def _before_index(file: BinaryIO) -> bytes:
    """The JSON of a sidecar with an empty index. Not valid JSON if the file is incomplete."""
    data = b""
    while len(data) < MAX_HEAD:
        chunk = file.read(HEAD)
        if not chunk:
            break
        data += chunk
        position = data.find(INDEX)  # cannot be part of a string, where quotes are escaped
        if position >= 0:
            file.seek(-len(INDEX_END), os.SEEK_END)
            return data[:position] + INDEX + file.read()
    return data


def read_manifest(data: Path) -> Manifest:
    """The manifest of a data folder, or in that file. Raises ShardError if missing or damaged."""
    path = data if data.suffix == ".json" else data / MANIFEST
    try:
        document = read_bytes(path, MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise ShardError(
            f"{path} does not exist; run `landiff shards` first, and `landiff precompute` for its "
            "columns"
        ) from None
    except NotADirectoryError:
        raise ShardError(f"{data} is a file; name a data folder, or its manifest.json") from None
    return parse_manifest(document, path)


def parse_manifest(document: bytes, path: Path | str) -> Manifest:
    """The manifest in a document that was read from `path`. Raises ShardError if it is damaged."""
    try:
        return parse_json_as(Manifest, document, path, any_text=True)
    except ConfigError as error:
        raise ShardError(
            f"{path} is not a manifest of format 1: {error}. Delete it, then run `landiff shards "
            "finalize` and `landiff precompute finalize` with the configs that made the data: they "
            "write it again from the finished shards"
        ) from None


def read_part(data: Path, manifest: Manifest, key: str, part: str, folder: str = RAW) -> bytes:
    """One part of one sample, searched for in all shards. Too slow for training."""
    for entry in manifest.shards:
        tar = data / folder / f"{entry.name}.tar"
        sidecar = read_sidecar(tar)
        places = dict(sidecar.index).get(key) if sidecar is not None else None
        if places is not None and part in places:
            offset, size = places[part]
            with open(tar, "rb") as file:
                file.seek(offset)
                return file.read(size)
    raise ShardError(f"{data / folder} has no part {part!r} of a sample {key}")


def write_manifest(data: Path, manifest: Manifest) -> None:
    """Replace the manifest. The fields for ignored files are written only if there are any."""
    unused = set() if manifest.ignored_counts else {"ignored_counts", "ignored_examples"}
    write_text(data / MANIFEST, manifest.model_dump_json(indent=1, exclude=unused))


def count_rejects(rejects: Sequence[Reject]) -> dict[str, int]:
    """Number of rejected clips by "stage/reason"."""
    counts: dict[str, int] = {}
    for reject in rejects:
        name = f"{reject.stage}/{reject.reason}"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
