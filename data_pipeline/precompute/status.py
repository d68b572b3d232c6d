"""How far `landiff precompute` is, read from the folders alone: no encoder, no server, no task need be alive.

`encoders`: {column: zoo reference that the config means now, name@fingerprint}, of columns that take one.
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
from landiff.data_pipeline.precompute.units import ColumnCard, ColumnFolder, owner

RATE_WINDOW_S = 3600.0  # a rate is that of the last hour of work


@dataclass(frozen=True)
class ColumnStatus:
    """How far a column is, in shards; counts of clips are of what is done."""

    column: str
    encoder: str  # "" before the first unit
    done: int
    left: int  # running and failed ones included
    running: int  # a living process writes them (on another machine: one that wrote within a day)
    failed: int  # the last task gave up, or died
    stale: int  # of those left: made by another encoder, from other raw shards, or damaged
    changed: str  # how the config differs from what made the column; "" where it doesn't
    samples: int
    samples_left: int
    rejects: int
    bytes: int
    rate: float  # clips per second of all tasks together, over the last hour of work; 0 before the second shard
    left_s: float | None  # time left at that rate
    truncated: int  # clips whose text is longer than the encoder takes
    errors: tuple[str, ...]  # of what failed, "shard: error", the newest first


def column_status(
    config: PrecomputeConfig, manifest: Manifest, encoders: Mapping[str, str]
) -> list[ColumnStatus]:
    """One row per column of the config."""
    return [_column_status(config, manifest, name, encoders) for name in config.columns]


def _column_status(
    config: PrecomputeConfig, manifest: Manifest, name: str, encoders: Mapping[str, str]
) -> ColumnStatus:
    folder = ColumnFolder(config.data, name)
    card, changed, found = _finished(config, manifest, name, encoders)
    done = {shard: sidecar for shard, sidecar in found.items() if sidecar is not None}
    present = sum(sidecar_path(folder.folder / f"{shard}.tar").exists() for shard in found)
    alive, dead = folder.in_work()
    failures = {
        shard: f for shard in found.keys() - done.keys() - alive if (f := folder.failure(shard))
    }
    failed = failures.keys() | (dead - done.keys())
    errors = [
        f"{shard}: {f.error} ({f.machine})"
        for shard, f in sorted(failures.items(), key=lambda item: -item[1].time)
    ]
    errors += [f"{shard}: its task died" for shard in sorted(failed - failures.keys())]
    samples_left = sum(entry.samples for entry in manifest.shards if entry.name not in done)
    speed = _rate(folder.folder, done)
    return ColumnStatus(
        column=name,
        encoder=card.encoder if card else "",
        done=len(done),
        left=len(found) - len(done),
        running=len(alive - done.keys()),
        failed=len(failed),
        stale=present - len(done),
        changed=changed,
        samples=sum(s.entry.samples for s in done.values()),
        samples_left=samples_left,
        rejects=sum(len(s.rejects) for s in done.values()),
        bytes=sum(s.entry.bytes for s in done.values()),
        rate=speed,
        left_s=samples_left / speed if speed and samples_left else None,
        errors=tuple(errors),
        truncated=sum(s.truncated for s in done.values()),
    )


def _rate(folder: Path, done: dict[str, Sidecar]) -> float:
    """Clips per second between the first and the last commit of the last hour of work."""
    commits = sorted(
        (sidecar_path(folder / f"{shard}.tar").stat().st_mtime, s.entry.samples + len(s.rejects))
        for shard, s in done.items()
    )
    recent = [commit for commit in commits if commit[0] >= commits[-1][0] - RATE_WINDOW_S]
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return 0.0
    return sum(samples for _, samples in recent[1:]) / (recent[-1][0] - recent[0][0])


def _finished(
    config: PrecomputeConfig, manifest: Manifest, name: str, encoders: Mapping[str, str]
) -> tuple[ColumnCard | None, str, dict[str, Sidecar | None]]:
    """What made the column, how the config differs from that, and the sidecar of every shard that is done: none where it differs."""
    folder = ColumnFolder(config.data, name)
    card = folder.card()
    changed = _changed(card, config, name, encoders)
    current = card is not None and not changed
    found = (
        folder.survey(manifest.shards, card.fingerprint)
        if current
        else [None] * len(manifest.shards)
    )
    return (
        card,
        changed,
        {entry.name: sidecar for entry, sidecar in zip(manifest.shards, found, strict=True)},
    )


def _changed(
    card: ColumnCard | None, config: PrecomputeConfig, name: str, encoders: Mapping[str, str]
) -> str:
    if card is None:
        return ""
    column = config.columns[name]
    here = column.model_dump(mode="json")
    was = dict(card.column)
    for key, field in type(column).model_fields.items():
        if (
            key not in was and not field.is_required()
        ):  # the key did not exist when the column was made
            was[key] = field.default
    if name in encoders and was.get("tokenizer") == here.get(
        "tokenizer"
    ):  # of the same name, perhaps trained anew
        was, here = was | {"tokenizer": card.encoder}, here | {"tokenizer": encoders[name]}
    keys = [key for key in sorted(was.keys() | here.keys()) if was.get(key) != here.get(key)]
    return ", ".join(f"{key} was {was.get(key)}, is {here.get(key)}" for key in keys)


def retry_arrays(
    config: PrecomputeConfig, manifest: Manifest, tasks: int, encoders: Mapping[str, str]
) -> dict[str, str]:
    """{column: the SLURM array expression of the tasks, of so many, whose shards are missing}; "" where none is."""
    expressions = {}
    for name in config.columns:
        _, _, found = _finished(config, manifest, name, encoders)
        left = [entry for entry in manifest.shards if found[entry.name] is None]
        expressions[name] = array_expression(sorted({owner(entry, tasks) for entry in left}))
    return expressions


def array_expression(tasks: Sequence[int]) -> str:
    """Sorted numbers as `sbatch --array` takes them: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for task in tasks:
        if parts and task == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], task]
        else:
            parts.append([task])
    return ",".join("-".join(map(str, part)) for part in parts)


def format_table(rows: Sequence[ColumnStatus], now: float | None = None) -> str:
    """For a terminal."""
    lines = [
        f"{'column':<22}{'done':>7}{'running':>9}{'failed':>8}{'left':>7}{'clips':>10}{'set aside':>11}{'size':>9}{'clips/s':>9}{'time left':>11}"
    ]
    for row in rows:
        left = "-" if row.left_s is None else duration(row.left_s)
        lines.append(
            f"{row.column:<22}{row.done:>7}{row.running:>9}{row.failed:>8}{row.left:>7}{row.samples:>10}{row.rejects:>11}"
            f"{size(row.bytes):>9}{row.rate:>9.1f}{left:>11}"
        )
        if row.stale or row.changed:
            why = (
                f"; {row.changed}: set redo=[{row.column}] to make it anew, or give the new one another name"
                if row.changed
                else ""
            )
            lines.append(f"  stale: {row.stale} shards of {row.encoder or 'another encoder'}{why}")
        if row.truncated:
            lines.append(f"  cut: {row.truncated} captions are longer than the encoder takes")
        lines += [f"  failed: {error}" for error in row.errors[:3]]
    if any(row.running for row in rows):
        lines.append(f"as of {time.strftime('%H:%M:%S', time.localtime(now))}")
    return "\n".join(lines)
