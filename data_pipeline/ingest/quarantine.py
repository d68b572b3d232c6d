"""Bytes of clips that were set aside, kept so that somebody can look at them.

    <data>/rejected/000003.tar    <id>.<suffix> + <id>.json (`Kept`) of the rejects of raw shard 000003

Written before the raw shard is committed, a function of the same plan: made again, it has the same bytes. A
shard without such clips has no file here.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from types import TracebackType

from landiff.configs.base import Config
from landiff.data_pipeline.format.schema import Reject
from landiff.data_pipeline.format.shards import ShardWriter
from landiff.data_pipeline.ingest.config import QuarantineConfig
from landiff.data_pipeline.video.codec import VideoFile

log = logging.getLogger(__name__)

REJECTED = "rejected"


class Kept(Config):
    """Why bytes lie in the quarantine, and where they came from."""

    key: str
    reason: str
    detail: str
    path: str = ""  # of the source; "" for clips that a filter refused
    offset: int = 0


class Quarantine:
    """Collects what one shard sets aside, up to a number of bytes; leaving the `with` block writes it."""

    def __init__(self, data: Path, name: str, fingerprint: str, config: QuarantineConfig) -> None:
        self.data, self.name, self.fingerprint = data, name, fingerprint
        self.left = config.max_mb << 20
        self._entries: dict[str, tuple[str, bytes, Kept]] = {}

    def __enter__(self) -> Quarantine:
        return self

    def keep_source(self, reject: Reject, video: VideoFile) -> None:
        """Keep the bytes of a damaged video, once."""
        name = hashlib.sha1(f"{os.fspath(video.path)!r}:{video.offset}".encode()).hexdigest()
        if name in self._entries:
            return
        try:
            if not video.path.is_file():
                return
            size = video.size if video.size >= 0 else video.path.stat().st_size - video.offset
            if size > self.left:
                log.info(
                    "%s is not kept in %s: %d bytes are more than is left of quarantine.max_mb",
                    reject.key,
                    REJECTED,
                    size,
                )
                return
            with open(video.path, "rb") as file:
                data = os.pread(file.fileno(), size, video.offset)
        except (OSError, ValueError):  # what can't be read can't be kept
            return
        suffix = video.path.suffix.lower().lstrip(".") if video.size < 0 else ""
        suffix = suffix if suffix.isalnum() and suffix.isascii() else "video"
        kept = Kept(
            key=reject.key,
            reason=reject.reason,
            detail=reject.detail,
            path=repr(os.fspath(video.path))[1:-1],
            offset=video.offset,
        )
        self._put(name, suffix, data, kept)

    def keep(self, key: str, reason: str, suffix: str, data: bytes, detail: str) -> None:
        """Keep a clip that a filter refused."""
        if len(data) <= self.left:
            self._put(key, suffix, data, Kept(key=key, reason=reason, detail=detail))

    def _put(self, name: str, suffix: str, data: bytes, kept: Kept) -> None:
        self.left -= len(data)
        self._entries[name] = (suffix, data, kept)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._entries:
            with ShardWriter(
                self.data / REJECTED, self.name, fingerprint=self.fingerprint
            ) as writer:
                for name, (suffix, data, kept) in self._entries.items():
                    writer.add(name, {suffix: data, "json": kept.model_dump_json().encode()})
