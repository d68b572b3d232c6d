"""The rows of a source on disk, which the steps of planning read several times, a chunk at a time.

    <data>/plan/<fingerprint>.rows.jsonl      one line for each row of the source, in its order
    <data>/plan/<fingerprint>.ignored.json    number of tar members that no clip uses, by kind

A row is a video or a span of one, its caption, and size and modification time of its file. The
fingerprint covers all rows and the config: a source that changed gets other files, and one that did
not change is never written again. No more than one chunk of rows is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
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

PROBES_VERSION = 2  # of the content of probes
TARS_VERSION = 2  # of how tars are listed; since 2, member names are split at the last dot
NO_STAMP = (-1, -1)  # of a file that does not exist, and of a folder
VIDEOS_PER_CHUNK = 128  # on average: the videos that a killed task has to probe again
ROWS_PER_VIDEO = 16  # of a chunk, at most

Stamp = tuple[int, int]  # size in bytes and modification time in ns


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of the source.

    What is known to be wrong with it before its video is opened is the `failure` of its clip.
    """

    clip: SourceClip
    stamp: Stamp  # of its file; NO_STAMP if the file does not exist
    offset: int = 0  # of its line, in bytes
    end: int = 0  # of its line, in bytes

    def as_json(self) -> str:
        """One line of JSON; the last value is the line of the clip in its table, if it has one."""
        values = self._values()
        if self.clip.line:
            values.append(self.clip.line)
        return json.dumps(values)

    def fingerprinted_json(self) -> str:
        """The values that the fingerprint covers.

        The line number is left out, so that comments and blank lines do not change it.
        """
        return json.dumps(self._values())

    def _values(self) -> list[Any]:
        clip = self.clip
        failure = (clip.failure.reason, clip.failure.detail) if clip.failure else None
        return [
            clip.name,
            os.fspath(clip.video.path),
            clip.video.offset,
            clip.video.size,
            [clip.caption, *clip.more_captions],
            clip.start_s,
            None if math.isinf(clip.end_s) else clip.end_s,
            failure,
            *self.stamp,
        ]

    @classmethod
    def from_json(cls, line: bytes, offset: int) -> SourceRow:
        """Inverse of `as_json`. `offset` is that of the line in the file of rows."""
        values = parse_line(line, "a row of the plan")
        name, path, start, size, (caption, *more), start_s, end_s, failure, *rest = values
        file_size, file_time, *line_number = rest
        clip = SourceClip(
            name=name,
            video=VideoFile(Path(path), start, size),
            caption=caption,
            start_s=start_s,
            end_s=math.inf if end_s is None else end_s,
            failure=DecodeFailure(*failure) if failure else None,
            more_captions=tuple(more),
            line=line_number[0] if line_number else 0,
        )
        return cls(clip, (file_size, file_time), offset, offset + len(line))


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Convert the errors that a damaged file of a plan causes into one ShardError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(
            f"{path} is damaged ({error}); "
            f"delete the folder {path.parent} and run the command again"
        ) from None


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Consecutive rows, as a range of bytes of the file of rows.

    Their videos are probed together.
    """

    offset: int
    end: int
    probes_file: str  # name of the file with the probes of its videos
    videos: int


@dataclass(frozen=True)
class SourceState:
    """A source as it is now, without the members of its tars."""

    fingerprint: str
    ignored: Tally


def read_source_state(config: ShardsConfig, listing: Listing) -> SourceState:
    """List a whole source without opening its tars. Raises ConfigError if a row cannot be read."""
    return _read_source(config, listing, None, Tally())


def rows_path(plan: Path) -> Path:
    """The file of rows of a plan."""
    return plan.with_suffix(".rows.jsonl")


def ignored_path(plan: Path) -> Path:
    """The file with the counts of tar members that no clip uses. Missing if all are used."""
    return plan.with_suffix(".ignored.json")


def read_ignored_members(plan: Path) -> Tally:
    """The tar members that no clip uses, as `write_rows` counted them."""
    path = ignored_path(plan)
    try:
        with explain_damage(path):
            return Tally.from_json(read_json(path))
    except FileNotFoundError:
        return Tally()


def write_rows(config: ShardsConfig, listing: Listing, plan: Path) -> Path:
    """Write the rows of the plan at `plan` unless they exist, and return their path.

    Raises ConfigError if the source changed since the path of the plan was computed.
    """
    path = rows_path(plan)
    if path.exists():
        return path
    members = Tally()
    with atomic_file(path) as file:
        state = _read_source(config, listing, file, members)
        if state.fingerprint != plan.stem:
            raise ConfigError(
                f"source = {config.source!r} changed while it was read; "
                "run again when it is complete"
            )
        if members.counts:
            write_text(ignored_path(plan), json.dumps(members.as_json()))
    return path


def _read_source(
    config: ShardsConfig, listing: Listing, file: BinaryIO | None, members: Tally
) -> SourceState:
    """The state of a source.

    If `file` is given, the rows are written to it, and `members` counts the tar members that no
    clip uses.
    """
    base = content_fingerprint(PROBES_VERSION, config.identity(), config.columns.recorded())
    digest = hashlib.sha256(base.encode())
    ignored = Tally()
    stamps = _StampCache()
    for entry in listing.entries():
        if isinstance(entry, IgnoredFiles):
            ignored.add(entry.kind, entry.name)
        elif isinstance(entry, SourceClip):
            row = _make_row(config, entry, stamps)
            digest.update(row.fingerprinted_json().encode() + b"\n")
            if file is not None:
                file.write(row.as_json().encode() + b"\n")
        else:
            values = [os.fspath(entry.path), stamp_of(entry.path), TARS_VERSION]
            digest.update(json.dumps(values).encode())
            if file is not None:
                _write_members(config, listing, entry, stamps=stamps, file=file, members=members)
    return SourceState(digest.hexdigest()[:16], ignored)


def _write_members(
    config: ShardsConfig,
    listing: Listing,
    tar: TarFile,
    *,
    stamps: _StampCache,
    file: BinaryIO,
    members: Tally,
) -> None:
    """Write the rows of one tar, and count the members that no clip uses."""
    for entry in listing.members(tar):
        if isinstance(entry, IgnoredFiles):
            members.add(entry.kind, entry.name)
        else:
            file.write(_make_row(config, entry, stamps).as_json().encode() + b"\n")


class _StampCache:
    """Stamps of files. Keeps the last one, because rows of one file follow each other."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._stamp = NO_STAMP

    def stamp_of(self, path: Path) -> Stamp:
        """`stamp_of` a file, from the cache if it is the same file as before."""
        if path != self._path:
            self._path = path
            self._stamp = stamp_of(path)
        return self._stamp


def _make_row(config: ShardsConfig, clip: SourceClip, stamps: _StampCache) -> SourceRow:
    clip = with_caption(config, clip)
    failure = failure_before_opening(config, clip)
    if failure:
        clip = replace(clip, caption="", more_captions=(), failure=failure)
    return SourceRow(clip, stamps.stamp_of(clip.video.path))


def stamp_of(path: Path) -> Stamp:
    """Size and modification time of a file; NO_STAMP if it does not exist or is no file.

    A row can name a folder, whose time changes when the data folder is created in it.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return NO_STAMP
    if not stat.S_ISREG(found.st_mode):
        return NO_STAMP
    return (found.st_size, found.st_mtime_ns)


def with_caption(config: ShardsConfig, clip: SourceClip) -> SourceClip:
    """The clip, with the caption that `missing_captions` gives it if it has none."""
    lacks_caption = not clip.caption
    if clip.failure is not None:
        lacks_caption = clip.failure.reason == "empty_caption"
    if config.missing_captions == "reject" or not lacks_caption:
        return clip
    path = PurePosixPath(clip.name.replace(":", "/"))  # a member of a tar is "a.tar:0001"
    name = ""
    if config.missing_captions == "file_name":
        name = path.stem if "." in path.name else path.name
    elif config.missing_captions == "folder_name":
        name = path.parent.name
        if not name and len(config.sources) == 1:
            name = Path(config.sources[0]).name
    words = " ".join(re.split(r"[\W_]+", name)).strip()
    return replace(clip, caption=words, failure=None)


def failure_before_opening(config: ShardsConfig, clip: SourceClip) -> DecodeFailure | None:
    """What is wrong with a clip, as far as it can be told without opening its video."""
    if clip.failure:
        return clip.failure
    if not clip.caption and config.missing_captions != "none":
        return DecodeFailure("empty_caption")
    longest = max(map(len, (clip.caption, *clip.more_captions)))
    if longest > config.max_caption:
        return DecodeFailure(
            "long_caption", f"{longest} characters, more than max_caption = {config.max_caption}"
        )
    return None


def read_rows(path: Path, offset: int = 0, end: float = math.inf) -> Iterator[SourceRow]:
    """The rows whose lines begin from `offset` on and before `end`. Raises ShardError on damage."""
    with explain_damage(path), open(path, "rb") as file:
        file.seek(offset)
        while offset < end:
            line = file.readline()
            if not line:
                return
            yield SourceRow.from_json(line, offset)
            offset += len(line)


def iter_chunks(config: ShardsConfig, path: Path) -> Iterator[tuple[RowChunk, list[SourceRow]]]:
    """The rows, divided into chunks.

    Chunks end at videos whose names hash to certain values. So a new video changes the chunk that
    it is in and no other.
    """
    rows: list[SourceRow] = []
    videos: set[VideoFile] = set()
    is_full = False
    for row in read_rows(path):
        is_new = not row.clip.failure and row.clip.video not in videos
        if (is_full and is_new) or len(rows) == ROWS_PER_VIDEO * VIDEOS_PER_CHUNK:
            yield _make_chunk(config, rows), rows
            rows = []
            videos = set()
            is_full = False
            is_new = not row.clip.failure
        rows.append(row)
        if is_new:
            videos.add(row.clip.video)
            is_full = _ends_chunk(row.clip.video) or len(videos) == 4 * VIDEOS_PER_CHUNK
    if rows:
        yield _make_chunk(config, rows), rows


def _ends_chunk(video: VideoFile) -> bool:
    """Whether a chunk ends after this video, by the hash of its name."""
    name = f"{os.fspath(video.path)!r}:{video.offset}"
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % VIDEOS_PER_CHUNK == 0


def videos_of(rows: Sequence[SourceRow]) -> dict[VideoFile, Stamp]:
    """The videos to probe with their stamps, each once, in order."""
    return {row.clip.video: row.stamp for row in rows if not row.clip.failure}


def _make_chunk(config: ShardsConfig, rows: Sequence[SourceRow]) -> RowChunk:
    videos = videos_of(rows)
    stamped = []
    for video, stamp in videos.items():
        stamped.append((repr(os.fspath(video.path)), video.offset, video.size, *stamp))
    fingerprint = content_fingerprint(
        PROBES_VERSION,
        config.max_pixels,
        config.video.model_dump(mode="json"),
        config.shots.model_dump(mode="json") if config.shots else None,
        config.filters.letterbox,
        stamped,
    )
    # "looks" is an earlier word for probes; data folders hold files of this name
    return RowChunk(rows[0].offset, rows[-1].end, f"looks-{fingerprint}.jsonl", len(videos))
