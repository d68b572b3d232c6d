"""Units of precompute on disk: which (column, shard) exist, which are left, and how they become the manifest.

    <data>/<column>/column.json     `ColumnCard`: what the column is made by; written before its first unit
    <data>/<column>/000000.tar      a finished unit: tar and sidecar, committed by `ShardWriter`

    <data>/<column>/.000000.failed  `UnitFailure`: why the last task that tried gave up; gone with the next success
    <data>/<column>/.lock           held for the moment of a commit (locks.py)

Nothing here needs a server: a unit is done when its sidecar says that it was made by the card's encoder from
the raw shard as it is now. When two tasks make the same unit, the first one's stays, so that tar and sidecar
agree even where an encoder's output differs in the last bit from run to run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from landiff.configs import ownership
from landiff.configs.base import Config, ConfigError
from landiff.configs.files import is_abandoned, remove_abandoned, write_text
from landiff.configs.loader import read_json_as
from landiff.data_pipeline.format.locks import locked
from landiff.data_pipeline.format.schema import (
    FORMAT_VERSION,
    MANIFEST,
    Column,
    Manifest,
    ShardEntry,
    Sidecar,
    content_fingerprint,
)
from landiff.data_pipeline.format.shards import (
    ShardError,
    ShardWriter,
    count_rejects,
    read_manifest,
    read_sidecar,
    sidecar_path,
    write_manifest,
)

log = logging.getLogger(__name__)

CARD = "column.json"
SURVEYORS = 8  # threads that read sidecars: on a file system of many machines each takes its time


class ColumnCard(Config):
    """What a column is made by. Equal cards give equal columns."""

    encoder: str  # human name
    fingerprint: str  # of `parts`
    parts: dict[
        str, Any
    ]  # all that decides the content: {"encoders": {name: fingerprint}, "decoder": ..., ...}
    column: dict[str, Any]  # the resolved column config, for people

    @classmethod
    def of(cls, encoder: str, parts: Mapping[str, Any], column: Mapping[str, Any]) -> ColumnCard:
        return cls(
            encoder=encoder,
            fingerprint=content_fingerprint(FORMAT_VERSION, parts),
            parts=dict(parts),
            column=dict(column),
        )


class UnitFailure(Config):
    """Why a task gave up a unit."""

    error: str
    machine: str
    process: int
    time: float  # seconds since 1970


class UnitWriter(ShardWriter):
    """A `ShardWriter` that leaves a finished unit of a twin alone."""

    def __init__(self, folder: ColumnFolder, entry: ShardEntry, mark: str) -> None:
        super().__init__(folder.folder, entry.name, fingerprint=mark, raw_sha256=entry.sha256)
        self._unit, self._entry = folder, entry

    def commit(self) -> None:
        with locked(self._unit.folder):
            twin = self._unit.finished(self._entry, self.fingerprint)
            if twin is None:
                self._unit.withdraw(self._entry)  # never an old sidecar beside a new tar
                super().commit()
            else:
                self.discard()
                self.sidecar = twin
        self._unit.forgive(self._entry)


class ColumnFolder:
    """The units of one column."""

    def __init__(self, data: Path, name: str) -> None:
        self.name, self.folder = name, data / name

    def card(self) -> ColumnCard | None:
        path = self.folder / CARD
        try:
            return read_json_as(ColumnCard, path)
        except FileNotFoundError:
            return None
        except ConfigError as error:
            raise ShardError(
                f"{path} does not say what made this column: {error}; delete the folder and run again"
            ) from None

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

    def finished(self, entry: ShardEntry, mark: str, *, index: bool = True) -> Sidecar | None:
        """The sidecar of the unit of raw shard `entry`, if it was made by `mark`, from this very shard, and is whole."""
        sidecar = self.sidecar(entry, index=index)
        if sidecar is None or not is_current(sidecar, entry, mark):
            return None
        tar = self.folder / f"{entry.name}.tar"
        return sidecar if tar.is_file() and tar.stat().st_size == sidecar.entry.bytes else None

    def survey(self, shards: Sequence[ShardEntry], mark: str) -> list[Sidecar | None]:
        """`finished` of many, without the places of their samples."""
        with ThreadPoolExecutor(SURVEYORS, thread_name_prefix="survey") as pool:
            return list(pool.map(lambda entry: self.finished(entry, mark, index=False), shards))

    def sidecar(self, entry: ShardEntry, *, index: bool = True) -> Sidecar | None:
        """Whatever unit lies there. A damaged sidecar commits nothing."""
        try:
            return read_sidecar(self.folder / f"{entry.name}.tar", index=index)
        except ShardError as error:
            log.warning("%s; the unit is made again", error)
            return None

    def withdraw(self, entry: ShardEntry) -> None:
        """Take back the unit that is there, before another takes its place."""
        sidecar_path(self.folder / f"{entry.name}.tar").unlink(missing_ok=True)

    def fail(self, entry: ShardEntry, error: BaseException) -> None:
        """Leave word why this unit was given up."""
        failure = UnitFailure(
            error=f"{type(error).__name__}: {error}",
            machine=os.uname().nodename,
            process=os.getpid(),
            time=time.time(),
        )
        write_text(self._failure(entry.name), failure.model_dump_json())

    def forgive(self, entry: ShardEntry) -> None:
        self._failure(entry.name).unlink(missing_ok=True)

    def failure(self, name: str) -> UnitFailure | None:
        """Why the last task gave up unit `name`, if it did."""
        try:
            return read_json_as(UnitFailure, self._failure(name), any_text=True)
        except (FileNotFoundError, ConfigError):
            return None

    def in_work(self) -> tuple[set[str], set[str]]:
        """Names of the units that have a temporary tar: of living processes, and of dead ones."""
        alive, dead = set(), set()
        for path in self.folder.glob(".*.tar.*.tmp"):
            (dead if is_abandoned(path) else alive).add(path.name[1:].split(".tar.", 1)[0])
        return alive, dead - alive

    def _failure(self, name: str) -> Path:
        return self.folder / f".{name}.failed"

    def remove_leftovers(self) -> int:
        """Delete temporaries and locks of processes that are gone; returns how many temporaries."""
        ownership.remove_abandoned_locks(self.folder)
        return remove_abandoned(self.folder)


def is_current(sidecar: Sidecar, raw: ShardEntry, mark: str) -> bool:
    return sidecar.fingerprint == mark and sidecar.raw_sha256 == raw.sha256


def share(shards: Sequence[ShardEntry], task: tuple[int, int]) -> list[int]:
    """Indices of the shards that task (number, of) works on: by hash, so that neighbours spread."""
    number, of = task
    if not 0 <= number < of:
        raise ConfigError(f"task {number}/{of}: the number must lie between 0 and {of - 1}")
    return [i for i, entry in enumerate(shards) if owner(entry, of) == number]


def owner(entry: ShardEntry, of: int) -> int:
    """Which of so many tasks works on a shard."""
    return int(entry.sha256[:16], 16) % of


def finalize_columns(data: Path, columns: Sequence[str]) -> Manifest:
    """Enter finished columns into the manifest. Raises ShardError listing the shards that are missing.

    Several may run at once: each adds its columns to whatever the manifest holds by then.
    """
    manifest = read_manifest(data)
    made: dict[str, Column] = {}
    rejects, missing = [], []
    for name in columns:
        folder = ColumnFolder(data, name)
        card = folder.card()
        sidecars = (
            folder.survey(manifest.shards, card.fingerprint)
            if card
            else [None] * len(manifest.shards)
        )
        left = [
            entry.name
            for entry, sidecar in zip(manifest.shards, sidecars, strict=True)
            if sidecar is None
        ]
        if left:
            missing.append(
                f"column {name!r} lacks {len(left)} of {len(manifest.shards)} shards: {', '.join(left[:20])}"
                f"{', ...' if len(left) > 20 else ''}"
            )
            continue
        require_codes(name, sidecars)
        folder.remove_leftovers()
        made[name] = _merge(manifest, card, sidecars)
        rejects += [reject for sidecar in sidecars for reject in sidecar.rejects]
    if missing:
        raise ShardError(
            "; ".join(missing)
            + ". Run `landiff precompute` once more; `landiff precompute retry --tasks N` names the tasks of an array that have work left. Then finalize again"
        )
    with locked(data):
        now = read_manifest(data)
        if now.fingerprint != manifest.fingerprint:
            raise ShardError(
                f"the raw shards of {data} changed while their columns were being entered; run `landiff precompute` again"
            )
        rejects = [r for r in now.rejects if r.stage not in columns] + rejects
        now = now.model_copy(
            update={
                "columns": {**now.columns, **made},
                "rejects": rejects,
                "reject_counts": count_rejects(rejects),
            }
        )
        write_manifest(data, now)
        remove_abandoned(data, MANIFEST)
    return now


def _merge(manifest: Manifest, card: ColumnCard, sidecars: Sequence[Sidecar]) -> Column:
    shapes = [tuple(s.shape) for s in sidecars if s.entry.samples]
    return Column(
        dtype=next((s.dtype for s in sidecars if s.entry.samples), ""),
        shape=list(common_shape(shapes)),
        encoder=card.encoder,
        fingerprint=card.fingerprint,
        config={**card.parts, "column": card.column},
        raw_fingerprint=manifest.fingerprint,
        shards=[s.entry for s in sidecars],
        truncated=sum(s.truncated for s in sidecars),
    )


def single_code(sidecars: Sequence[Sidecar]) -> str:
    """What is wrong with a tokens column in which one code stands for everything; "" if nothing."""
    ranges = [sidecar.value_range for sidecar in sidecars if sidecar.value_range is not None]
    clips = sum(sidecar.entry.samples for sidecar in sidecars)
    codes = {code for pair in ranges for code in pair}
    if len(codes) != 1 or clips < 2:
        return ""
    return f"all tokens of {clips} clips are code {codes.pop()}: the codebook has collapsed"


def require_codes(name: str, sidecars: Sequence[Sidecar]) -> None:
    """Raise ShardError where one code stands for everything in the tokens column `name`."""
    problem = single_code(sidecars)
    if problem:
        way_out = f"Train the tokenizer anew, then run with redo=[{name}]"
        raise ShardError(f"column {name!r}: {problem}. {way_out}")


def common_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The sizes that all shapes share; 0 where they differ."""
    assert len({len(shape) for shape in shapes}) <= 1, shapes
    return tuple(sizes[0] if len(set(sizes)) == 1 else 0 for sizes in zip(*shapes, strict=True))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    flat_old, flat_new = _flatten(old), _flatten(new)
    names = [
        k for k in sorted(flat_old.keys() | flat_new.keys()) if flat_old.get(k) != flat_new.get(k)
    ]
    return (
        ", ".join(f"{k} ({flat_old.get(k)} there, {flat_new.get(k)} here)" for k in names)
        or "the format version"
    )


def _flatten(parts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in parts.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat
