"""Any videos in, clean training clips out: the job behind `landiff shards`.

1. plan (plan.py): every video is hashed and looked at, spans of the wanted length are laid out, what can't be
   used is set aside. So it is known what each shard holds before any is made.
2. make: one shard is one unit of work. Finished shards are never redone; an unfinished one leaves nothing.
3. finalize: the manifest, from the sidecars.

Any number of tasks work on one folder, on any machines, without a server: each makes its share, which
has one owner at a time, and two that make the same shard write the same bytes. Equal input gives equal
bytes, whatever the number of tasks and workers and however often they were killed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from landiff.configs import ownership
from landiff.configs.base import ConfigError
from landiff.configs.documents import read_yaml
from landiff.configs.files import fsync_dir, temporary_name
from landiff.configs.ownership import OWNER
from landiff.data_pipeline.format.schema import MANIFEST, RAW, Manifest, content_fingerprint
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
    chunks,
    read_ignored_members,
    read_plan_state,
    rows_path,
)
from landiff.data_pipeline.ingest.plan.shard_plan import PLAN, ShardPlan, make
from landiff.data_pipeline.ingest.quarantine import REJECTED
from landiff.data_pipeline.ingest.shard_maker import (
    Maker,
    ProgressCallback,
    TaskPart,
    TooManyRejectedClips,
    borrowed,
    check_bad,
    count_bad,
    decoders,
    foreign,
    sidecar_of,
    tally_rejects,
)
from landiff.data_pipeline.ingest.sources.entries import Tally
from landiff.data_pipeline.ingest.sources.listing import list_source
from landiff.data_pipeline.precompute.units import ColumnFolder

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
CAPTIONS = (
    "captions are read from a captions.jsonl or captions.csv in the folder, from .txt files beside the videos, or from the "
    "txt, caption or json parts of a tar"
)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems that have none

Task = tuple[int, int]  # (number, of)


def make_shards(
    config: ShardsConfig, data: Path, progress: ProgressCallback | None = None
) -> Manifest:
    """Fill `<data>/raw` and write `<data>/manifest.json`; go on where an earlier call stopped.

    Raises ConfigError when the source is unusable or `data` was made with another config, ShardError when
    it holds shards of another source, TooManyRejectedClips, OSError when it can't be written.
    """
    make_share(config, data, (0, 1), progress)
    return finalize(config, data)


def make_share(
    config: ShardsConfig, data: Path, task: Task, progress: ProgressCallback | None = None
) -> TaskPart:
    """Make the shards of one task; the plan is made by all of them together.

    Raises as `make_shards`, and OwnedError where another process works on this task.
    """
    if not 0 <= task[0] < task[1]:
        raise ConfigError(
            f"task {task[0]}/{task[1]}: the number must lie between 0 and {task[1] - 1}"
        )
    listing, filters = list_source(config), Filters(config.filters)
    state = read_plan_state(config, listing)
    path = data / PLAN / f"{state.mark}.json"
    with _explained(data):
        _claim(config, data / RAW)
        lock_file = data / f".task-{task[0]}-of-{task[1]}{OWNER}"
        lock = ownership.take(lock_file, f"task {task[0]}/{task[1]} of the shards in {data}")
        with lock, decoders(config) as idle, ThreadPoolExecutor(config.job.workers) as pool:
            _remove_leftovers(data)
            plan = make(config, path, listing, task, pool, lambda: borrowed(idle), progress)
            _check_planned(config, plan)
            maker = Maker(config, data, plan, filters, idle, pool)
            share = maker.make(plan.share(task), progress)
            return replace(share, ignored=state.ignored + read_ignored_members(path))


def _check_planned(config: ShardsConfig, plan: ShardPlan) -> None:
    """Raise TooManyRejectedClips where the plan rejects more clips than the config allows."""
    bad, seen = (
        sum(line.bad for line in plan.lines),
        sum(line.spans + line.aside for line in plan.lines),
    )
    try:
        check_bad(config, bad, seen)
    except TooManyRejectedClips:
        rejects = (aside.reject for line in plan.lines for aside in plan.unit(line).aside)
        check_bad(config, bad, seen, tally_rejects(rejects))


@dataclass(frozen=True)
class Status:
    """How far all tasks together are. Before there is a plan, its counts are 0."""

    videos: int
    looked_at: int  # of them
    shards: int = 0
    finished: int = 0  # of them
    clips: int = (
        0  # in all shards, but for those that turn out damaged or unwanted when they are made
    )
    in_finished: int = 0  # of them
    set_aside: int = 0  # by the plan
    ignored: Tally = field(default_factory=Tally)  # files of the source that no clip uses


def status(config: ShardsConfig, data: Path) -> Status | None:
    """None before anything was done for this source and config."""
    state = read_plan_state(config, list_source(config))
    path = data / PLAN / f"{state.mark}.json"
    rows = rows_path(path)
    if not rows.exists():
        return None
    pieces = [
        (piece.videos, rows.with_name(piece.looks).exists()) for piece, _ in chunks(config, rows)
    ]
    ignored = state.ignored + read_ignored_members(path)
    looked = Status(
        sum(videos for videos, _ in pieces),
        sum(videos for videos, there in pieces if there),
        ignored=ignored,
    )
    if not path.exists():
        return looked
    lines = ShardPlan(path).lines
    finished = [line for line in lines if sidecar_path(data / RAW / f"{line.name}.tar").exists()]
    return replace(
        looked,
        shards=len(lines),
        finished=len(finished),
        clips=sum(line.spans for line in lines),
        in_finished=sum(line.spans for line in finished),
        set_aside=sum(line.aside for line in lines),
    )


def finalize(config: ShardsConfig, data: Path) -> Manifest:
    """Write the manifest of finished shards. Raises ShardError that lists those that are missing or not of this plan."""
    state = read_plan_state(config, list_source(config))
    path = data / PLAN / f"{state.mark}.json"
    if not path.exists():
        raise ShardError(
            f"nothing is planned in {data} for this source and config; run `landiff shards` first{other_shards(config, data)}"
        )
    plan, raw = ShardPlan(path), data / RAW
    ignored = state.ignored + read_ignored_members(path)
    shards, rejects, missing = [], [], []
    for line in plan.lines:
        sidecar = sidecar_of(raw, line)  # one at a time: their indices hold every sample
        if sidecar is None:
            missing.append(line.name)
        else:
            shards.append(sidecar.entry)
            rejects += sidecar.rejects
    planned = {line.name for line in plan.lines}
    for tar in sorted(raw.glob("[0-9]*.tar")):
        if tar.stem not in planned and read_sidecar(tar) is not None:
            raise foreign(tar)
    if missing:
        raise ShardError(
            f"{raw} lacks {len(missing)} of {len(planned)} shards: {', '.join(missing[:20])}{', ...' if len(missing) > 20 else ''}. "
            "Run the tasks of `landiff shards` that make them, then finalize again"
        )
    if not sum(shard.samples for shard in shards):
        unused = f"; ignored: {ignored}" if ignored.counts else ""
        hint = (
            f"; {CAPTIONS}" if all(reject.reason == "empty_caption" for reject in rejects) else ""
        )
        raise ShardError(
            f"no clip of {config.source!r} could be used: {tally_rejects(rejects)}{hint}{unused}"
        )
    seen = len(rejects) + sum(shard.samples for shard in shards)
    check_bad(config, count_bad(rejects), seen, tally_rejects(rejects), last=True)
    mark = content_fingerprint(config.identity(), [shard.sha256 for shard in shards])
    columns: dict[str, Any] = {}
    if (data / MANIFEST).exists():
        old = read_manifest(data)
        if old.fingerprint == mark:
            columns = old.columns
            rejects += [reject for reject in old.rejects if reject.stage != STAGE]
    manifest = Manifest(
        fingerprint=mark,
        config=config.recorded(),
        shards=shards,
        columns=columns,
        rejects=rejects,
        reject_counts=count_rejects(rejects),
        ignored_counts=dict(sorted(ignored.counts.items())),
        ignored_examples=dict(sorted(ignored.examples.items())),
    )
    with _explained(data):
        write_manifest(data, manifest)
        _remove_leftovers(data)
    return manifest


# ----------------------------------------------------------------------------------------------- the folder


def other_shards(config: ShardsConfig, data: Path) -> str:
    """What a folder holds of another config or source, as the end of a message; "" where it holds nothing."""
    raw = data / RAW
    finished = sum(sidecar_path(tar).exists() for tar in raw.glob("[0-9]*.tar"))
    path = raw / CONFIG_FILE
    if not path.exists():
        return ""
    old, new = read_yaml(path), json.loads(json.dumps(config.recorded()))
    differing = [
        f"{key} = {new.get(key)!r} (there: {old[key]!r})" for key in old if new.get(key) != old[key]
    ]
    why = "from other videos or captions than the source holds now, or by an earlier version"
    if differing:
        why = f"with another config: {'; '.join(differing)}"
    return f". It holds {finished} finished shards that were made {why}"


def _claim(config: ShardsConfig, raw: Path) -> None:
    """Make the folder this config's. Raises ConfigError when it is another's; of two that claim it at once, one wins."""
    raw.mkdir(parents=True, exist_ok=True)
    path = raw / CONFIG_FILE
    if not path.exists():
        temporary = temporary_name(path)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(yaml.safe_dump(config.recorded(), sort_keys=False, allow_unicode=True))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)  # unlike a rename, it never replaces
            except FileExistsError:
                log.debug("%s was claimed by another task just now", raw)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_dir(raw)
    # as plain values: a config of another version may not fit today's class
    old = read_yaml(path, advice=f"delete {raw.parent} to begin anew")
    new = json.loads(json.dumps(config.identity()))
    differing = [
        f"{key} = {new.get(key)!r} (there: {old.get(key)!r})"
        for key in _compared(config, old, new)
        if new.get(key) != old.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{raw} was made with another config: {'; '.join(differing)}. Use the old values, or another output folder; "
            f"or delete {raw.parent} to begin anew"
        )


def _compared(config: ShardsConfig, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys of the new config, and those of the old one that are not at rest there."""
    rest = {name: json.loads(json.dumps(value)) for name, value in config.resting().items()}
    return [*new, *(key for key in old if key in rest and key not in new and old[key] != rest[key])]


def _remove_leftovers(data: Path) -> None:
    """Temporaries of processes that are gone."""
    for folder in (data, data / RAW, data / PLAN, data / REJECTED):
        ColumnFolder(folder.parent, folder.name).remove_leftovers()


@contextmanager
def _explained(data: Path) -> Iterator[None]:
    """Turn a disk's refusal into one message that says what to do."""
    try:
        yield
    except (BrokenPipeError, InterruptedError):
        raise
    except OSError as error:
        cause = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"cannot write the shards: {cause}; finished shards are kept. Run the same command again to resume",
            str(error.filename or data),
        ) from error
