"""Progress of `landiff precompute`, read from the column folders alone.

`encoders` maps a column to the zoo reference (name@fingerprint) that the config resolves to now.
It has only columns that use a zoo entry.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from landiff.configs.durations import duration, size
from landiff.data_pipeline.format.schema import Manifest, Sidecar
from landiff.data_pipeline.format.shards import sidecar_path
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.precompute.units import ColumnCard, ColumnFolder, task_of_shard

RATE_WINDOW_S = 3600.0  # rates are measured over the last hour of work
ERRORS_SHOWN = 3  # errors per column that the table prints


@dataclass(frozen=True)
class ColumnStatus:
    """Progress of a column. Counts are shards unless their name says otherwise."""

    column: str
    encoder: str  # "" before the first unit
    done: int
    left: int  # running and failed ones included
    running: int  # being written; on another machine: written to within the last day
    failed: int  # given up by the last task that tried, or by a task that died
    stale: int  # of those left: from another encoder or other raw shards, or damaged
    changed: str  # how the config differs from what the column was computed with, or ""
    samples: int  # clips in finished units, without rejects
    samples_left: int  # clips of the shards that are left
    rejects: int  # clips
    bytes: int
    rate: float  # clips per second of all tasks over the last hour of work; 0 before two shards
    left_s: float | None  # time left at that rate
    truncated: int  # clips whose text is longer than the encoder accepts
    errors: tuple[str, ...]  # of failed shards, "shard: error", newest first


@dataclass(frozen=True)
class _FoundUnits:
    """The finished units of a column."""

    card: ColumnCard | None  # what the column was computed from
    changed: str  # how the config differs from the card, or ""
    sidecars: dict[str, Sidecar | None]  # by shard; all None if the config differs


def column_status(
    config: PrecomputeConfig, manifest: Manifest, encoders: Mapping[str, str]
) -> list[ColumnStatus]:
    """Return the status of each column of the config."""
    return [_column_status(config, manifest, name, encoders) for name in config.columns]


def _column_status(
    config: PrecomputeConfig, manifest: Manifest, name: str, encoders: Mapping[str, str]
) -> ColumnStatus:
    """Status of one column."""
    folder = ColumnFolder(config.data, name)
    found = _find_units(config, manifest, name, encoders)
    done = {shard: sidecar for shard, sidecar in found.sidecars.items() if sidecar is not None}
    present = sum(sidecar_path(folder.folder / f"{shard}.tar").exists() for shard in found.sidecars)
    running, dead = folder.in_work()
    left = found.sidecars.keys() - done.keys()
    failed, errors = _failures(folder, left - running, dead - done.keys())
    samples_left = sum(entry.samples for entry in manifest.shards if entry.name not in done)
    rate = _rate(folder.folder, done)
    return ColumnStatus(
        column=name,
        encoder=found.card.encoder if found.card else "",
        done=len(done),
        left=len(left),
        running=len(running - done.keys()),
        failed=len(failed),
        stale=present - len(done),
        changed=found.changed,
        samples=sum(sidecar.entry.samples for sidecar in done.values()),
        samples_left=samples_left,
        rejects=sum(len(sidecar.rejects) for sidecar in done.values()),
        bytes=sum(sidecar.entry.bytes for sidecar in done.values()),
        rate=rate,
        left_s=samples_left / rate if rate and samples_left else None,
        truncated=sum(sidecar.truncated for sidecar in done.values()),
        errors=tuple(errors),
    )


def _failures(
    folder: ColumnFolder, waiting: set[str], dead: set[str]
) -> tuple[set[str], list[str]]:
    """Names of the failed shards, and their errors, newest first.

    `waiting` are unfinished shards that no process writes, `dead` those whose task died.
    """
    failures = {}
    for shard in waiting:
        failure = folder.failure(shard)
        if failure is not None:
            failures[shard] = failure
    failed = failures.keys() | dead
    newest_first = sorted(failures.items(), key=lambda item: -item[1].time)
    errors = [f"{shard}: {failure.error} ({failure.machine})" for shard, failure in newest_first]
    errors += [f"{shard}: its task died" for shard in sorted(failed - failures.keys())]
    return failed, errors


def _rate(folder: Path, done: Mapping[str, Sidecar]) -> float:
    """Clips per second between the first and the last commit of the last hour of work."""
    commits: list[tuple[float, int]] = []
    for shard, sidecar in done.items():
        committed = sidecar_path(folder / f"{shard}.tar").stat().st_mtime
        commits.append((committed, sidecar.entry.samples + len(sidecar.rejects)))
    commits.sort()
    recent = [commit for commit in commits if commit[0] >= commits[-1][0] - RATE_WINDOW_S]
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return 0.0
    return sum(samples for _, samples in recent[1:]) / (recent[-1][0] - recent[0][0])


def _find_units(
    config: PrecomputeConfig, manifest: Manifest, name: str, encoders: Mapping[str, str]
) -> _FoundUnits:
    """Find the finished units of a column. None counts as finished if the config has changed."""
    folder = ColumnFolder(config.data, name)
    card = folder.card()
    changed = _changed(card, config, name, encoders)
    sidecars: list[Sidecar | None] = [None] * len(manifest.shards)
    if card is not None and not changed:
        sidecars = folder.survey(manifest.shards, card.fingerprint)
    names = [entry.name for entry in manifest.shards]
    return _FoundUnits(card, changed, dict(zip(names, sidecars, strict=True)))


def _changed(
    card: ColumnCard | None, config: PrecomputeConfig, name: str, encoders: Mapping[str, str]
) -> str:
    """Describe how a column's config differs from its card, "" if it does not."""
    if card is None:
        return ""
    column = config.columns[name]
    now = column.model_dump(mode="json")
    then = dict(card.column)
    for key, field in type(column).model_fields.items():
        # a key that did not exist when the column was computed had its default
        if key not in then and not field.is_required():
            then[key] = field.default
    if name in encoders and then.get("tokenizer") == now.get("tokenizer"):
        # the reference is the same, but the tokenizer may have been trained again
        then["tokenizer"] = card.encoder
        now["tokenizer"] = encoders[name]
    keys = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    return ", ".join(f"{key} was {then.get(key)}, is {now.get(key)}" for key in keys)


def retry_arrays(
    config: PrecomputeConfig, manifest: Manifest, tasks: int, encoders: Mapping[str, str]
) -> dict[str, str]:
    """Return for each column the SLURM array expression of the tasks that have shards left.

    `tasks` is the number of tasks of the array. The expression is "" if no shard is left.
    """
    expressions = {}
    for name in config.columns:
        found = _find_units(config, manifest, name, encoders)
        left = [entry for entry in manifest.shards if found.sidecars[entry.name] is None]
        numbers = {task_of_shard(entry, tasks) for entry in left}
        expressions[name] = array_expression(sorted(numbers))
    return expressions


def array_expression(tasks: Sequence[int]) -> str:
    """Format sorted task numbers for `sbatch --array`: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for task in tasks:
        if parts and task == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], task]
        else:
            parts.append([task])
    return ",".join("-".join(map(str, part)) for part in parts)


def format_table(rows: Sequence[ColumnStatus], now: float | None = None) -> str:
    """Format the status as a table for a terminal."""
    lines = [
        f"{'column':<22}{'done':>7}{'running':>9}{'failed':>8}{'left':>7}{'clips':>10}"
        f"{'rejected':>11}{'size':>9}{'clips/s':>9}{'time left':>11}"
    ]
    for row in rows:
        left = "-" if row.left_s is None else duration(row.left_s)
        lines.append(
            f"{row.column:<22}{row.done:>7}{row.running:>9}{row.failed:>8}{row.left:>7}"
            f"{row.samples:>10}{row.rejects:>11}{size(row.bytes):>9}{row.rate:>9.1f}{left:>11}"
        )
        if row.stale or row.changed:
            line = f"  stale: {row.stale} shards of {row.encoder or 'another encoder'}"
            if row.changed:
                line += (
                    f"; {row.changed}: set redo=[{row.column}] to compute the column again, "
                    "or give the new one another name"
                )
            lines.append(line)
        if row.truncated:
            lines.append(
                f"  truncated: {row.truncated} captions are longer than the encoder accepts"
            )
        lines += [f"  failed: {error}" for error in row.errors[:ERRORS_SHOWN]]
    if any(row.running for row in rows):
        lines.append(f"as of {time.strftime('%H:%M:%S', time.localtime(now))}")
    return "\n".join(lines)
