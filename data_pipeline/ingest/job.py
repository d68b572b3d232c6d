"""Makes training clips from any videos: the job behind `landiff shards`.

1. plan (plan/): hashes and probes every video, divides it into spans of the configured length, and
   rejects what cannot be used. The content of each shard is known before any shard is made.
2. make: each shard is made as a whole. Finished shards are never made again, and an unfinished
   shard leaves nothing behind.
3. finalize: writes the manifest from the sidecars.

Any number of tasks can work on one folder, on any machines, without a server. Each makes its own
part of the shards, which has one owner at a time. Two tasks that make the same shard write the same
bytes: the result depends on the input only, and not on the number of tasks and workers or on how
often they were killed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from landiff.configs import ownership
from landiff.configs.base import ConfigError
from landiff.configs.documents import read_yaml
from landiff.configs.files import fsync_dir, remove_abandoned, temporary_name
from landiff.configs.ownership import OWNER
from landiff.data_pipeline.format.progress import ProgressCallback
from landiff.data_pipeline.format.schema import (
    MANIFEST,
    RAW,
    Column,
    Manifest,
    Reject,
    ShardEntry,
    content_fingerprint,
)
from landiff.data_pipeline.format.shards import (
    ShardError,
    count_rejects,
    read_manifest,
    read_sidecar,
    sidecar_path,
    write_manifest,
)
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.filters import Filters
from landiff.data_pipeline.ingest.plan.planned_shard import STAGE
from landiff.data_pipeline.ingest.plan.rows import (
    iter_chunks,
    read_ignored_members,
    read_source_state,
    rows_path,
)
from landiff.data_pipeline.ingest.plan.shard_plan import PLAN, ShardPlan, make_plan, plan_path
from landiff.data_pipeline.ingest.quarantine import REJECTED
from landiff.data_pipeline.ingest.shard_maker import (
    ShardMaker,
    ShardTaskSummary,
    TooManyRejectedClips,
    add_rejects,
    borrow_decoder,
    check_damaged,
    count_damaged,
    finished_sidecar,
    foreign_shard_error,
    open_decoders,
    tally_rejects,
)
from landiff.data_pipeline.ingest.sources.entries import Tally
from landiff.data_pipeline.ingest.sources.listing import list_source

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
WHERE_CAPTIONS_ARE = (
    "captions are read from a captions.jsonl or captions.csv in the folder, from .txt files beside "
    "the videos, or from the txt, caption or json parts of a tar. Without captions, "
    "missing_captions=file_name or folder_name takes names, and none keeps the clips for `landiff "
    "captions` or for training without text"
)
# Errors of file systems that have no hard links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
NAMES_SHOWN = 20  # of missing shards, in a message

Task = tuple[int, int]  # (number, of)


def make_shards(
    config: ShardsConfig, data: Path, progress: ProgressCallback | None = None
) -> Manifest:
    """Make all shards in `<data>/raw` and write `<data>/manifest.json`.

    Resumes where an earlier call stopped.

    Raises:
        ConfigError: The source is unusable, or `data` was made with another config.
        ShardError: `data` holds shards of another source.
        TooManyRejectedClips: More clips are damaged than the config allows.
        OSError: `data` cannot be written.
    """
    make_task_shards(config, data, (0, 1), progress)
    return finalize_raw_shards(config, data)


def make_task_shards(
    config: ShardsConfig, data: Path, task: Task, progress: ProgressCallback | None = None
) -> ShardTaskSummary:
    """Make the shards of one task. The plan is made by all tasks together.

    Raises the errors of `make_shards`, and OwnedError if another process works on this task.
    """
    number, of = task
    if not 0 <= number < of:
        raise ConfigError(f"task {number}/{of}: the number must lie between 0 and {of - 1}")
    listing = list_source(config)
    filters = Filters(config.filters)
    state = read_source_state(config, listing)
    path = plan_path(data, state)
    with _explain_write_errors(data):
        _claim_folder(config, data / RAW)
        lock = ownership.take(
            data / f".task-{number}-of-{of}{OWNER}", f"task {number}/{of} of the shards in {data}"
        )
        with (
            lock,
            open_decoders(config) as decoders,
            ThreadPoolExecutor(config.job.workers) as pool,
        ):
            _remove_leftovers(data)
            plan = make_plan(
                config,
                path,
                listing,
                task=task,
                executor=pool,
                borrow_decoder=lambda: borrow_decoder(decoders),
                progress=progress,
            )
            _check_rejects_of_plan(config, plan)
            maker = ShardMaker(config, data, plan, filters, decoders, pool)
            summary = maker.make(plan.entries_of(task), progress)
            return replace(summary, ignored=state.ignored + read_ignored_members(path))


def _check_rejects_of_plan(config: ShardsConfig, plan: ShardPlan) -> None:
    """Raise TooManyRejectedClips if the plan rejects more clips than the config allows."""
    damaged = sum(entry.damaged for entry in plan.entries)
    clips = sum(entry.spans + entry.rejects for entry in plan.entries)
    try:
        check_damaged(config, damaged, clips)
    except TooManyRejectedClips:
        # the index holds counts only: read the rejects for the message
        rejected = Tally()
        for entry in plan.entries:
            add_rejects(rejected, [each.reject for each in plan.read_shard(entry).rejects])
        check_damaged(config, damaged, clips, rejected)


# ------------------------------------------------------------------------------------------ status


@dataclass(frozen=True)
class ShardsStatus:
    """Progress of all tasks together. Counts of shards and clips are 0 until the plan is made."""

    videos: int
    probed: int  # of the videos
    shards: int = 0
    finished: int = 0  # of the shards
    clips: int = 0  # in all shards; some may still turn out to be damaged or be filtered
    finished_clips: int = 0  # of the clips, those in finished shards
    rejected: int = 0  # by the plan
    ignored: Tally = field(default_factory=Tally)  # files of the source that no clip uses


def status(config: ShardsConfig, data: Path) -> ShardsStatus | None:
    """Progress of the shards in `data`; None if nothing was done for this source and config."""
    state = read_source_state(config, list_source(config))
    path = plan_path(data, state)
    rows = rows_path(path)
    if not rows.exists():
        return None
    videos = 0
    probed = 0
    for chunk, _ in iter_chunks(config, rows):
        videos += chunk.videos
        if rows.with_name(chunk.probes_file).exists():
            probed += chunk.videos
    ignored = state.ignored + read_ignored_members(path)
    if not path.exists():
        return ShardsStatus(videos, probed, ignored=ignored)
    entries = ShardPlan(path).entries
    finished = []
    for entry in entries:
        if sidecar_path(data / RAW / f"{entry.name}.tar").exists():
            finished.append(entry)
    return ShardsStatus(
        videos,
        probed,
        shards=len(entries),
        finished=len(finished),
        clips=sum(entry.spans for entry in entries),
        finished_clips=sum(entry.spans for entry in finished),
        rejected=sum(entry.rejects for entry in entries),
        ignored=ignored,
    )


# ---------------------------------------------------------------------------------------- finalize


def finalize_raw_shards(config: ShardsConfig, data: Path) -> Manifest:
    """Write the manifest of the finished shards.

    Raises ShardError that lists the shards that are missing or belong to another plan, and
    TooManyRejectedClips.
    """
    state = read_source_state(config, list_source(config))
    path = plan_path(data, state)
    if not path.exists():
        raise ShardError(
            f"nothing is planned in {data} for this source and config; run `landiff shards` first"
            f"{other_shards(config, data)}"
        )
    ignored = state.ignored + read_ignored_members(path)
    shards, rejects = _read_finished(ShardPlan(path), data / RAW)
    samples = sum(shard.samples for shard in shards)
    if not samples:
        raise _no_clips_error(config, rejects, ignored)
    clips = len(rejects) + samples
    check_damaged(config, count_damaged(rejects), clips, tally_rejects(rejects), is_final=True)
    fingerprint = content_fingerprint(config.identity(), [shard.sha256 for shard in shards])
    columns: dict[str, Column] = {}
    if (data / MANIFEST).exists():
        old = read_manifest(data)
        if old.fingerprint == fingerprint:  # the columns belong to these very shards
            columns = old.columns
            rejects += [reject for reject in old.rejects if reject.stage != STAGE]
    manifest = Manifest(
        fingerprint=fingerprint,
        config=config.recorded(),
        shards=shards,
        columns=columns,
        rejects=rejects,
        reject_counts=count_rejects(rejects),
        ignored_counts=dict(sorted(ignored.counts.items())),
        ignored_examples=dict(sorted(ignored.examples.items())),
    )
    with _explain_write_errors(data):
        write_manifest(data, manifest)
        _remove_leftovers(data)
    return manifest


def _read_finished(plan: ShardPlan, raw: Path) -> tuple[list[ShardEntry], list[Reject]]:
    """Entries and rejects of all shards. Raises ShardError if shards are missing or foreign."""
    shards: list[ShardEntry] = []
    rejects: list[Reject] = []
    missing: list[str] = []
    for entry in plan.entries:
        sidecar = finished_sidecar(raw, entry)  # one in memory at a time: its index is large
        if sidecar is None:
            missing.append(entry.name)
        else:
            shards.append(sidecar.entry)
            rejects += sidecar.rejects
    planned = {entry.name for entry in plan.entries}
    for tar in sorted(raw.glob("[0-9]*.tar")):
        if tar.stem not in planned and read_sidecar(tar) is not None:
            raise foreign_shard_error(tar)
    if missing:
        names = ", ".join(missing[:NAMES_SHOWN])
        if len(missing) > NAMES_SHOWN:
            names += ", ..."
        raise ShardError(
            f"{raw} lacks {len(missing)} of {len(planned)} shards: {names}. "
            "Run the tasks of `landiff shards` that make them, then finalize again"
        )
    return shards, rejects


def _no_clips_error(config: ShardsConfig, rejects: Sequence[Reject], ignored: Tally) -> ShardError:
    """The error for a source of which no clip can be used."""
    hint = ""
    if all(reject.reason == "empty_caption" for reject in rejects):
        hint = f"; {WHERE_CAPTIONS_ARE}"
    unused = f"; ignored: {ignored}" if ignored.counts else ""
    return ShardError(
        f"no clip of {config.source!r} could be used: {tally_rejects(rejects)}{hint}{unused}"
    )


# -------------------------------------------------------------------------------------- the folder


def other_shards(config: ShardsConfig, data: Path) -> str:
    """What a folder holds of another config or source, as the end of a message; "" if nothing."""
    raw = data / RAW
    path = raw / CONFIG_FILE
    if not path.exists():
        return ""
    finished = sum(sidecar_path(tar).exists() for tar in raw.glob("[0-9]*.tar"))
    old = read_yaml(path)
    differing = _differences(list(old), old, _as_json(config.recorded()))
    why = "from other videos or captions than the source holds now, or by an earlier version"
    if differing:
        why = f"with another config: {differing}"
    return f". It holds {finished} finished shards that were made {why}"


def _claim_folder(config: ShardsConfig, raw: Path) -> None:
    """Store the config in the folder, or compare it with the stored one.

    Raises ConfigError if the folder was made with another config. If two configs claim it at once,
    one of them succeeds.
    """
    raw.mkdir(parents=True, exist_ok=True)
    path = raw / CONFIG_FILE
    if not path.exists():
        _write_config(config, path)
    # compare plain values: the config of another version may not fit the class of this one
    old = read_yaml(path, advice=f"delete {raw.parent} to start over")
    new = _as_json(config.identity())
    differing = _differences(_compared_keys(config, old, new), old, new)
    if differing:
        raise ConfigError(
            f"{raw} was made with another config: {differing}. Use the old values, or another "
            f"output folder; or delete {raw.parent} to start over"
        )


def _write_config(config: ShardsConfig, path: Path) -> None:
    """Store the config, unless another task stores one at the same time."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(yaml.safe_dump(config.recorded(), sort_keys=False, allow_unicode=True))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, this never replaces a file
        except FileExistsError:
            log.debug("another task has just claimed %s", path.parent)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they are after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(values))


def _differences(keys: Sequence[str], old: dict[str, Any], new: dict[str, Any]) -> str:
    """The keys whose values differ, with both values; "" if none does."""
    differing = []
    for key in keys:
        if new.get(key) != old.get(key):
            differing.append(f"{key} = {new.get(key)!r} (there: {old.get(key)!r})")
    return "; ".join(differing)


def _compared_keys(config: ShardsConfig, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys of the new config, and those that have an effect in the old one only."""
    keys = list(new)
    inactive = _as_json(config.inactive_values())
    for key, value in old.items():
        if key in inactive and key not in new and value != inactive[key]:
            keys.append(key)
    return keys


def _remove_leftovers(data: Path) -> None:
    """Delete temporary files and locks of processes that are gone."""
    for folder in (data, data / RAW, data / PLAN, data / REJECTED):
        ownership.remove_abandoned_locks(folder)
        remove_abandoned(folder)


@contextmanager
def _explain_write_errors(data: Path) -> Iterator[None]:
    """Convert an error of the disk into one whose message says what to do."""
    try:
        yield
    except (BrokenPipeError, InterruptedError):
        raise
    except OSError as error:
        cause = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"cannot write the shards: {cause}; finished shards are kept. "
            "Run the same command again to resume",
            str(error.filename or data),
        ) from error
