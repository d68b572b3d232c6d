"""The rows of a source, written down once: what the steps of planning read again and again, a piece at a time.

    <data>/plan/<mark>.rows.jsonl      one line for each row of the source, in its order
    <data>/plan/<mark>.ignored.json    how many members of its tars no clip uses, by kind

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
from typing import Any, BinaryIO

from landiff.configs.base import ConfigError
from landiff.configs.documents import parse_line, read_json
from landiff.configs.files import atomic_file, write_text
from landiff.data_pipeline.format.schema import content_fingerprint
from landiff.data_pipeline.format.shards import ShardError
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.sources.entries import IgnoredFiles, SourceClip, Tally, TarFile
from landiff.data_pipeline.ingest.sources.listing import Listing
from landiff.data_pipeline.video.codec import DecodeFailure, VideoFile

LOOKS_VERSION = 2  # of what is seen of a video
TARS_VERSION = 2  # of what is read from a tar: 2 splits names at the last dot
NO_STAMP = (-1, -1)  # of a file that isn't there
VIDEOS_PER_CHUNK = 128  # on average; what a task that is killed has to look at again
ROWS_PER_VIDEO = 16  # of a chunk, at most


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of the source. What makes it unusable before its video is opened is its clip's `failure`."""

    clip: SourceClip
    stamp: tuple[
        int, int
    ]  # size in bytes and time of change in ns of the file; -1 when it isn't there
    offset: int = 0  # of its line
    end: int = 0

    def as_json(self) -> str:
        """One line of JSON, with the line of the clip's table at the end, where it has one."""
        line = [self.clip.line] if self.clip.line else []
        return json.dumps(self._values() + line)

    def content(self) -> str:
        """What the mark of the rows is of: all but the line, so that comments and blank lines do not count."""
        return json.dumps(self._values())

    def _values(self) -> list[Any]:
        clip, video = self.clip, self.clip.video
        end_s = None if math.isinf(clip.end_s) else clip.end_s
        failure = clip.failure and (clip.failure.reason, clip.failure.detail)
        captions = [clip.caption, *clip.more_captions]
        return [
            clip.name,
            os.fspath(video.path),
            video.offset,
            video.size,
            captions,
            clip.start_s,
            end_s,
            failure,
            *self.stamp,
        ]

    @classmethod
    def from_json(cls, line: bytes, offset: int) -> SourceRow:
        fields = parse_line(line, "a row of the plan")
        name, path, start, size, (caption, *more), start_s, end_s, failure, *rest = fields
        number = rest[2] if len(rest) > 2 else 0
        clip = SourceClip(
            name,
            VideoFile(Path(path), start, size),
            caption,
            start_s,
            math.inf if end_s is None else end_s,
            DecodeFailure(*failure) if failure else None,
            tuple(more),
            number,
        )
        return cls(clip, tuple(rest[:2]), offset, offset + len(line))


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


@dataclass(frozen=True)
class SourceState:
    """A source as it is now, tars closed."""

    mark: str
    ignored: Tally


def read_plan_state(config: ShardsConfig, listing: Listing) -> SourceState:
    """Lists the whole source, without opening tars. Raises ConfigError when a row can't be read."""
    return _read_source(config, listing, None, Tally())


def plan_path(config: ShardsConfig, data: Path, folder: str, listing: Listing) -> Path:
    """The path of the plan of this source as it is now. Raises ConfigError when a row can't be read."""
    return data / folder / f"{read_plan_state(config, listing).mark}.json"


def rows_path(plan: Path) -> Path:
    return plan.with_suffix(".rows.jsonl")


def ignored_path(plan: Path) -> Path:
    """Where the counts of the members of tars are that no clip uses; there is no such file where all are used."""
    return plan.with_suffix(".ignored.json")


def read_ignored_members(plan: Path) -> Tally:
    """The members of the source's tars that no clip uses, as `write_rows` found them."""
    try:
        with damage_of(ignored_path(plan)):
            return Tally.from_json(read_json(ignored_path(plan)))
    except FileNotFoundError:
        return Tally()


def write_rows(config: ShardsConfig, listing: Listing, plan: Path) -> Path:
    """Write the rows that belong to `plan`, unless they are there. Raises ConfigError when the source changes meanwhile."""
    path = rows_path(plan)
    if not path.exists():
        members = Tally()
        with atomic_file(path) as file:
            if _read_source(config, listing, file, members).mark != plan.stem:
                raise ConfigError(
                    f"source = {config.source!r} changed while it was read; run again when it is complete"
                )
            if members.counts:
                write_text(ignored_path(plan), json.dumps(members.as_json()))
    return path


def _read_source(
    config: ShardsConfig, listing: Listing, file: BinaryIO | None, members: Tally
) -> SourceState:
    """The state of a source. Where `file` is given, the rows go to it, and `members` counts what tars hold besides."""
    digest = hashlib.sha256(
        content_fingerprint(LOOKS_VERSION, config.identity(), config.columns.recorded()).encode()
    )
    ignored, stamps = Tally(), _Stamps()
    for entry in listing.entries():
        if isinstance(entry, IgnoredFiles):
            ignored.add(entry.kind, entry.name)
        elif isinstance(entry, SourceClip):
            row = _row_of(config, entry, stamps)
            digest.update(row.content().encode() + b"\n")
            if file is not None:
                file.write(row.as_json().encode() + b"\n")
        else:
            digest.update(
                json.dumps([os.fspath(entry.path), stamp_of(entry.path), TARS_VERSION]).encode()
            )
            if file is not None:
                _write_members(config, listing, entry, stamps, file, members)
    return SourceState(digest.hexdigest()[:16], ignored)


def _write_members(
    config: ShardsConfig,
    listing: Listing,
    tar: TarFile,
    stamps: _Stamps,
    file: BinaryIO,
    members: Tally,
) -> None:
    for entry in listing.members(tar):
        if isinstance(entry, IgnoredFiles):
            members.add(entry.kind, entry.name)
        else:
            file.write(_row_of(config, entry, stamps).as_json().encode() + b"\n")


class _Stamps:
    """Sizes and times of change of files; the last one is kept, since rows of one file follow each other."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._stamp = NO_STAMP

    def of(self, path: Path) -> tuple[int, int]:
        if path != self._path:
            self._path = path
            self._stamp = stamp_of(path)
        return self._stamp


def _row_of(config: ShardsConfig, clip: SourceClip, stamps: _Stamps) -> SourceRow:
    failure = unusable(config, clip)
    if failure:
        clip = replace(clip, caption="", more_captions=(), failure=failure)
    return SourceRow(clip, stamps.of(clip.video.path))


def stamp_of(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a name with a null byte
        return NO_STAMP
    return (found.st_size, found.st_mtime_ns)


def unusable(config: ShardsConfig, clip: SourceClip) -> DecodeFailure | None:
    """What is wrong with a row before its video is opened."""
    if clip.failure:
        return clip.failure
    if not clip.caption:
        return DecodeFailure("empty_caption")
    longest = max(map(len, (clip.caption, *clip.more_captions)))
    if longest > config.max_caption:
        return DecodeFailure(
            "long_caption", f"{longest} characters, more than max_caption = {config.max_caption}"
        )
    return None


def read_rows(path: Path, offset: int = 0, end: float = math.inf) -> Iterator[SourceRow]:
    with damage_of(path), open(path, "rb") as file:
        file.seek(offset)
        while offset < end and (line := file.readline()):
            yield SourceRow.from_json(line, offset)
            offset += len(line)


def chunks(config: ShardsConfig, path: Path) -> Iterator[tuple[Chunk, list[SourceRow]]]:
    """The rows in pieces that are cut where the names say so: a new video changes one piece only."""
    rows: list[SourceRow] = []
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
            name = hashlib.sha256(
                f"{os.fspath(row.clip.video.path)!r}:{row.clip.video.offset}".encode()
            ).digest()
            full = (
                int.from_bytes(name[:8], "big") % VIDEOS_PER_CHUNK == 0
                or len(videos) == 4 * VIDEOS_PER_CHUNK
            )
    if rows:
        yield _chunk(config, rows), rows


def videos_of(rows: Sequence[SourceRow]) -> dict[VideoFile, tuple[int, int]]:
    """The videos that are to be looked at, each once, in order; with their stamps."""
    return {row.clip.video: row.stamp for row in rows if not row.clip.failure}


def _chunk(config: ShardsConfig, rows: Sequence[SourceRow]) -> Chunk:
    videos = videos_of(rows)
    shots = config.shots.model_dump(mode="json") if config.shots else None
    marks = [
        (repr(os.fspath(video.path)), video.offset, video.size, *stamp)
        for video, stamp in videos.items()
    ]
    video = config.video.model_dump(mode="json")
    letterbox = config.filters.letterbox
    mark = content_fingerprint(LOOKS_VERSION, config.max_pixels, video, shots, letterbox, marks)
    return Chunk(rows[0].offset, rows[-1].end, f"looks-{mark}.jsonl", len(videos))
