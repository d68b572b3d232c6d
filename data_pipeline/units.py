"""Units of precompute on disk: which (column, shard) exist, which are left, and how they become the manifest.

    <data>/<column>/column.json     `ColumnCard`: what the column is made by; written before its first unit
    <data>/<column>/000000.tar      a finished unit: tar and sidecar, committed by `ShardWriter`

Nothing here needs a server: a unit is done when its sidecar says that it was made by the card's encoder from
the raw shard as it is now. Two tasks that make the same unit write the same bytes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.base import Config, ConfigError
from configs.files import write_text
from data_pipeline.schema import FORMAT_VERSION, Column, Manifest, ShardEntry, Sidecar, fingerprint
from data_pipeline.shards import (
    ShardError,
    count_rejects,
    read_manifest,
    read_sidecar,
    sidecar_path,
    write_manifest,
)

log = logging.getLogger(__name__)

CARD = "column.json"
ABANDONED_S = 24 * 3600.0  # a temporary of another machine, untouched for so long, belongs to no one


class ColumnCard(Config):
    """What a column is made by. Equal cards give equal columns."""

    encoder: str  # human name
    fingerprint: str  # of `parts`
    parts: dict[str, Any]  # all that decides the content: {"encoders": {name: fingerprint}, "decoder": ..., ...}
    column: dict[str, Any]  # the resolved column config, for people

    @classmethod
    def of(cls, encoder: str, parts: Mapping[str, Any], column: Mapping[str, Any]) -> ColumnCard:
        return cls(encoder=encoder, fingerprint=fingerprint(FORMAT_VERSION, parts), parts=dict(parts), column=dict(column))


@dataclass(frozen=True)
class ColumnStatus:
    """How far a column is, in shards; counts of clips are of what is done."""

    column: str
    encoder: str  # "" before the first unit
    done: int
    left: int
    stale: int  # of those left: made by another encoder, from other raw shards, or damaged
    samples: int
    rejects: int
    bytes: int


class ColumnFolder:
    """The units of one column."""

    def __init__(self, data: Path, name: str) -> None:
        self.name, self.folder = name, data / name

    def card(self) -> ColumnCard | None:
        path = self.folder / CARD
        try:
            return ColumnCard.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValidationError, UnicodeDecodeError) as error:
            raise ShardError(f"{path} does not say what made this column: {error}; delete the folder and run again") from None

    def claim(self, card: ColumnCard, *, redo: bool) -> None:
        """Make the folder this card's. Raises ConfigError where it is another encoder's, unless `redo`."""
        old = self.card()
        if old is not None and old.fingerprint != card.fingerprint and not redo:
            raise ConfigError(
                f"{self.folder} holds column {self.name!r} of {old.encoder} (fingerprint {old.fingerprint}), the config makes it "
                f"with {card.encoder} (fingerprint {card.fingerprint}); they differ in {_differences(old.parts, card.parts)}. "
                f"Set redo=[{self.name}] to replace what is there, or give the new column another name, "
                f"such as {self.name}-new"
            )
        if old != card:
            write_text(self.folder / CARD, card.model_dump_json(indent=1))

    def finished(self, entry: ShardEntry, mark: str) -> Sidecar | None:
        """The sidecar of the unit of raw shard `entry`, if it was made by `mark`, from this very shard, and is whole."""
        sidecar = self.sidecar(entry)
        if sidecar is None or not is_current(sidecar, entry, mark):
            return None
        tar = self.folder / f"{entry.name}.tar"
        return sidecar if tar.is_file() and tar.stat().st_size == sidecar.entry.bytes else None

    def sidecar(self, entry: ShardEntry) -> Sidecar | None:
        """Whatever unit lies there. A damaged sidecar commits nothing."""
        try:
            return read_sidecar(self.folder / f"{entry.name}.tar")
        except ShardError as error:
            log.warning("%s; the unit is made again", error)
            return None

    def withdraw(self, entry: ShardEntry) -> None:
        """Take back the unit that is there, before another takes its place."""
        sidecar_path(self.folder / f"{entry.name}.tar").unlink(missing_ok=True)

    def remove_leftovers(self) -> int:
        """Delete temporaries of processes that are gone; returns how many."""
        if not self.folder.is_dir():
            return 0
        removed = 0
        for path in self.folder.glob(".*.tmp"):
            if _is_abandoned(path):
                path.unlink(missing_ok=True)
                removed += 1
        return removed


def is_current(sidecar: Sidecar, raw: ShardEntry, mark: str) -> bool:
    return sidecar.fingerprint == mark and sidecar.raw_sha256 == raw.sha256


def share(shards: Sequence[ShardEntry], task: tuple[int, int]) -> list[int]:
    """Indices of the shards that task (number, of) works on: by hash, so that neighbours spread."""
    number, of = task
    if not 0 <= number < of:
        raise ConfigError(f"task {number}/{of}: the number must lie between 0 and {of - 1}")
    return [i for i, entry in enumerate(shards) if int(entry.sha256[:16], 16) % of == number]


def status(data: Path, manifest: Manifest, columns: Sequence[str]) -> list[ColumnStatus]:
    """One row per column, from the sidecars alone."""
    rows = []
    for name in columns:
        folder = ColumnFolder(data, name)
        card = folder.card()
        done = [s for entry in manifest.shards if card and (s := folder.finished(entry, card.fingerprint))]
        present = sum(sidecar_path(folder.folder / f"{entry.name}.tar").exists() for entry in manifest.shards)
        rows.append(ColumnStatus(
            column=name, encoder=card.encoder if card else "", done=len(done), left=len(manifest.shards) - len(done),
            stale=present - len(done), samples=sum(s.entry.samples for s in done), rejects=sum(len(s.rejects) for s in done),
            bytes=sum(s.entry.bytes for s in done),
        ))
    return rows


def finalize(data: Path, columns: Sequence[str]) -> Manifest:
    """Enter finished columns into the manifest. Raises ShardError listing the shards that are missing."""
    manifest = read_manifest(data)
    merged, rejects, missing = dict(manifest.columns), [r for r in manifest.rejects if r.stage not in columns], []
    for name in columns:
        folder = ColumnFolder(data, name)
        card = folder.card()
        sidecars = [folder.finished(entry, card.fingerprint) if card else None for entry in manifest.shards]
        left = [entry.name for entry, sidecar in zip(manifest.shards, sidecars, strict=True) if sidecar is None]
        if left:
            missing.append(f"column {name!r} lacks {len(left)} of {len(manifest.shards)} shards: {', '.join(left[:20])}"
                           f"{', ...' if len(left) > 20 else ''}")
            continue
        folder.remove_leftovers()
        merged[name] = _merge(manifest, card, sidecars)
        rejects += [reject for sidecar in sidecars for reject in sidecar.rejects]
    if missing:
        raise ShardError("; ".join(missing) + ". Run `landiff precompute` (the tasks that made these shards), then finalize again")
    manifest = manifest.model_copy(update={"columns": merged, "rejects": rejects, "reject_counts": count_rejects(rejects)})
    write_manifest(data, manifest)
    return manifest


def _merge(manifest: Manifest, card: ColumnCard, sidecars: Sequence[Sidecar]) -> Column:
    shapes = [tuple(s.shape) for s in sidecars if s.entry.samples]
    return Column(
        dtype=next((s.dtype for s in sidecars if s.entry.samples), ""),
        shape=list(common_shape(shapes)), encoder=card.encoder, fingerprint=card.fingerprint,
        config={**card.parts, "column": card.column}, raw_fingerprint=manifest.fingerprint, shards=[s.entry for s in sidecars],
    )


def common_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The sizes that all shapes share; 0 where they differ."""
    assert len({len(shape) for shape in shapes}) <= 1, shapes
    return tuple(sizes[0] if len(set(sizes)) == 1 else 0 for sizes in zip(*shapes, strict=True))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    flat_old, flat_new = _flatten(old), _flatten(new)
    names = [k for k in sorted(flat_old.keys() | flat_new.keys()) if flat_old.get(k) != flat_new.get(k)]
    return ", ".join(f"{k} ({flat_old.get(k)} there, {flat_new.get(k)} here)" for k in names) or "the format version"


def _flatten(parts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in parts.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_abandoned(path: Path) -> bool:
    """Of a dead process of this machine, or untouched for a day. `.<name>.<machine>.<process>.tmp`, see configs/files.py."""
    front, _, process = path.name.removesuffix(".tmp").rpartition(".")
    if front.endswith(f".{os.uname().nodename}") and process.isdigit():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_S
    except FileNotFoundError:
        return False
