"""Data folders behind a URL: shards come through a local cache of bounded size.

The cache has the layout of a data folder. A shard is fetched whole when its first sample is wanted (the order
stays within a window of shards for a while), except raw shards: trainers want their JSON alone, so those
ranges are fetched into a file with holes where the clips would be. Several ranks of a node may share a cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from landiff.configs.files import atomic_file
from landiff.data_pipeline.format.locks import locked
from landiff.data_pipeline.format.schema import MANIFEST, RAW, Manifest, ShardEntry, Sidecar
from landiff.data_pipeline.format.shards import (
    ShardError,
    parse_manifest,
    read_manifest,
    read_sidecar,
)
from landiff.data_pipeline.loading.config import SourceConfig

log = logging.getLogger(__name__)

TAR_BLOCK = 512
ROOM = 0.75  # of a cache, for the shards that one rank uses or fetched ahead; its neighbours' are not all the same
BLOCK = 8 << 20  # bytes read at a time
ATTEMPTS = 4
FIRST_PAUSE_S = 0.5  # before the second attempt; doubles
LOCKS = 64  # shards that ranks of one node fetch at the same time without waiting for one another
HOLES = ".{part}-only.tar"  # the end of a raw shard's name in the cache

T = TypeVar("T")


class Remote:
    """A data folder at an fsspec URL (s3://, gs://, https://, file://, memory:// ...) and its cache."""

    def __init__(self, url: str, cache: Path, max_bytes: int) -> None:
        """Raises ShardError where the URL's protocol needs a package that is not installed."""
        import fsspec

        self.url, self.cache, self.max_bytes = url.rstrip("/"), cache, max_bytes
        self.closed = False  # set it to end what is being fetched
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ShardError(f"data.remote = {url}: {error}") from error

    def read_manifest(self) -> bytes:
        """The manifest at the URL, without writing to the cache. Raises ShardError."""
        return self._again(MANIFEST, lambda path: self._files.cat_file(path))

    def fetch_manifest(self) -> None:
        """The manifest as it is now."""
        data = self.read_manifest()
        with atomic_file(self.cache / MANIFEST) as file:
            file.write(data)

    def fetch(self, folder: str, entry: ShardEntry, part: str) -> Path:
        """The local tar of a shard, whole, or in `raw` with the parts `part` in their places; its sidecar is beside it.

        Raises ShardError where the URL does not hold what the manifest lists.
        """
        tar = self.cache / folder / f"{entry.name}.tar"
        stored = tar.with_name(entry.name + HOLES.format(part=part)) if folder == RAW else tar
        slot = int(hashlib.sha256(str(tar).encode()).hexdigest(), 16) % LOCKS
        with locked(self.cache / ".locks" / str(slot)):
            sidecar = self._sidecar(tar, folder, entry)
            if stored.exists() and stored.stat().st_size == entry.bytes:
                os.utime(stored)  # the least recently used go first
                return stored
            if folder == RAW:
                self._fetch_parts(stored, folder, entry, sidecar, part)
            else:
                self._fetch_whole(stored, folder, entry)
        return stored

    def check_room(self, bytes_of_window: int) -> None:
        """Raise ShardError where the cache cannot hold the shards that are read at the same time."""
        if bytes_of_window > self.max_bytes:
            raise ShardError(
                f"data.cache_gigabytes = {self.max_bytes / 1e9:g}, but {bytes_of_window / 1e9:.3g} GB of shards are read "
                "at the same time; raise it, or lower data.shuffle_window"
            )

    def _sidecar(self, tar: Path, folder: str, entry: ShardEntry) -> Sidecar:
        sidecar = read_sidecar(tar)
        if sidecar is None or sidecar.entry.sha256 != entry.sha256:
            data = self._again(
                f"{folder}/{entry.name}.json", lambda path: self._files.cat_file(path)
            )
            with atomic_file(tar.with_suffix(".json")) as file:
                file.write(data)
            tar.unlink(missing_ok=True)
            sidecar = read_sidecar(tar)
        return sidecar

    def _fetch_whole(self, target: Path, folder: str, entry: ShardEntry) -> None:
        self._make_room(entry.bytes)

        def attempt(path: str) -> None:
            digest = hashlib.sha256()
            with self._files.open(path, "rb") as source, atomic_file(target) as file:
                while data := source.read(BLOCK):
                    if self.closed:
                        raise ShardError(
                            f"{self.url}/{folder}/{entry.name}.tar is no longer wanted"
                        )
                    digest.update(data)
                    file.write(data)
                if digest.hexdigest() != entry.sha256:
                    raise ShardError(
                        f"{self.url}/{folder}/{entry.name}.tar has sha256 {digest.hexdigest()[:16]}, the manifest says "
                        f"{entry.sha256[:16]}; it is damaged, or was made again since: run `landiff precompute finalize` there"
                    )

        self._again(f"{folder}/{entry.name}.tar", attempt)

    def _fetch_parts(
        self, target: Path, folder: str, entry: ShardEntry, sidecar: Sidecar, part: str
    ) -> None:
        places = [parts[part] for _, parts in sidecar.index if part in parts]
        starts = [offset - TAR_BLOCK for offset, _ in places]
        ends = [offset + size for offset, size in places]
        self._make_room(sum(ends) - sum(starts))

        def attempt(path: str) -> None:
            found = self._files.cat_ranges([path] * len(starts), starts, ends) if starts else []
            with atomic_file(target) as file:
                for start, data in zip(starts, found, strict=True):
                    file.seek(start)
                    file.write(data)
                file.truncate(entry.bytes)

        self._again(f"{folder}/{entry.name}.tar", attempt)

    def _make_room(self, size: int) -> None:
        """Delete the least recently used shards until `size` bytes fit. Who has one open goes on reading it."""
        with locked(self.cache):
            stored = []
            for path in [*self.cache.glob("*/*.tar"), *self.cache.glob("*/.*.tmp")]:
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                stored.append((status.st_mtime_ns, status.st_blocks * 512, path))
            total = sum(used for _, used, _ in stored)
            for _, used, path in sorted(stored):
                if total + size <= self.max_bytes:
                    break
                if path.suffix == ".tar":
                    path.unlink(missing_ok=True)
                    total -= used

    def _again(self, name: str, attempt: Callable[[str], T]) -> T:
        """Networks fail now and then. Raises ShardError after the last attempt."""
        for number in range(ATTEMPTS):
            try:
                return attempt(f"{self._root}/{name}")
            except FileNotFoundError:
                raise ShardError(f"{self.url}/{name} does not exist") from None
            except OSError as error:
                if number == ATTEMPTS - 1:
                    raise ShardError(f"{self.url}/{name} cannot be read: {error}") from error
                log.warning("%s/%s: %s; once more", self.url, name, error)
                time.sleep(FIRST_PAUSE_S * 2**number)
        raise AssertionError("unreachable")


def open_remote(source: SourceConfig) -> Remote | None:
    """The remote of a `SourceConfig`, its manifest fetched; None for a local data set."""
    if not source.remote:
        return None
    remote = _remote_of(source)
    remote.fetch_manifest()
    return remote


def _remote_of(source: SourceConfig) -> Remote:
    return Remote(source.remote, data_folder(source), int(source.cache_gigabytes * 1e9))


def data_folder(source: SourceConfig) -> Path:
    """The folder of a data set, or that of its cache."""
    return source.manifest.parent if source.manifest.suffix == ".json" else source.manifest


def find_manifest(source: SourceConfig) -> Manifest:
    """The manifest of a data set, local or remote; nothing is written. Raises ShardError."""
    if not source.remote:
        return read_manifest(source.manifest)
    return parse_manifest(_remote_of(source).read_manifest(), source.remote)
