"""Where raw videos come from: lists of clips out of folders, tables and WebDataset tars.

Only names, captions and spans are read here; the videos themselves stay closed. Everything in a source
is a clip, a clip with a failure, or ignored and counted by kind (docs/sources.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import braceexpand

from landiff.configs.base import ConfigError
from landiff.data_pipeline.ingest.config import ColumnsConfig, ShardsConfig
from landiff.data_pipeline.ingest.sources.content_kinds import describe_file_content
from landiff.data_pipeline.ingest.sources.entries import (
    COMPRESSIONS,
    VIDEO_SUFFIXES,
    IgnoredFiles,
    SourceClip,
    Tally,
    TarFile,
)
from landiff.data_pipeline.ingest.sources.folder import folder_entries
from landiff.data_pipeline.ingest.sources.tables import (
    TABLE_SUFFIXES,
    folder_table_entries,
    table_entries,
    table_in,
)
from landiff.data_pipeline.ingest.sources.tars import tar_entries

ASSETS = Path(__file__).resolve().parents[2] / "assets"
ARCHIVES = frozenset((".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"))
MAX_TARS = 1_000_000  # that one pattern may name

Entry = SourceClip | TarFile | IgnoredFiles


@dataclass(frozen=True)
class Listing:
    """What a source holds, read anew each time, so that a long source is never in memory."""

    entries: Callable[[], Iterator[Entry]]  # in an order that depends on the source alone
    columns: ColumnsConfig = ColumnsConfig()

    def members(self, tar: TarFile) -> Iterator[SourceClip | IgnoredFiles]:
        """What a tar of `entries` holds."""
        return tar_entries(tar.path, self.columns)

    def clips(self) -> Iterator[SourceClip]:
        """All clips, those of tars included."""
        for entry in self.entries():
            found = self.members(entry) if isinstance(entry, TarFile) else [entry]
            for one in found:
                if isinstance(one, SourceClip):
                    yield one


def list_source(config: ShardsConfig) -> Listing:
    """Raises ConfigError when the source is missing, holds nothing, or lacks a column."""
    path = ASSETS / "captions.jsonl" if config.source == "packaged" else Path(config.source)
    columns = config.columns
    if not path.is_dir() and path.suffix.lower() == ".tar":
        return _tars(config.source, columns)
    if not path.is_dir() and (
        path.suffix.lower() in COMPRESSIONS or path.suffix.lower() in ARCHIVES
    ):
        raise ConfigError(
            f"source: {str(path)!r} is compressed; videos gain nothing by it, "
            "unpack it to a folder or a plain .tar"
        )
    if not os.path.lexists(path):
        raise ConfigError(
            f"source = {config.source!r} does not exist; give a folder, a .csv, a .jsonl, a .tar, "
            'or "packaged"'
        )
    if path.is_dir():
        table = _table_in(path)
        listing = _folder(path, table, columns)
    else:
        table = path
        _check_table(path)
        listing = Listing(lambda: table_entries(path, columns), columns)
    _check_not_empty(config, listing, table)
    return listing


def _tars(source: str, columns: ColumnsConfig) -> Listing:
    names = list(islice(braceexpand.braceexpand(source), MAX_TARS + 1))
    if len(names) > MAX_TARS:
        raise ConfigError(
            f"source = {source!r} names more than {MAX_TARS} tars; give the folder that they lie in"
        )
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        first = ", ".join(missing[:3])
        if len(missing) > 3:
            first += ", ..."
        count = f"{len(missing)} of {len(names)} tars do" if len(names) > 1 else "the tar does"
        raise ConfigError(f"source = {source!r}: {count} not exist: {first}")
    return Listing(lambda: (TarFile(Path(name)) for name in names), columns)


def _table_in(folder: Path) -> Path | None:
    try:
        return table_in(folder)
    except OSError as error:
        raise ConfigError(
            f"source = {os.fspath(folder)!r} cannot be read: {error.strerror}"
        ) from None


def _folder(folder: Path, table: Path | None, columns: ColumnsConfig) -> Listing:
    if table is not None:
        return Listing(lambda: folder_table_entries(folder, table, columns), columns)
    return Listing(lambda: folder_entries(folder, columns), columns)


def _check_table(path: Path) -> None:
    """Raise ConfigError unless `path` can be a table of captions."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ConfigError(
            f"source = {str(path)!r} is not a regular file, or a link that leads nowhere"
        )
    if suffix in TABLE_SUFFIXES:
        return
    kind = describe_file_content(path)
    raise ConfigError(
        f"source = {str(path)!r} is neither a .csv, .tsv or .jsonl with captions nor a .tar of clips"
        f"{f'; it is {kind}' if kind else ''}; for single videos give the folder that they lie in, "
        "with captions in a captions.jsonl, or in a .txt beside each"
    )


def _check_not_empty(config: ShardsConfig, listing: Listing, table: Path | None) -> None:
    """Raise ConfigError where a source has no clip, not even one that failed."""
    ignored = Tally()
    for entry in listing.entries():
        if not isinstance(entry, IgnoredFiles):
            return
        ignored.add(entry.kind, entry.name)
    held = f"; it holds {ignored}" if ignored.counts else ""
    if table is not None:
        held = f": {table} has no rows{held}"
    raise ConfigError(
        f"source = {config.source!r} holds no videos{held}; known video names end in "
        f"{' '.join(sorted(VIDEO_SUFFIXES))}"
    )
