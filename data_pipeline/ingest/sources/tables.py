"""Lists tables of captions: CSV (with commas, tabs, semicolons or bars) and JSONL.

A table whose structure is damaged raises a ConfigError that names the line, because nothing after
the damage can be trusted. A row that cannot be used is a rejected clip.
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
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    IgnoredFiles,
    SourceClip,
    kind_of,
    printable,
    split_name,
)
from landiff.data_pipeline.ingest.sources.folder import FolderFile, walk_files
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
MAX_CAPTIONS = 100  # of one clip, from consecutive rows
MAX_NAMES = 10  # of columns, in messages
MAX_MESSAGE = 300  # characters of a message with a value of a row

TableRow = Mapping[str, Any]  # column -> value


def table_in(folder: Path) -> Path | None:
    """The table of captions of a folder. Raises ConfigError if there are several."""
    known = [f"captions{suffix}" for suffix in TABLE_SUFFIXES]
    tables = sorted(name for name in os.listdir(folder) if name.lower() in known)
    tables = [name for name in tables if (folder / name).is_file()]
    if len(tables) > 1:
        raise ConfigError(
            f"source = {os.fspath(folder)!r} holds {' and '.join(tables)}; name the one to use, "
            f"e.g. source={folder / tables[0]}, or remove the other"
        )
    return folder / tables[0] if tables else None


def table_entries(path: Path, columns: ColumnsConfig) -> Iterator[SourceClip]:
    """The clips of a table.

    Consecutive rows of the same span are one clip with several captions. Raises ConfigError that
    names the line.
    """
    rows = _jsonl_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path, columns)
    last: SourceClip | None = None
    for line, row in rows:
        for clip in _clips_of(path, line, row, columns):
            if last is None:
                last = clip
            elif _is_same_span(last, clip):
                captions = (*last.more_captions, clip.caption, *clip.more_captions)
                last = replace(last, more_captions=captions)
            else:
                yield last
                last = clip
    if last is not None:
        yield last


def folder_table_entries(
    folder: Path, table: Path, columns: ColumnsConfig
) -> Iterator[SourceClip | IgnoredFiles]:
    """The clips of the table of a folder, then the files that the table does not name.

    Takes 8 bytes of memory for each row.
    """
    listed = array("q")
    for clip in table_entries(table, columns):
        listed.append(hash(os.path.normpath(clip.video.path)))
        yield clip
    hashes = np.unique(np.frombuffer(listed, np.int64)) if listed else np.zeros(0, np.int64)
    for found in walk_files(folder):
        if not isinstance(found, FolderFile):
            yield found
        elif found.path != os.fspath(table):
            value = hash(os.path.normpath(found.path))
            index = int(np.searchsorted(hashes, value))
            if index == len(hashes) or hashes[index] != value:
                yield IgnoredFiles(_kind_beside(found), printable(found.relative))


def _kind_beside(file: FolderFile) -> str:
    """The kind under which a file that the table does not name is counted."""
    suffix = split_name(file.name)[1]
    if file.problem:
        return "dangling_link" if "link" in file.problem else "special_file"
    return "unlisted_video" if suffix in VIDEO_SUFFIXES else kind_of(file.name)


# -------------------------------------------------------------------------------------------- rows


def _jsonl_rows(path: Path) -> Iterator[tuple[int, TableRow]]:
    """(line, row) of a JSONL file. Raises ConfigError that names the line."""
    for number, text in enumerate(table_lines(path), start=1):
        if not text.strip():
            continue
        try:
            row = parse_object(text)
        except ValueError as error:
            message = f"{path}, line {number} {error}"
            if not text.endswith(("\n", "\r")):
                message += "; the file ends within this line, so it may be cut off"
            raise ConfigError(message) from None
        yield number, row


def _csv_rows(path: Path, columns: ColumnsConfig) -> Iterator[tuple[int, TableRow]]:
    """(first line, row) of a CSV file. Raises ConfigError that names the line."""
    lines = table_lines(path)
    head = []  # blank lines and the header
    for text in lines:
        head.append(text)
        if text.strip():
            break
    delimiter = _delimiter(head[-1] if head else "", columns)
    csv.field_size_limit(MAX_TEXT_BYTES)
    reader = csv.reader(chain(head, lines), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = _csv_problem(error, reader.line_num - line)
            raise ConfigError(f"{path}, line {line}: {problem}") from None
        if not fields:
            continue
        if names is None:
            names = [name.strip() for name in fields]
            _check_header(path, names)
        else:
            _check_fields(path, line, names, fields, delimiter)
            yield line, dict(zip(names, fields, strict=False))


def _delimiter(header: str, columns: ColumnsConfig) -> str:
    """The delimiter that gives the header both columns, else the one that gives it most columns."""
    counts = {}
    for delimiter in DELIMITERS:
        names = [name.strip().strip('"') for name in header.strip().split(delimiter)]
        if columns.file in names and columns.caption in names:
            return delimiter
        counts[delimiter] = len(names)
    return max(DELIMITERS, key=lambda delimiter: counts[delimiter])


def _check_header(path: Path, names: list[str]) -> None:
    """Raise ConfigError if two columns have the same name."""
    for name in names:
        if name and names.count(name) > 1:
            raise ConfigError(
                f"{path}, line 1: column {name!r} occurs twice; give each column its own name"
            )


def _check_fields(
    path: Path, line: int, names: list[str], fields: list[str], delimiter: str
) -> None:
    """Raise ConfigError if a row does not have the fields that the header names.

    Empty fields after the last column are removed from `fields`.
    """
    while len(fields) > len(names) and not fields[-1].strip():
        fields.pop()
    if len(fields) != len(names):
        raise ConfigError(
            f"{path}, line {line} has {len(fields)} fields, the header names {len(names)} columns; "
            f"a text that contains {delimiter!r} must be in double quotes"
        )
    for field in fields:
        if ("\n" in field or "\r" in field) and _holds_rows(field, delimiter):
            raise ConfigError(
                f"{path}, line {line}: a quoted text spans lines that are rows of their own; "
                "close its double quote, or write a double quote within a text twice"
            )


def _holds_rows(field: str, delimiter: str) -> bool:
    """Whether a line of a text, after the first, begins with a name of a clip and a delimiter."""
    for text in field.splitlines()[1:]:
        name, found, _ = text.partition(delimiter)
        if found and split_name(name.strip().strip('"'))[1] in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            return True
    return False


def _csv_problem(error: csv.Error, lines_after: int) -> str:
    """What is wrong with a row that began `lines_after` lines before the error."""
    if "unexpected end of data" in str(error):
        after = f"the file ends {lines_after} lines later"
        return f"a double quote is opened here and never closed ({after})"
    if "field larger than" in str(error):
        return (
            f"a text has more than {MAX_TEXT_BYTES} characters; perhaps a double quote is opened "
            "here and never closed"
        )
    if "expected after" in str(error):
        within = f" (found {lines_after} lines later)" if lines_after > 0 else ""
        return (
            f"a closing double quote is followed by text{within}; write a double quote within a "
            "text twice"
        )
    return f"not a CSV that can be read: {error}"


# ------------------------------------------------------------------------------------------- clips


def _clips_of(path: Path, line: int, row: TableRow, columns: ColumnsConfig) -> Iterator[SourceClip]:
    """The clips of one row: one, or one for each span if it has a list of them."""
    place = f"{path}, line {line}"
    _check_columns_of_row(place, row, columns)
    file = row[columns.file]
    if not isinstance(file, str) or not file.strip():
        detail = f"line {line}: {describe(file)} is not the name of a file"
        failure = DecodeFailure("no_file_name", detail)
        yield _failed(f"{path.name}:{line}", VideoFile(path.parent), line, failure)
        return
    video = VideoFile(path.parent / file)
    times = _time_stamps(place, row, columns)
    try:
        captions = captions_of(row[columns.caption])
    except TextError as error:
        detail = f"line {line}: {error.failure.detail}"
        yield _failed(file, video, line, DecodeFailure(error.failure.reason, detail))
        return
    if times is None:
        start_s = _seconds(place, columns.start_s, row.get(columns.start_s), default=0.0)
        end_s = _seconds(place, columns.end_s, row.get(columns.end_s), default=math.inf)
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
            f"{place}: {columns.timestamp} has {len(times)} spans, "
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


def _check_columns_of_row(place: str, row: TableRow, columns: ColumnsConfig) -> None:
    """Raise ConfigError if a row has no file or no caption."""
    for key, column in (("file", columns.file), ("caption", columns.caption)):
        if column not in row:
            names = ", ".join(map(repr, list(row)[:MAX_NAMES]))
            raise ConfigError(
                f"{place}: no column {column!r}, there are {names}; name it with columns.{key}=..."
            )


def _failed(name: str, video: VideoFile, line: int, failure: DecodeFailure) -> SourceClip:
    """A row that is rejected."""
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
    place: str, row: TableRow, columns: ColumnsConfig
) -> list[tuple[float, float]] | None:
    """(start, end) in s of each span of a row that has a list of them, as in Panda-70M; else None.

    Raises ConfigError that names the `place` of the row.
    """
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
            raise ConfigError(f"{place}: {columns.timestamp} must be a list of [start, end]")
        start_s = _seconds(place, columns.timestamp, pair[0], default=0.0)
        end_s = _seconds(place, columns.timestamp, pair[1], default=math.inf)
        times.append((start_s, end_s))
    return times


def _seconds(place: str, column: str, value: Any, *, default: float) -> float:
    """The seconds that a value stands for: a number or [[hours:]minutes:]seconds.

    None and "" stand for the default. Raises ConfigError that names the `place` of the row.
    """
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
        raise ConfigError(f"{place}: {column} = {value!r} is not a time in seconds"[:MAX_MESSAGE])
    return seconds
