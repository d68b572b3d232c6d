"""The rows of a source, written down once: what the steps of planning read again and again, a piece at a time.

    <data>/plan/<mark>.rows.jsonl      one line for each row of the source, in its order

A row is a video or a span of one, its caption, and size and time of change of its file. The mark is of all of
them and of the config, so a source that changed has other rows, and one that did not is never read twice.
However long the source, no more of it is in memory than one chunk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from configs.base import ConfigError
from configs.documents import parse_line
from configs.files import atomic_file
from data_pipeline.ingest_config import ShardsConfig
from data_pipeline.schema import fingerprint
from data_pipeline.shards import ShardError
from data_pipeline.sources import Listing, SourceClip
from data_pipeline.video import Failure, VideoFile

LOOKS_VERSION = 1  # of what is seen of a video
VIDEOS_PER_CHUNK = 128  # on average; what a task that is killed has to look at again
ROWS_PER_VIDEO = 16  # of a chunk, at most


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the source. What makes it unusable before its video is opened is its clip's `failure`."""

    clip: SourceClip
    stamp: tuple[int, int]  # size in bytes and time of change in ns of the file; -1 when it isn't there
    offset: int = 0  # of its line
    end: int = 0

    def as_json(self) -> str:
        clip, video = self.clip, self.clip.video
        end_s = None if math.isinf(clip.end_s) else clip.end_s
        failure = clip.failure and (clip.failure.reason, clip.failure.detail)
        return json.dumps([clip.name, os.fspath(video.path), video.offset, video.size, [clip.caption, *clip.more_captions], clip.start_s, end_s, failure, *self.stamp])

    @classmethod
    def from_json(cls, line: bytes, offset: int) -> Row:
        fields = parse_line(line, "a row of the plan")
        name, path, start, size, (caption, *more), start_s, end_s, failure, *stamp = fields
        clip = SourceClip(name, VideoFile(Path(path), start, size), caption, start_s, math.inf if end_s is None else end_s,
                          Failure(*failure) if failure else None, tuple(more))
        return cls(clip, tuple(stamp), offset, offset + len(line))


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Turn what a damaged file of a plan causes into one ShardError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(
            f"{path} is damaged ({error}); delete the folder {path.parent} and run the command again"
        ) from None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that follow each other, as a range of bytes; their videos are looked at together."""

    offset: int
    end: int
    looks: str  # name of the file of what was seen
    videos: int


def plan_path(config: ShardsConfig, data: Path, folder: str, listing: Listing) -> Path:
    """The path of the plan of this source as it is now. Raises ConfigError when a row can't be read."""
    return data / folder / f"{_digest(config, listing, None)}.json"


def rows_path(plan: Path) -> Path:
    return plan.with_suffix(".rows.jsonl")


def write_rows(config: ShardsConfig, listing: Listing, plan: Path) -> Path:
    """Write the rows that belong to `plan`, unless they are there. Raises ConfigError when the source changes meanwhile."""
    path = rows_path(plan)
    if not path.exists():
        with atomic_file(path) as file:
            if _digest(config, listing, file) != plan.stem:
                raise ConfigError(f"source = {config.source!r} changed while it was read; run again when it is complete")
    return path


def _digest(config: ShardsConfig, listing: Listing, file: BinaryIO | None) -> str:
    """The mark of the rows; the rows themselves go to `file`, where one is given. Tars stay closed where none is."""
    digest = hashlib.sha256(fingerprint(LOOKS_VERSION, config.identity(), config.columns.model_dump()).encode())
    for tar in listing.tars:
        digest.update(json.dumps([os.fspath(tar), stamp_of(tar)]).encode())
    if file is None and listing.tars:
        return digest.hexdigest()[:16]
    last, stamp = None, (-1, -1)
    for clip in listing.clips():
        if clip.video.path != last:
            last, stamp = clip.video.path, stamp_of(clip.video.path)
        failure = unusable(config, clip)
        line = Row(replace(clip, caption="", more_captions=(), failure=failure) if failure else clip, stamp).as_json().encode() + b"\n"
        if not listing.tars:
            digest.update(line)
        if file is not None:
            file.write(line)
    return digest.hexdigest()[:16]


def stamp_of(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a name with a null byte
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns)


def unusable(config: ShardsConfig, clip: SourceClip) -> Failure | None:
    """What is wrong with a row before its video is opened."""
    if clip.failure:
        return clip.failure
    if not clip.caption:
        return Failure("empty_caption")
    longest = max(map(len, (clip.caption, *clip.more_captions)))
    if longest > config.max_caption:
        return Failure("long_caption", f"{longest} characters, more than max_caption = {config.max_caption}")
    return None


def read_rows(path: Path, offset: int = 0, end: float = math.inf) -> Iterator[Row]:
    with damage_of(path), open(path, "rb") as file:
        file.seek(offset)
        while offset < end and (line := file.readline()):
            yield Row.from_json(line, offset)
            offset += len(line)


def chunks(config: ShardsConfig, path: Path) -> Iterator[tuple[Chunk, list[Row]]]:
    """The rows in pieces that are cut where the names say so: a new video changes one piece only."""
    rows: list[Row] = []
    videos: dict[VideoFile, None] = {}
    full = False
    for row in read_rows(path):
        new = not row.clip.failure and row.clip.video not in videos
        if (full and new) or len(rows) == ROWS_PER_VIDEO * VIDEOS_PER_CHUNK:
            yield _chunk(config, rows), rows
            rows, videos, full, new = [], {}, False, not row.clip.failure
        rows.append(row)
        if new:
            videos[row.clip.video] = None
            name = hashlib.sha256(f"{os.fspath(row.clip.video.path)!r}:{row.clip.video.offset}".encode()).digest()
            full = int.from_bytes(name[:8], "big") % VIDEOS_PER_CHUNK == 0 or len(videos) == 4 * VIDEOS_PER_CHUNK
    if rows:
        yield _chunk(config, rows), rows


def videos_of(rows: Sequence[Row]) -> dict[VideoFile, tuple[int, int]]:
    """The videos that are to be looked at, each once, in order; with their stamps."""
    return {row.clip.video: row.stamp for row in rows if not row.clip.failure}


def _chunk(config: ShardsConfig, rows: Sequence[Row]) -> Chunk:
    videos = videos_of(rows)
    shots = config.shots.model_dump(mode="json") if config.shots else None
    marks = [(repr(os.fspath(video.path)), video.offset, video.size, *stamp) for video, stamp in videos.items()]
    mark = fingerprint(LOOKS_VERSION, config.max_pixels, shots, config.filters.letterbox, marks)
    return Chunk(rows[0].offset, rows[-1].end, f"looks-{mark}.jsonl", len(videos))
