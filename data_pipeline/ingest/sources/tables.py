"""Lists tables of captions: CSV (with commas, tabs or semicolons) and JSONL.

A table whose structure is damaged is a ConfigError that names the line: nothing after the damage can
be trusted. A row that cannot be used is a clip that is rejected.
"""

from __future__ import annotations

import csv
import math
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from landiff.configs.base import ConfigError
from landiff.data_pipeline.ingest.config import ColumnsConfig
from landiff.data_pipeline.ingest.sources.entries import (
    VIDEO_SUFFIXES,
    IgnoredFiles,
    SourceClip,
    kind_of,
    printable,
    split_name,
)
from landiff.data_pipeline.ingest.sources.folder import FolderFile, walk
from landiff.data_pipeline.ingest.sources.text_files import (
    MAX_TEXT_BYTES,
    TextError,
    captions_of,
    describe,
    list_literal,
    parse_object,
    table_lines,
)
from landiff.data_pipeline.video.codec import DecodeFailure, VideoFile

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv")
DELIMITERS = (",", "\t", ";", "|")
MAX_CAPTIONS = 100  # of one clip, from rows that follow each other
MAX_NAMES = 10  # of columns, in messages

Row = Mapping[str, Any]


def table_in(folder: Path) -> Path | None:
    """The table of captions of a folder. Raises ConfigError where there are several."""
    wanted = [f"captions{suffix}" for suffix in TABLE_SUFFIXES]
    tables = sorted(name for name in os.listdir(folder) if name.lower() in wanted)
    tables = [name for name in tables if (folder / name).is_file()]
    if len(tables) > 1:
        raise ConfigError(
            f"source = {os.fspath(folder)!r} holds {' and '.join(tables)}; name the one to use, "
            f"e.g. source={folder / tables[0]}, or remove the other"
        )
    return folder / tables[0] if tables else None


def table_entries(path: Path, columns: ColumnsConfig) -> Iterator[SourceClip]:
    """The clips of a table.

    Rows of the same span that follow each other are one clip with several captions.
    Raises ConfigError with the line.
    """
    rows = _jsonl_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path, columns)
    last = None
    for line, row in rows:
        for clip in _clips_of(path, line, row, columns):
            if last is None:
                last = clip
            elif _is_same_span(last, clip):
                last = replace(
                    last, more_captions=(*last.more_captions, clip.caption, *clip.more_captions)
                )
            else:
                yield last
                last = clip
    if last is not None:
        yield last


def folder_table_entries(
    folder: Path, table: Path, columns: ColumnsConfig
) -> Iterator[SourceClip | IgnoredFiles]:
    """The clips of the table of a folder, then the files that the table does not name.

    8 bytes for each row are kept in memory.
    """
    listed = array("q")
    for clip in table_entries(table, columns):
        listed.append(hash(os.path.normpath(clip.video.path)))
        yield clip
    hashes = np.unique(np.frombuffer(listed, np.int64)) if listed else np.zeros(0, np.int64)
    for found in walk(folder):
        if not isinstance(found, FolderFile):
            yield found
        elif found.path != os.fspath(table):
            value = hash(os.path.normpath(found.path))
            at = int(np.searchsorted(hashes, value))
            if at == len(hashes) or hashes[at] != value:
                yield IgnoredFiles(_kind_beside(found), printable(found.relative))


def _kind_beside(file: FolderFile) -> str:
    suffix = split_name(file.name)[1]
    if file.problem:
        return "dangling_link" if "link" in file.problem else "special_file"
    return "unlisted_video" if suffix in VIDEO_SUFFIXES else kind_of(file.name)


# ------------------------------------------------------------------------------------------ rows


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    for number, text in enumerate(table_lines(path), start=1):
        if not text.strip():
            continue
        try:
            row = parse_object(text)
        except ValueError as error:
            cut = (
                ""
                if text.endswith(("\n", "\r"))
                else "; the file ends within this line, so it may be cut off"
            )
            raise ConfigError(f"{path}, line {number} {error}{cut}") from None
        yield number, row


def _csv_rows(path: Path, columns: ColumnsConfig) -> Iterator[tuple[int, Row]]:
    lines = table_lines(path)
    first = []  # up to the header
    for text in lines:
        first.append(text)
        if text.strip():
            break
    delimiter = _delimiter(first[-1] if first else "", columns)
    csv.field_size_limit(MAX_TEXT_BYTES)
    reader = csv.reader(chain(first, lines), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ConfigError(
                f"{path}, line {line}: {_csv_problem(error, reader.line_num - line)}"
            ) from None
        if not fields:
            continue
        if names is None:
            names = [name.strip() for name in fields]
            _check_header(path, names)
        else:
            _check_fields(path, line, names, fields, delimiter)
            yield line, dict(zip(names, fields, strict=False))


def _delimiter(header: str, columns: ColumnsConfig) -> str:
    """The delimiter under which the header has both columns, else that of the most columns."""
    found = {
        one: [name.strip().strip('"') for name in header.strip().split(one)] for one in DELIMITERS
    }
    for one, names in found.items():
        if columns.file in names and columns.caption in names:
            return one
    return max(DELIMITERS, key=lambda one: len(found[one]))


def _check_header(path: Path, names: list[str]) -> None:
    for name in names:
        if name and names.count(name) > 1:
            raise ConfigError(
                f"{path}, line 1: column {name!r} occurs twice; give each column its own name"
            )


def _check_fields(
    path: Path, line: int, names: list[str], fields: list[str], delimiter: str
) -> None:
    """Raise ConfigError where a row does not have the fields that the header names."""
    while len(fields) > len(names) and not fields[-1].strip():
        fields.pop()
    if len(fields) != len(names):
        raise ConfigError(
            f"{path}, line {line} has {len(fields)} fields, the header names {len(names)} columns; "
            f"a text that holds {delimiter!r} must stand in double quotes"
        )
    for field in fields:
        if ("\n" in field or "\r" in field) and _holds_rows(field, delimiter):
            raise ConfigError(
                f"{path}, line {line}: a quoted text spans lines that are rows of their own; close its "
                "double quote, or write a double quote within a text twice"
            )


def _holds_rows(field: str, delimiter: str) -> bool:
    """Whether a line of a text begins with the name of a video and a delimiter."""
    for text in field.splitlines()[1:]:
        name, found, _ = text.partition(delimiter)
        if found and split_name(name.strip().strip('"'))[1] in VIDEO_SUFFIXES:
            return True
    return False


def _csv_problem(error: csv.Error, lines_after: int) -> str:
    if "unexpected end of data" in str(error):
        after = f"the file ends {lines_after} lines later"
        return f"a double quote is opened here and never closed ({after})"
    if "field larger than" in str(error):
        return (
            f"a text has more than {MAX_TEXT_BYTES} characters; perhaps a double quote is opened here "
            "and never closed"
        )
    if "expected after" in str(error):
        within = f" (found {lines_after} lines later)" if lines_after > 0 else ""
        return (
            f"a closing double quote is followed by text{within}; write a double quote within a text "
            "twice"
        )
    return f"not a CSV that can be read: {error}"


# ------------------------------------------------------------------------------------------ clips


def _clips_of(path: Path, line: int, row: Row, columns: ColumnsConfig) -> Iterator[SourceClip]:
    """The clips of one row: one, or one for each time stamp where it has a list of them."""
    for key, column in (("file", columns.file), ("caption", columns.caption)):
        if column not in row:
            names = ", ".join(map(repr, list(row)[:MAX_NAMES]))
            raise ConfigError(
                f"{path}, line {line}: no column {column!r}, there are {names}; "
                f"name it with columns.{key}=..."
            )
    file = row[columns.file]
    if not isinstance(file, str) or not file.strip():
        detail = f"line {line}: {describe(file)} is not the name of a file"
        yield _failed(
            path,
            f"{path.name}:{line}",
            VideoFile(path.parent),
            line,
            DecodeFailure("no_file_name", detail),
        )
        return
    video = VideoFile(path.parent / file)
    times = _time_stamps(path, line, row, columns)
    try:
        captions = captions_of(row[columns.caption])
    except TextError as error:
        yield _failed(
            path,
            file,
            video,
            line,
            DecodeFailure(error.failure.reason, f"line {line}: {error.failure.detail}"),
        )
        return
    if times is None:
        start_s = _seconds(row.get(columns.start_s), columns.start_s, 0.0, path, line)
        end_s = _seconds(row.get(columns.end_s), columns.end_s, math.inf, path, line)
        yield SourceClip(
            name=printable(file),
            video=video,
            caption=captions[0],
            start_s=start_s,
            end_s=end_s,
            more_captions=tuple(captions[1:]),
            line=line,
        )
        return
    if len(times) != len(captions):
        raise ConfigError(
            f"{path}, line {line}: {columns.timestamp} has {len(times)} spans, "
            f"{columns.caption} {len(captions)} captions; each span needs one"
        )
    for (start_s, end_s), caption in zip(times, captions, strict=True):
        yield SourceClip(
            name=printable(file),
            video=video,
            caption=caption,
            start_s=start_s,
            end_s=end_s,
            line=line,
        )


def _failed(
    path: Path, name: str, video: VideoFile, line: int, failure: DecodeFailure
) -> SourceClip:
    return SourceClip(name=printable(name), video=video, caption="", failure=failure, line=line)


def _is_same_span(one: SourceClip, other: SourceClip) -> bool:
    """Whether two rows give different captions to one span."""
    if one.failure or other.failure or not (one.caption and other.caption):
        return False
    if (one.video, one.start_s, one.end_s) != (other.video, other.start_s, other.end_s):
        return False
    captions = (one.caption, *one.more_captions, other.caption, *other.more_captions)
    return len(captions) <= MAX_CAPTIONS and len(set(captions)) == len(captions)


def _time_stamps(
    path: Path, line: int, row: Row, columns: ColumnsConfig
) -> list[tuple[float, float]] | None:
    """The spans of a row that has a list of [start, end], as in Panda-70M; else None."""
    value = row.get(columns.timestamp)
    if isinstance(value, str):
        value = list_literal(value)
    if not isinstance(value, list) or not value:
        return None
    if len(value) == 2 and not isinstance(value[0], list):
        value = [value]
    times = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConfigError(
                f"{path}, line {line}: {columns.timestamp} must be a list of [start, end]"
            )
        start_s = _seconds(pair[0], columns.timestamp, 0.0, path, line)
        times.append((start_s, _seconds(pair[1], columns.timestamp, math.inf, path, line)))
    return times


def _seconds(value: Any, column: str, default: float, path: Path, line: int) -> float:
    """Seconds, as a number or as [[hours:]minutes:]seconds. Raises ConfigError."""
    if value is None or value == "":
        return default
    seconds = math.nan
    if isinstance(value, str) and re.fullmatch(r"\s*(\d+:)?\d+:\d+(\.\d*)?\s*", value):
        seconds = 0.0
        for part in value.split(":"):
            seconds = 60 * seconds + float(part)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except (ValueError, OverflowError):
            seconds = math.nan
    if math.isnan(seconds) or seconds < 0:
        raise ConfigError(
            f"{path}, line {line}: {column} = {value!r} is not a time in seconds"[:300]
        )
    return seconds
