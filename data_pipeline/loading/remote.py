"""Data folders at a URL, with a local cache of bounded size.

The cache has the layout of a data folder. A shard is downloaded when its first sample is read; all
samples of a shuffle window of shards are read before the next window. Of raw shards, trainers read
only the JSON, so only those ranges are downloaded, into a sparse file. Several ranks of a node may
share a cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
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
    sidecar_path,
)
from landiff.data_pipeline.loading.config import SourceConfig

log = logging.getLogger(__name__)

TAR_BLOCK = 512
STAT_BLOCK = 512  # unit of st_blocks
RANK_PART = 0.75
"""Part of a cache for shards that one rank uses or downloads ahead. The rest is for other ranks."""

BLOCK = 8 << 20  # bytes read at a time
ATTEMPTS = 4  # to read from the URL
FIRST_PAUSE_S = 0.5  # before the second attempt; doubles
EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3"}  # by protocol
LOCKS = 64  # lock files of a cache; downloads of shards with the same lock wait for each other
SPARSE_SUFFIX = ".{part}-only.tar"  # end of the name of a raw shard in the cache

T = TypeVar("T")


class Remote:
    """A data folder at an fsspec URL (s3://, gs://, https://, file://, ...) and its cache."""

    def __init__(self, url: str, cache: Path, max_bytes: int) -> None:
        """Raises ShardError if the protocol of the URL needs a package that is not installed."""
        import fsspec  # takes 0.1 s, and most data sets are local

        self.url = url.rstrip("/")
        self.cache = cache
        self.max_bytes = max_bytes
        self.closed = False  # set to True to end downloads in progress
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            extra = EXTRAS.get(self.url.partition("://")[0])
            hint = ""
            if isinstance(error, ImportError) and extra is not None:
                hint = f"; pip install 'landiff-pretrain[{extra}]'"
            raise ShardError(f"data.remote = {url}: {error}{hint}") from error
        self._errors = network_errors(self.url)

    def read_manifest(self) -> bytes:
        """The manifest at the URL, as bytes. Does not write to the cache. Raises ShardError."""
        return self._retry(MANIFEST, self._files.cat_file)

    def fetch_manifest(self) -> None:
        """Download the manifest into the cache. Raises ShardError."""
        data = self.read_manifest()
        with atomic_file(self.cache / MANIFEST) as file:
            file.write(data)

    def fetch(self, folder: str, entry: ShardEntry, part: str) -> Path:
        """The local tar of a shard, downloaded if necessary, with its sidecar in the same folder.

        For `raw`, a sparse file with the parts `part` at their offsets. Raises ShardError if the
        URL does not have what the manifest lists.
        """
        tar = self.cache / folder / f"{entry.name}.tar"
        stored = tar
        if folder == RAW:
            stored = tar.with_name(entry.name + SPARSE_SUFFIX.format(part=part))
        slot = int(hashlib.sha256(str(tar).encode()).hexdigest(), 16) % LOCKS
        with locked(self.cache / ".locks" / str(slot)):
            sidecar = self._sidecar(tar, folder, entry)
            with suppress(FileNotFoundError):  # others may delete it at any moment
                if stored.stat().st_size == entry.bytes:
                    os.utime(stored)  # the least recently used shards are deleted first
                    return stored
            if folder == RAW:
                self._fetch_parts(stored, folder, entry, sidecar, part)
            else:
                self._fetch_whole(stored, folder, entry)
        return stored

    def check_cache_size(self, window_bytes: int) -> None:
        """Raise ShardError if the cache cannot hold the shards that are read at the same time."""
        if window_bytes > self.max_bytes:
            raise ShardError(
                f"data.cache_gigabytes = {self.max_bytes / 1e9:g}, but {window_bytes / 1e9:.3g} GB "
                "of shards are read at the same time; raise it, or lower data.shuffle_window"
            )

    def _sidecar(self, tar: Path, folder: str, entry: ShardEntry) -> Sidecar:
        """The sidecar of a shard. If it is downloaded, an older tar is deleted."""
        sidecar = read_sidecar(tar)
        if sidecar is not None and sidecar.entry.sha256 == entry.sha256:
            return sidecar
        data = self._retry(f"{folder}/{entry.name}.json", self._files.cat_file)
        with atomic_file(sidecar_path(tar)) as file:
            file.write(data)
        tar.unlink(missing_ok=True)
        sidecar = read_sidecar(tar)
        if sidecar is None:
            raise ShardError(f"{sidecar_path(tar)} was deleted from the cache while it was in use")
        return sidecar

    def _fetch_whole(self, target: Path, folder: str, entry: ShardEntry) -> None:
        """Download a tar and compare its SHA-256."""
        self._free_space(entry.bytes)
        name = f"{folder}/{entry.name}.tar"

        def download(path: str) -> None:
            digest = hashlib.sha256()
            with self._files.open(path, "rb") as source, atomic_file(target) as file:
                while True:
                    data = source.read(BLOCK)
                    if not data:
                        break
                    if self.closed:
                        raise ShardError(f"{self.url}/{name} is no longer needed")
                    digest.update(data)
                    file.write(data)
                if digest.hexdigest() != entry.sha256:
                    raise ShardError(
                        f"{self.url}/{name} has sha256 {digest.hexdigest()[:16]}, the manifest "
                        f"says {entry.sha256[:16]}; it is damaged, or was made again since: run "
                        "`landiff precompute finalize` there"
                    )

        self._retry(name, download)

    def _fetch_parts(
        self, target: Path, folder: str, entry: ShardEntry, sidecar: Sidecar, part: str
    ) -> None:
        """Download one part of every sample, with its tar header, into a sparse file."""
        places = [parts[part] for _, parts in sidecar.index if part in parts]
        starts = [offset - TAR_BLOCK for offset, _ in places]
        ends = [offset + size for offset, size in places]
        self._free_space(sum(ends) - sum(starts))
        name = f"{folder}/{entry.name}.tar"

        def download(path: str) -> None:
            ranges: list[bytes] = []
            if starts:
                ranges = self._files.cat_ranges(
                    [path] * len(starts), starts, ends, on_error="raise"
                )
            for start, end, data in zip(starts, ends, ranges, strict=True):
                if len(data) != end - start:
                    raise ShardError(
                        f"{self.url}/{name} gave {len(data)} bytes for the {end - start} from "
                        f"{start} on; use a server that supports HTTP Range requests, or copy the "
                        "data to this machine"
                    )
            with atomic_file(target) as file:
                for start, data in zip(starts, ranges, strict=True):
                    file.seek(start)
                    file.write(data)
                file.truncate(entry.bytes)

        self._retry(name, download)

    def _free_space(self, size: int) -> None:
        """Delete least recently used shards until `size` bytes fit. Open files stay readable."""
        with locked(self.cache):
            stored = []
            for path in [*self.cache.glob("*/*.tar"), *self.cache.glob("*/.*.tmp")]:
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                stored.append((status.st_mtime_ns, status.st_blocks * STAT_BLOCK, path))
            total = sum(used for _, used, _ in stored)
            for _, used, path in sorted(stored):
                if total + size <= self.max_bytes:
                    break
                if path.suffix == ".tar":
                    path.unlink(missing_ok=True)
                    total -= used

    def _retry(self, name: str, attempt: Callable[[str], T]) -> T:
        """Call `attempt` with the path of `name`, again after network errors.

        Raises ShardError after the last attempt, or if there is no such file.
        """
        for number in range(ATTEMPTS):
            try:
                return attempt(f"{self._root}/{name}")
            except FileNotFoundError:
                raise ShardError(f"{self.url}/{name} does not exist") from None
            except PermissionError as error:
                raise ShardError(
                    f"{self.url}/{name} cannot be read: {error}; check the credentials of this "
                    "user and the policy of the bucket"
                ) from error
            except self._errors as error:
                if number == ATTEMPTS - 1:
                    raise ShardError(f"{self.url}/{name} cannot be read: {error}") from error
                log.warning("%s/%s: %s; trying again", self.url, name, error)
                time.sleep(FIRST_PAUSE_S * 2**number)
        raise AssertionError("unreachable")


def network_errors(url: str) -> tuple[type[Exception], ...]:
    """Exceptions of a file system that may be temporary, such as those of an overloaded server."""
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientError  # fsspec has imported it; most of its errors are no OSError

        return (OSError, ClientError)
    if url.startswith(("s3://", "s3a://")):
        from botocore.exceptions import BotoCoreError  # s3fs has imported it; they are no OSError

        return (OSError, BotoCoreError)
    return (OSError,)


def open_remote(source: SourceConfig) -> Remote | None:
    """The remote of a data set, with its manifest downloaded; None for a local data set."""
    if not source.remote:
        return None
    remote = _remote_of(source)
    remote.fetch_manifest()
    return remote


def _remote_of(source: SourceConfig) -> Remote:
    return Remote(source.remote, data_folder(source), int(source.cache_gigabytes * 1e9))


def data_folder(source: SourceConfig) -> Path:
    """The folder of a data set, or that of its cache."""
    if source.manifest.suffix == ".json":
        return source.manifest.parent
    return source.manifest


def find_manifest(source: SourceConfig) -> Manifest:
    """The manifest of a local or remote data set. Writes nothing. Raises ShardError."""
    if not source.remote:
        return read_manifest(source.manifest)
    return parse_manifest(_remote_of(source).read_manifest(), source.remote)
