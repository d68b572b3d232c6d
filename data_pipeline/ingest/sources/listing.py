"""Lists the clips of a source: a folder, a table or WebDataset tars.

Only names, captions and spans are read; no video is opened. Everything in a source is a clip, a
clip with a failure, or ignored and counted by kind (docs/sources.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import braceexpand

from landiff.configs.base import ConfigError
from landiff.configs.problems import nearest_path
from landiff.data_pipeline.ingest.config import ColumnsConfig, ShardsConfig
from landiff.data_pipeline.ingest.sources.content_kinds import describe_file_content
from landiff.data_pipeline.ingest.sources.entries import (
    COMPRESSIONS,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    IgnoredFiles,
    SourceClip,
    Tally,
    TarFile,
    clip_suffixes,
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
    """The entries of a source. They are read again on each call, and never all in memory."""

    entries: Callable[[], Iterator[Entry]]  # in an order that depends on the source alone
    columns: ColumnsConfig = ColumnsConfig()
    suffixes: Set[str] = VIDEO_SUFFIXES  # of the files that are clips

    def members(self, tar: TarFile) -> Iterator[SourceClip | IgnoredFiles]:
        """The clips and ignored members of a tar."""
        return tar_entries(tar.path, self.columns, self.suffixes)

    def clips(self) -> Iterator[SourceClip]:
        """All clips, including those in tars."""
        for entry in self.entries():
            found = self.members(entry) if isinstance(entry, TarFile) else [entry]
            for one in found:
                if isinstance(one, SourceClip):
                    yield one


def list_source(config: ShardsConfig) -> Listing:
    """The listing of `config.source`, or of all its sources.

    Raises ConfigError if a source is missing, has no clips, or lacks a column.
    """
    listings = [_list_one(config, source) for source in config.sources]
    if len(listings) == 1:
        return listings[0]
    return Listing(
        lambda: chain.from_iterable(listing.entries() for listing in listings),
        config.columns,
        clip_suffixes(config),
    )


def _list_one(config: ShardsConfig, source: str) -> Listing:
    """The listing of one source."""
    columns = config.columns
    suffixes = clip_suffixes(config)
    path = Path(source)
    if source == "packaged":
        path = ASSETS / "captions.jsonl"
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix == ".tar":
        return _tars(source, columns, suffixes)
    if not path.is_dir() and (suffix in COMPRESSIONS or suffix in ARCHIVES):
        raise ConfigError(
            f"source: {str(path)!r} is compressed, which does not make videos smaller; "
            "unpack it to a folder or a plain .tar"
        )
    if not os.path.lexists(path):
        raise ConfigError(
            f"source = {source!r} does not exist{nearest_path(path)}; give a folder, a .csv, a "
            '.jsonl, a .tar, or "packaged"'
        )
    if path.is_dir():
        table = _table_in(path)
        listing = _folder(path, table, columns, suffixes)
    else:
        table = path
        _check_table(path)
        listing = Listing(lambda: table_entries(path, columns), columns, suffixes)
    _check_not_empty(config, source, listing, table)
    return listing


def _tars(source: str, columns: ColumnsConfig, suffixes: Set[str]) -> Listing:
    """The listing of tars that a pattern names. Raises ConfigError if one does not exist."""
    names = list(islice(braceexpand.braceexpand(source), MAX_TARS + 1))
    if len(names) > MAX_TARS:
        raise ConfigError(
            f"source = {source!r} names more than {MAX_TARS} tars; give the folder that holds them"
        )
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        first = ", ".join(missing[:3])
        if len(missing) > 3:
            first += ", ..."
        count = f"{len(missing)} of {len(names)} tars do" if len(names) > 1 else "the tar does"
        raise ConfigError(f"source = {source!r}: {count} not exist: {first}")
    return Listing(lambda: (TarFile(Path(name)) for name in names), columns, suffixes)


def _table_in(folder: Path) -> Path | None:
    """`table_in`. Raises ConfigError also if the folder cannot be read."""
    try:
        return table_in(folder)
    except OSError as error:
        raise ConfigError(
            f"source = {os.fspath(folder)!r} cannot be read: {error.strerror}"
        ) from None


def _folder(
    folder: Path, table: Path | None, columns: ColumnsConfig, suffixes: Set[str]
) -> Listing:
    """The listing of a folder, which `table` describes if it has one."""
    if table is not None:
        return Listing(lambda: folder_table_entries(folder, table, columns), columns, suffixes)
    return Listing(lambda: folder_entries(folder, columns, suffixes), columns, suffixes)


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
    what = f"; it is {kind}" if kind else ""
    raise ConfigError(
        f"source = {str(path)!r} is neither a .csv, .tsv or .jsonl with captions nor a .tar of "
        f"clips{what}; for single videos give the folder that holds them, with captions in a "
        "captions.jsonl, or in a .txt beside each"
    )


def _check_not_empty(
    config: ShardsConfig, source: str, listing: Listing, table: Path | None
) -> None:
    """Raise ConfigError if a source has no clip, not even one with a failure."""
    ignored = Tally()
    for entry in listing.entries():
        if not isinstance(entry, IgnoredFiles):
            return
        ignored.add(entry.kind, entry.name)
    held = f"; it holds {ignored}" if ignored.counts else ""
    if table is not None:
        held = f": {table} has no rows{held}"
    images = ""
    if not config.takes_images and any(suffix in IMAGE_SUFFIXES for suffix in ignored.counts):
        images = "; images are clips of one frame: num_frames=1, or a bucket of one frame"
    raise ConfigError(
        f"source = {source!r} holds no videos{held}{images}; known names end in "
        f"{' '.join(sorted(clip_suffixes(config)))}"
    )
