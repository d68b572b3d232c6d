"""Where raw videos come from: lists of `SourceClip`s out of folders, tables and WebDataset tars.

Only names, captions and spans are read here; the videos themselves stay closed.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand

from configs.base import ConfigError
from data_pipeline.ingest_config import ColumnsConfig, ShardsConfig
from data_pipeline.video import Failure, VideoFile

log = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parent / "assets"
VIDEO_SUFFIXES = frozenset((
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv",
    ".ts", ".vob", ".webm", ".wmv", ".y4m",
))
LONGEST_TEXT = 16 << 20  # bytes of a caption that are read
TAR_ERRORS = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError)  # what tarfile raises on damaged ones
CAPTION_PARTS = ("txt", "caption", "json")


@dataclass(frozen=True)
class SourceClip:
    """One row of the input: a video, or a span of one, and its caption ("" where it has none)."""

    name: str  # for people and the shard's JSON: path below the source, or tar:key
    video: VideoFile
    caption: str
    start_s: float = 0.0  # counted from the first frame
    end_s: float = math.inf
    failure: Failure | None = None  # what is known to be wrong with it before it is opened
    more_captions: tuple[str, ...] = ()  # where the row has several


@dataclass(frozen=True)
class Listing:
    """The rows of a source, read anew each time they are asked for: a long source is never in memory."""

    clips: Callable[[], Iterator[SourceClip]]  # in an order that depends on the source alone
    tars: tuple[Path, ...] = ()  # what the rows are read from, where it is tars of clips


def list_source(config: ShardsConfig) -> Listing:
    """Raises ConfigError when the source is missing, holds nothing, or lacks a column."""
    path = ASSETS if config.source == "packaged" else Path(config.source)
    if ".tar" in path.name and not path.is_dir():
        return _tars([Path(tar) for tar in braceexpand.braceexpand(config.source)], config.columns)
    if not path.exists():
        raise ConfigError(f"source = {config.source!r} does not exist; give a folder, a .csv, a .jsonl, a .tar, or \"packaged\"")
    listing = _folder(path, config.columns) if path.is_dir() else Listing(lambda: _table(path, config.columns))
    if not listing.tars and next(listing.clips(), None) is None:
        raise ConfigError(f"source = {config.source!r} holds no videos; known video names end in {' '.join(sorted(VIDEO_SUFFIXES))}")
    return listing


def readable(text: str) -> str:
    """Text that UTF-8 can hold: file names and JSON may have bytes and halves of characters that it can't."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _tars(tars: Sequence[Path], columns: ColumnsConfig) -> Listing:
    for tar in tars:
        if not tar.is_file():
            raise ConfigError(f"source: {str(tar)!r} does not exist")
        if tar.suffix != ".tar":
            raise ConfigError(f"source: {str(tar)!r} is compressed; videos gain nothing by it, unpack it to a plain .tar")
    return Listing(lambda: (clip for tar in tars for clip in _tar(tar, columns)), tuple(tars))


def _folder(folder: Path, columns: ColumnsConfig) -> Listing:
    table = next((folder / name for name in ("captions.jsonl", "captions.csv") if (folder / name).is_file()), None)
    if table:
        return Listing(lambda: _table(table, columns))
    tars = [path for path in _files(folder) if path.suffix == ".tar"]
    if tars:
        return _tars(tars, columns)
    return Listing(lambda: (SourceClip(readable(path.relative_to(folder).as_posix()), VideoFile(path), _text(path.with_suffix(".txt")))
                            for path in _files(folder) if path.suffix.lower() in VIDEO_SUFFIXES))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, in the order of their whole paths, with one folder in memory at a time."""
    try:
        with os.scandir(folder) as entries:
            # a folder's name counts with its slash: so "a-b/x" comes before "a/x", as it does among whole paths
            found = sorted((f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name) for entry in entries)
    except PermissionError as error:
        log.warning("%s can't be read and is left out: %s", folder, error.strerror)
        return
    for name in found:
        if name.endswith("/"):
            yield from _files(folder / name)
        elif (folder / name).is_file():
            yield folder / name


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return file.read(LONGEST_TEXT).decode("utf-8", errors="replace").strip()


def _table(path: Path, columns: ColumnsConfig) -> Iterator[SourceClip]:
    rows = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(path.suffix)
    if rows is None:
        raise ConfigError(f"source = {str(path)!r} is neither a .csv or .jsonl with captions nor a .tar of clips; for single videos give the "
                          "folder that they lie in, with captions in a captions.jsonl, or in a .txt beside each")
    for line, row in _readable(rows(path), path):
        for key, column in (("file", columns.file), ("caption", columns.caption)):
            if column not in row:
                raise ConfigError(f"{path}, line {line}: no column {column!r}, there are {', '.join(map(repr, row))}; "
                                  f"name it with columns.{key}=...")
        name, (caption, *more) = str(row[columns.file]), _captions(row[columns.caption])
        yield SourceClip(
            name=readable(name), video=VideoFile(path.parent / name), caption=caption, more_captions=tuple(more),
            start_s=_seconds(row, columns.start_s, 0.0, path, line), end_s=_seconds(row, columns.end_s, math.inf, path, line),
        )


def _readable(rows: Iterator[tuple[int, Mapping[str, Any]]], path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise ConfigError(f"{path} is not a CSV that can be read: {error}") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(LONGEST_TEXT)
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if name is not None}


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ConfigError(f"{path}, line {line} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {line} holds a {type(row).__name__}; each line is one object")
            yield line, row


def _seconds(row: Mapping[str, Any], column: str, default: float, path: Path, line: int) -> float:
    value = row.get(column)
    if value is None or value == "":
        return default
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if math.isnan(seconds) or seconds < 0:
        raise ConfigError(f"{path}, line {line}: {column} = {value!r} is not a time in seconds")
    return seconds


def _tar(path: Path, columns: ColumnsConfig) -> list[SourceClip]:
    """The samples of a WebDataset tar, cut into keys as webdataset cuts them, with their places in the file.

    Of a tar that is damaged, what lies before the damage; the rest is one clip that failed.
    """
    from webdataset.tariterators import base_plus_ext  # here, because it imports torch

    samples: dict[str, dict[str, tuple[int, int]]] = {}
    clips, damage, length = [], None, path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, part = base_plus_ext(member.name)
                if member.isreg() and key and not member.issparse():
                    samples.setdefault(key, {})[part.lower()] = (member.offset_data, member.size)
    except TAR_ERRORS as error:
        damage = SourceClip(path.name, VideoFile(path), "", failure=Failure("damaged_tar", f"{type(error).__name__}: {error}"[:160]))
    with open(path, "rb") as file:
        for key, parts in samples.items():
            video = next((parts[part] for part in parts if f".{part}" in VIDEO_SUFFIXES), None)
            if video is not None:
                texts = {part: os.pread(file.fileno(), min(parts[part][1], LONGEST_TEXT), parts[part][0]) for part in CAPTION_PARTS if part in parts}
                cut = Failure("truncated", "the tar ends within it") if sum(video) > length else None
                caption, *more = _captions_beside(texts, columns)
                clips.append(SourceClip(readable(f"{path.name}:{key}"), VideoFile(path, *video), caption, failure=cut, more_captions=tuple(more)))
    return [*clips, damage] if damage else clips


def _captions_beside(texts: Mapping[str, bytes], columns: ColumnsConfig) -> list[str]:
    for part in ("txt", "caption"):
        if part in texts:
            return [texts[part].decode("utf-8", errors="replace").strip()]
    try:
        row = json.loads(texts.get("json", b"{}"))
    except (ValueError, RecursionError):
        return [""]
    return _captions(row.get(columns.caption)) if isinstance(row, dict) else [""]


def _captions(value: Any) -> list[str]:
    """One caption or a list of them, as JSON has it -> those that say something, else one that is empty."""
    found = [readable(str(text or "").strip()) for text in (value if isinstance(value, list) else [value])]
    return [text for text in found if text] or [""]
