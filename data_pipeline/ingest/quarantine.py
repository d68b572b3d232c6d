"""Keeps the bytes of rejected clips for inspection.

    <data>/rejected/000003.tar    <id>.<suffix> + <id>.json (`QuarantineEntry`) of the rejects of
                                  raw shard 000003

The file is written before the raw shard is committed. Its content depends on the plan only, so a
repeated run writes the same bytes. A shard without such clips has no file here.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from types import TracebackType

from pydantic import Field

from landiff.configs.base import Config
from landiff.data_pipeline.format.schema import Reject
from landiff.data_pipeline.format.shards import ShardWriter
from landiff.data_pipeline.ingest.config import QuarantineConfig
from landiff.data_pipeline.video.codec import VideoFile

log = logging.getLogger(__name__)

REJECTED = "rejected"


class QuarantineEntry(Config):
    """The JSON beside quarantined bytes: why they were rejected and where they come from."""

    key: str = Field(description="Key of the rejected clip, or the name of its video.")
    reason: str = Field(description="Reason of the reject.")
    detail: str = Field(description="Detail of the reject.")
    path: str = Field(
        default="",
        description="Path of the source video; empty for clips that a filter rejected.",
    )
    offset: int = Field(default=0, description="Offset of the video in its file, in bytes.")


class Quarantine:
    """Collects bytes of the rejects of one shard, up to `config.max_mb`.

    Use as a context manager: the file is written when the `with` block ends without an error.
    """

    def __init__(self, data: Path, name: str, fingerprint: str, config: QuarantineConfig) -> None:
        self.data = data
        self.name = name
        self.fingerprint = fingerprint
        self.bytes_left = config.max_mb << 20
        self._entries: dict[str, tuple[str, bytes, QuarantineEntry]] = {}

    def __enter__(self) -> Quarantine:
        return self

    def keep_source(self, reject: Reject, video: VideoFile) -> None:
        """Keep the bytes of a damaged video. Bytes that are kept already are not added again."""
        place = f"{os.fspath(video.path)!r}:{video.offset}"
        name = hashlib.sha1(place.encode()).hexdigest()
        if name in self._entries:
            return
        try:
            if not video.path.is_file():
                return
            size = video.size if video.size >= 0 else video.path.stat().st_size - video.offset
            if size > self.bytes_left:
                log.info(
                    "%s is not kept in %s: its %d bytes exceed what is left of quarantine.max_mb",
                    reject.key,
                    REJECTED,
                    size,
                )
                return
            with open(video.path, "rb") as file:
                data = os.pread(file.fileno(), size, video.offset)
        except (OSError, ValueError):  # an unreadable video cannot be kept
            return
        entry = QuarantineEntry(
            key=reject.key,
            reason=reject.reason,
            detail=reject.detail,
            path=repr(os.fspath(video.path))[1:-1],
            offset=video.offset,
        )
        self._put(name, _member_suffix(video), data, entry)

    def keep_clip(self, key: str, reason: str, suffix: str, data: bytes, *, detail: str) -> None:
        """Keep an encoded clip that a filter rejected."""
        if len(data) <= self.bytes_left:
            self._put(key, suffix, data, QuarantineEntry(key=key, reason=reason, detail=detail))

    def _put(self, name: str, suffix: str, data: bytes, entry: QuarantineEntry) -> None:
        self.bytes_left -= len(data)
        self._entries[name] = (suffix, data, entry)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None or not self._entries:
            return
        folder = self.data / REJECTED
        with ShardWriter(folder, self.name, fingerprint=self.fingerprint) as writer:
            for name, (suffix, data, entry) in self._entries.items():
                writer.add(name, {suffix: data, "json": entry.model_dump_json().encode()})


def _member_suffix(video: VideoFile) -> str:
    """Suffix of a video's tar member: that of the file, or "video" for members of tars."""
    if video.size >= 0:
        return "video"
    suffix = video.path.suffix.lower().lstrip(".")
    return suffix if suffix.isalnum() and suffix.isascii() else "video"
