"""Units of precompute on disk: one column of one shard each.

    <data>/<column>/column.json     `ColumnCard`: what the column is computed from; written first
    <data>/<column>/000000.tar      a finished unit: tar and sidecar, committed by `UnitWriter`
    <data>/<column>/000000.json     sidecar of the tar
    <data>/<column>/.000000.failed  `UnitFailure`: why the last task gave up the unit; removed by
                                    the next success
    <data>/<column>/.lock           held during a commit

No server is needed. A unit is finished if its sidecar has the card's fingerprint and the checksum
of the current raw shard. If two tasks compute the same unit, the first result is kept. So tar and
sidecar agree even if an encoder's output differs in the last bit from run to run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field

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
    Reject,
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
SURVEY_THREADS = 8  # read sidecars in parallel: each read takes long on a shared file system
SHARDS_LISTED = 20  # missing shards that an error message names


class ColumnCard(Config):
    """What a column is computed from. Equal cards give equal columns."""

    encoder: str = Field(description="Name of the encoder, for display.")
    fingerprint: str = Field(description="Fingerprint of `parts` and the format version.")
    parts: dict[str, Any] = Field(
        description="Everything that determines the content, for example encoder fingerprints."
    )
    column: dict[str, Any] = Field(description="Resolved config of the column, for display.")

    @classmethod
    def of(cls, encoder: str, parts: Mapping[str, Any], column: Mapping[str, Any]) -> ColumnCard:
        """Create a card and compute its fingerprint from `parts`."""
        return cls(
            encoder=encoder,
            fingerprint=content_fingerprint(FORMAT_VERSION, parts),
            parts=dict(parts),
            column=dict(column),
        )


class UnitFailure(Config):
    """Why a task gave up a unit."""

    error: str = Field(description="Type and message of the error.")
    machine: str = Field(description="Host name of the machine that the task ran on.")
    process: int = Field(description="Process ID of the task.")
    time: float = Field(description="Time of the failure in seconds since 1970.")


class UnitWriter(ShardWriter):
    """A `ShardWriter` that keeps the unit of a duplicate task if that one finished first."""

    def __init__(self, folder: ColumnFolder, entry: ShardEntry, fingerprint: str) -> None:
        super().__init__(
            folder.folder, entry.name, fingerprint=fingerprint, raw_sha256=entry.sha256
        )
        self._unit = folder
        self._entry = entry

    def commit(self) -> None:
        """Commit the unit, or discard it if a duplicate task has finished it."""
        with locked(self._unit.folder):
            finished = self._unit.finished(self._entry, self.fingerprint)
            if finished is None:
                # an old sidecar must never lie beside a new tar
                self._unit.withdraw(self._entry)
                super().commit()
            else:
                self.discard()
                self.sidecar = finished
        self._unit.clear_failure(self._entry)

    def abort(self) -> None:
        """Close and delete the temporary tar without a commit."""
        try:
            self._file.close()
        finally:
            self.discard()


class ColumnFolder:
    """The units of one column."""

    def __init__(self, data: Path, name: str) -> None:
        self.name = name
        self.folder = data / name

    def card(self) -> ColumnCard | None:
        """Read the column's card. None if there is none yet, ShardError if it is damaged."""
        path = self.folder / CARD
        try:
            return read_json_as(ColumnCard, path)
        except FileNotFoundError:
            return None
        except ConfigError as error:
            raise ShardError(
                f"{path} does not describe a column: {error}; "
                "delete the folder and run `landiff precompute` again"
            ) from None

    def claim(self, card: ColumnCard, *, redo: bool) -> None:
        """Write the card. Raises ConfigError if the folder has another card, unless `redo`."""
        old = self.card()
        if old is not None and old.fingerprint != card.fingerprint and not redo:
            raise ConfigError(
                f"{self.folder} holds column {self.name!r} of {old.encoder} "
                f"(fingerprint {old.fingerprint}), but the config computes it with {card.encoder} "
                f"(fingerprint {card.fingerprint}); they differ in "
                f"{_differences(old.parts, card.parts)}. Set redo=[{self.name}] to replace the "
                f"column, or give the new one another name, such as {self.name}-new"
            )
        if old != card:
            write_text(self.folder / CARD, card.model_dump_json(indent=1))

    def finished(
        self, entry: ShardEntry, fingerprint: str, *, index: bool = True
    ) -> Sidecar | None:
        """Return the sidecar of a raw shard's unit, or None if the unit is not finished.

        A finished unit has the given fingerprint, belongs to this very raw shard and is complete.
        Without `index`, the places of samples are not read.
        """
        sidecar = self.sidecar(entry, index=index)
        if sidecar is None or not is_current(sidecar, entry, fingerprint):
            return None
        tar = self.folder / f"{entry.name}.tar"
        if tar.is_file() and tar.stat().st_size == sidecar.entry.bytes:
            return sidecar
        return None

    def survey(self, shards: Sequence[ShardEntry], fingerprint: str) -> list[Sidecar | None]:
        """Call `finished` for many shards in parallel, without the places of their samples."""
        with ThreadPoolExecutor(SURVEY_THREADS, thread_name_prefix="survey") as pool:
            calls = pool.map(lambda entry: self.finished(entry, fingerprint, index=False), shards)
            return list(calls)

    def sidecar(self, entry: ShardEntry, *, index: bool = True) -> Sidecar | None:
        """Read the sidecar of a raw shard's unit, current or not. None if missing or damaged."""
        try:
            return read_sidecar(self.folder / f"{entry.name}.tar", index=index)
        except ShardError as error:
            log.warning("%s; the unit is computed again", error)
            return None

    def withdraw(self, entry: ShardEntry) -> None:
        """Delete the sidecar of a unit, before its tar is replaced."""
        sidecar_path(self.folder / f"{entry.name}.tar").unlink(missing_ok=True)

    def fail(self, entry: ShardEntry, error: BaseException, fingerprint: str) -> None:
        """Record why a unit was given up, unless a duplicate task has finished it."""
        notes = getattr(error, "__notes__", [])  # such as the clips of the batch
        failure = UnitFailure(
            error="; ".join([f"{type(error).__name__}: {error}", *notes]),
            machine=os.uname().nodename,
            process=os.getpid(),
            time=time.time(),
        )
        with locked(self.folder):  # a duplicate clears the record after its commit
            if self.finished(entry, fingerprint, index=False) is None:
                write_text(self._failure_path(entry.name), failure.model_dump_json())

    def clear_failure(self, entry: ShardEntry) -> None:
        """Delete the failure record of a unit."""
        self._failure_path(entry.name).unlink(missing_ok=True)

    def failure(self, name: str) -> UnitFailure | None:
        """Read the failure record of a unit, None if there is none."""
        try:
            return read_json_as(UnitFailure, self._failure_path(name), any_text=True)
        except (FileNotFoundError, ConfigError):
            return None

    def in_work(self) -> tuple[set[str], set[str]]:
        """Names of the units with a temporary tar: of running processes, of dead ones."""
        running: set[str] = set()
        dead: set[str] = set()
        for path in self.folder.glob(".*.tar.*.tmp"):
            name = path.name[1:].split(".tar.", 1)[0]
            if is_abandoned(path):
                dead.add(name)
            else:
                running.add(name)
        return running, dead - running

    def _failure_path(self, name: str) -> Path:
        """Path of a unit's failure record."""
        return self.folder / f".{name}.failed"

    def remove_leftovers(self) -> int:
        """Delete temporary files and locks of dead processes. Returns the number of files."""
        ownership.remove_abandoned_locks(self.folder)
        return remove_abandoned(self.folder)


def is_current(sidecar: Sidecar, raw: ShardEntry, fingerprint: str) -> bool:
    """Whether a unit has this fingerprint and was computed from this raw shard."""
    return sidecar.fingerprint == fingerprint and sidecar.raw_sha256 == raw.sha256


def shards_of_task(shards: Sequence[ShardEntry], task: tuple[int, int]) -> list[int]:
    """Indices of the shards that task (number, number of tasks) computes."""
    number, tasks = task
    if not 0 <= number < tasks:
        raise ConfigError(f"task {number}/{tasks}: the number must lie between 0 and {tasks - 1}")
    return [i for i, entry in enumerate(shards) if task_of_shard(entry, tasks) == number]


def task_of_shard(entry: ShardEntry, tasks: int) -> int:
    """Number of the task that computes a shard. It follows from the shard's hash."""
    return int(entry.sha256[:16], 16) % tasks


def finalize_columns(data: Path, columns: Sequence[str]) -> Manifest:
    """Enter finished columns into the manifest. Raises ShardError listing missing shards.

    Several processes may finalize at once: each adds its columns to the current manifest.
    """
    manifest = read_manifest(data)
    entered: dict[str, Column] = {}
    rejects: list[Reject] = []
    missing: list[str] = []
    for name in columns:
        folder = ColumnFolder(data, name)
        card = folder.card()
        found: list[Sidecar | None] = [None] * len(manifest.shards)
        if card is not None:
            found = folder.survey(manifest.shards, card.fingerprint)
        sidecars = [sidecar for sidecar in found if sidecar is not None]
        if card is None or len(sidecars) < len(found):
            missing.append(_missing_shards(name, manifest, found))
            continue
        require_codes(name, sidecars)
        folder.remove_leftovers()
        entered[name] = _merge(manifest, card, sidecars)
        for sidecar in sidecars:
            rejects += sidecar.rejects
    if missing:
        raise ShardError(
            f"{'; '.join(missing)}. Run `landiff precompute` again, then finalize; "
            "`landiff precompute retry --tasks N` lists the tasks of a job array that have "
            "shards left"
        )
    with locked(data):
        now = read_manifest(data)
        if now.fingerprint != manifest.fingerprint:
            raise ShardError(
                f"the raw shards of {data} changed while their columns were finalized; "
                "run `landiff precompute` again"
            )
        rejects = [reject for reject in now.rejects if reject.stage not in columns] + rejects
        update = {
            "columns": {**now.columns, **entered},
            "rejects": rejects,
            "reject_counts": count_rejects(rejects),
        }
        now = now.model_copy(update=update)
        write_manifest(data, now)
        remove_abandoned(data, MANIFEST)
    return now


def _missing_shards(name: str, manifest: Manifest, found: Sequence[Sidecar | None]) -> str:
    """Name the shards of a column that have no sidecar."""
    pairs = zip(manifest.shards, found, strict=True)
    left = [entry.name for entry, sidecar in pairs if sidecar is None]
    names = ", ".join(left[:SHARDS_LISTED])
    if len(left) > SHARDS_LISTED:
        names += ", ..."
    return f"column {name!r} lacks {len(left)} of {len(manifest.shards)} shards: {names}"


def _merge(manifest: Manifest, card: ColumnCard, sidecars: Sequence[Sidecar]) -> Column:
    """Build the manifest entry of a column from the sidecars of all its units."""
    filled = [sidecar for sidecar in sidecars if sidecar.entry.samples]
    shapes = [tuple(sidecar.shape) for sidecar in filled]
    return Column(
        dtype=filled[0].dtype if filled else "",
        shape=list(common_shape(shapes)),
        encoder=card.encoder,
        fingerprint=card.fingerprint,
        config={**card.parts, "column": card.column},
        raw_fingerprint=manifest.fingerprint,
        shards=[sidecar.entry for sidecar in sidecars],
        truncated=sum(sidecar.truncated for sidecar in sidecars),
    )


def single_code(sidecars: Sequence[Sidecar]) -> str:
    """Describe a tokens column whose tokens are all one code. Returns "" for any other."""
    codes: set[int] = set()
    for sidecar in sidecars:
        if sidecar.value_range is not None:
            codes.update(sidecar.value_range)
    clips = sum(sidecar.entry.samples for sidecar in sidecars)
    if len(codes) != 1 or clips < 2:
        return ""
    return f"all tokens of {clips} clips are code {codes.pop()}: the codebook has collapsed"


def require_codes(name: str, sidecars: Sequence[Sidecar]) -> None:
    """Raise ShardError if all tokens of the tokens column `name` are one code."""
    problem = single_code(sidecars)
    if problem:
        raise ShardError(
            f"column {name!r}: {problem}. Train the tokenizer again, then run with redo=[{name}]"
        )


def common_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Sizes that all shapes have in common, 0 where they differ."""
    assert len({len(shape) for shape in shapes}) <= 1, shapes
    common: list[int] = []
    for sizes in zip(*shapes, strict=True):
        common.append(sizes[0] if len(set(sizes)) == 1 else 0)
    return tuple(common)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """List the dotted names whose values differ between two cards' parts."""
    flat_old = _flatten(old)
    flat_new = _flatten(new)
    lines: list[str] = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        if flat_old.get(key) != flat_new.get(key):
            lines.append(f"{key} ({flat_old.get(key)} stored, {flat_new.get(key)} in the config)")
    return ", ".join(lines) or "the format version"


def _flatten(parts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for key, value in parts.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
