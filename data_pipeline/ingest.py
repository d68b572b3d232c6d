"""Any videos in, clean training clips out: the job behind `landiff shards`.

1. plan (plan.py): every video is hashed and looked at, spans of the wanted length are laid out, what can't be
   used is set aside. So it is known what each shard holds before any is made.
2. make: one shard is one unit of work. Finished shards are never redone; an unfinished one leaves nothing.
3. finalize: the manifest, from the sidecars.

Any number of tasks work on one folder, on any machines, without a server: each makes its share, and two that
make the same shard write the same bytes. Equal input gives equal bytes, whatever the number of tasks and
workers and however often they were killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import yaml

from configs.base import ConfigError
from configs.files import fsync_dir, temporary_name
from data_pipeline.filters import FILTERED, Filters
from data_pipeline.ingest_config import ShardsConfig
from data_pipeline.motion import Motion, motion
from data_pipeline.plan import PLAN, Line, Plan, load, make, path_of
from data_pipeline.plan_rows import chunks, rows_path
from data_pipeline.plan_unit import HARMLESS, STAGE, Span, Unit
from data_pipeline.quarantine import REJECTED, Quarantine
from data_pipeline.schema import MANIFEST, RAW, Manifest, RawSample, Reject, Sidecar, fingerprint
from data_pipeline.shards import (
    ShardError,
    ShardWriter,
    count_rejects,
    read_manifest,
    read_sidecar,
    sidecar_path,
    write_manifest,
)
from data_pipeline.sources import list_source
from data_pipeline.units import ColumnFolder
from data_pipeline.video import Failure, SafeDecoder, Wanted, encode_clip

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
CAPTIONS = ("captions are read from a captions.jsonl or captions.csv in the folder, from .txt files beside the videos, or from the "
            "txt, caption or json parts of a tar")
BYTES_PER_REQUEST = 256 << 20  # of decoded frames, so that a long video doesn't fill the memory
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems that have none
FEW = 20  # clips: of fewer, one bad one says nothing about the rest

Progress = Callable[[int, int, str], None]  # (clips done, clips in all, what is being done)
Task = tuple[int, int]  # (number, of)


class TooManyRejects(ShardError):
    """More clips are damaged than `max_bad_fraction` allows."""


@dataclass(frozen=True)
class Share:
    """What one task has done."""

    made: int  # shards
    there: int  # shards that were there before
    planned: int  # shards of all tasks


def make_shards(config: ShardsConfig, data: Path, progress: Progress | None = None) -> Manifest:
    """Fill `<data>/raw` and write `<data>/manifest.json`; go on where an earlier call stopped.

    Raises ConfigError when the source is unusable or `data` was made with another config, ShardError when
    it holds shards of another source, TooManyRejects, OSError when it can't be written.
    """
    make_share(config, data, (0, 1), progress)
    return finalize(config, data)


def make_share(config: ShardsConfig, data: Path, task: Task, progress: Progress | None = None) -> Share:
    """Make the shards of one task; the plan is made by all of them together. Raises as `make_shards`."""
    if not 0 <= task[0] < task[1]:
        raise ConfigError(f"task {task[0]}/{task[1]}: the number must lie between 0 and {task[1] - 1}")
    listing, filters = list_source(config), Filters(config.filters)
    path = path_of(config, data, listing)
    with _explained(data):
        _claim(config, data / RAW)
        _remove_leftovers(data)
        with _decoders(config) as decoders, ThreadPoolExecutor(config.job.workers) as pool:
            plan = make(config, path, listing, task, pool, lambda: _borrowed(decoders), progress)
            _check_bad(config, sum(line.bad for line in plan.lines), sum(line.spans + line.aside for line in plan.lines))
            maker = Maker(config, data, plan, filters, decoders, pool)
            return maker.make(plan.share(task), progress)


@dataclass(frozen=True)
class Status:
    """How far all tasks together are. Before there is a plan, its counts are 0."""

    videos: int
    looked_at: int  # of them
    shards: int = 0
    finished: int = 0  # of them
    clips: int = 0  # in all shards, but for those that turn out damaged or unwanted when they are made
    in_finished: int = 0  # of them
    set_aside: int = 0  # by the plan


def status(config: ShardsConfig, data: Path) -> Status | None:
    """None before anything was done for this source and config."""
    path = path_of(config, data, list_source(config))
    rows = rows_path(path)
    if not rows.exists():
        return None
    pieces = [(piece.videos, rows.with_name(piece.looks).exists()) for piece, _ in chunks(config, rows)]
    looked = Status(sum(videos for videos, _ in pieces), sum(videos for videos, there in pieces if there))
    if not path.exists():
        return looked
    lines = Plan(path).lines
    finished = [line for line in lines if sidecar_path(data / RAW / f"{line.name}.tar").exists()]
    return replace(looked, shards=len(lines), finished=len(finished), clips=sum(line.spans for line in lines),
                   in_finished=sum(line.spans for line in finished), set_aside=sum(line.aside for line in lines))


def finalize(config: ShardsConfig, data: Path) -> Manifest:
    """Write the manifest of finished shards. Raises ShardError that lists those that are missing or not of this plan."""
    plan = load(config, data, list_source(config))
    if plan is None:
        raise ShardError(f"nothing is planned in {data} for this source and config; run `landiff shards` first")
    raw = data / RAW
    shards, rejects, missing = [], [], []
    for line in plan.lines:
        sidecar = _sidecar(raw, line)  # one at a time: their indices hold every sample
        if sidecar is None:
            missing.append(line.name)
        else:
            shards.append(sidecar.entry)
            rejects += sidecar.rejects
    planned = {line.name for line in plan.lines}
    for tar in sorted(raw.glob("[0-9]*.tar")):
        if tar.stem not in planned and read_sidecar(tar) is not None:
            raise _foreign(tar)
    if missing:
        raise ShardError(f"{raw} lacks {len(missing)} of {len(planned)} shards: {', '.join(missing[:20])}{', ...' if len(missing) > 20 else ''}. "
                         "Run the tasks of `landiff shards` that make them, then finalize again")
    if not sum(shard.samples for shard in shards):
        hint = f"; {CAPTIONS}" if all(reject.reason == "empty_caption" for reject in rejects) else ""
        raise ShardError(f"no clip of {config.source!r} could be used: {_counted(rejects)}{hint}")
    _check_bad(config, count_bad(rejects), len(rejects) + sum(shard.samples for shard in shards), rejects, last=True)
    mark = fingerprint(config.identity(), [shard.sha256 for shard in shards])
    columns: dict[str, Any] = {}
    if (data / MANIFEST).exists():
        old = read_manifest(data)
        if old.fingerprint == mark:
            columns = old.columns
            rejects += [reject for reject in old.rejects if reject.stage != STAGE]
    manifest = Manifest(fingerprint=mark, config=config.recorded(), shards=shards, columns=columns, rejects=rejects,
                        reject_counts=count_rejects(rejects))
    with _explained(data):
        write_manifest(data, manifest)
        _remove_leftovers(data)
    return manifest


def count_bad(rejects: list[Reject]) -> int:
    """How many of them are damaged, not merely unwanted."""
    return sum(reject.reason not in HARMLESS | FILTERED for reject in rejects)


def _counted(rejects: list[Reject]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in count_rejects(rejects).items())


def _check_bad(config: ShardsConfig, bad: int, seen: int, rejects: list[Reject] | None = None, *, last: bool = False) -> None:
    if bad > config.max_bad_fraction * seen and (last or seen >= FEW):
        counts = f" ({_counted(rejects)})" if rejects else ""
        raise TooManyRejects(f"{bad} of {seen} clips of {config.source!r} are damaged{counts}, more than max_bad_fraction = {config.max_bad_fraction:g}. "
                             "Mend the cause, or raise max_bad_fraction, and run again; finished shards stay")


# ------------------------------------------------------------------------------------------------ the shards


@dataclass(frozen=True)
class Maker:
    """Makes units of a plan in several threads."""

    config: ShardsConfig
    data: Path
    plan: Plan
    filters: Filters
    decoders: queue.SimpleQueue
    pool: ThreadPoolExecutor

    def make(self, lines: list[Line], progress: Progress | None) -> Share:
        """Make those of `lines` that aren't there. Raises ShardError, TooManyRejects, OSError."""
        todo, bad = [], 0
        for line in lines:
            sidecar = _sidecar(self.data / RAW, line)
            bad += line.bad if sidecar is None else count_bad(sidecar.rejects)
            if sidecar is None:
                todo.append(line)
        total, seen = sum(line.spans for line in lines), sum(line.spans + line.aside for line in lines)
        done = total - sum(line.spans for line in todo)
        counts: queue.SimpleQueue[bool] = queue.SimpleQueue()  # of every clip: is it bad?
        stop = Event()
        running: set[Future] = {self.pool.submit(self._make_shard, line, counts, stop) for line in todo}
        try:
            if progress and total:
                progress(done, total, "clips")
            while running:
                finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                before = done
                while not counts.empty():
                    bad += counts.get()
                    done += 1
                _check_bad(self.config, bad, seen)
                if progress and done > before:
                    progress(done, total, "clips")
        finally:
            stop.set()
            for future in running:
                future.cancel()
        return Share(made=len(todo), there=len(lines) - len(todo), planned=len(self.plan.lines))

    def _make_shard(self, line: Line, counts: queue.SimpleQueue, stop: Event) -> None:
        unit, raw = self.plan.unit(line), self.data / RAW
        # the quarantine is left, and written, before the shard is committed
        with ShardWriter(raw, unit.name, fingerprint=line.fingerprint, bucket=unit.bucket) as writer, \
                Quarantine(self.data, unit.name, line.fingerprint, self.config.quarantine) as quarantine, \
                _borrowed(self.decoders) as decoder:
            for aside in unit.aside:
                writer.rejects.append(aside.reject)
                if aside.is_bad:
                    quarantine.keep_source(aside.reject, aside.video)
            for span, frames in _frames(self.config, unit, decoder):
                if stop.is_set():
                    raise InterruptedError(f"shard {unit.name} was left unfinished, because another one failed")
                failure = frames if isinstance(frames, Failure) else self._add(writer, quarantine, unit, span, frames)
                if failure:
                    writer.reject(span.key, STAGE, failure.reason, f"{span.source} at {span.start_s:g} s: {failure.detail}")
                    if failure is frames:
                        quarantine.keep_source(writer.rejects[-1], span.video)
                counts.put(failure is not None and failure.reason not in FILTERED | HARMLESS)

    def _add(self, writer: ShardWriter, quarantine: Quarantine, unit: Unit, span: Span, frames: np.ndarray) -> Failure | None:
        """Write one sample, unless a filter refuses it."""
        moving = motion(frames, self.config.fps)
        failure = self.filters.refuse(frames, moving)
        if failure and not self.config.quarantine.filtered:
            return failure
        clip = encode_clip(frames, self.config.fps, crf=self.config.encoding.crf, preset=self.config.encoding.preset)
        if failure:
            quarantine.keep(span.key, failure.reason, "mp4", clip, f"{span.source} at {span.start_s:g} s: {failure.detail}")
        else:
            writer.add(span.key, {"mp4": clip, "json": _meta(self.config, unit, span, moving, clip)})
        return failure


def _frames(config: ShardsConfig, unit: Unit, decoder: SafeDecoder) -> Iterator[tuple[Span, np.ndarray | Failure]]:
    """Every span with its frames, in order; neighbours of one video are decoded in one go."""
    shape = unit.shape
    at_once = max(1, BYTES_PER_REQUEST // (shape.num_frames * shape.height * shape.width * 3))
    for (video, crop), group in groupby(unit.spans, key=lambda span: (span.video, span.crop)):
        same = list(group)
        wanted = Wanted(shape.num_frames, config.fps, shape.height, shape.width, crop)
        for index in range(0, len(same), at_once):
            part = same[index : index + at_once]
            yield from zip(part, decoder.decode(video, [span.start_s for span in part], wanted), strict=True)


def _meta(config: ShardsConfig, unit: Unit, span: Span, moving: Motion, clip: bytes) -> bytes:
    shape = unit.shape
    sample = RawSample(
        key=span.key, caption=span.caption, source=span.source, source_sha256=span.source_sha256,
        start_s=span.start_s, fps=config.fps, num_frames=shape.num_frames, height=shape.height, width=shape.width,
        motion_score=moving.mean, motion_p95=moving.p95, motion_residual=moving.residual, motion_camera=moving.camera,
        cuts=moving.cuts, video_sha256=hashlib.sha256(clip).hexdigest(),
    )
    return sample.model_dump_json().encode()


# ----------------------------------------------------------------------------------------------- the folder


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
    old, new = yaml.safe_load(path.read_text(encoding="utf-8")), json.loads(json.dumps(config.identity()))
    differing = [f"{key} = {new.get(key)!r} (there: {old.get(key)!r})" for key in _compared(config, old, new) if new.get(key) != old.get(key)]
    if differing:
        raise ConfigError(f"{raw} was made with another config: {'; '.join(differing)}. Use the old values, or another output folder; "
                          f"or delete {raw.parent} to begin anew")


def _compared(config: ShardsConfig, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys of the new config, and those of the old one that are not at rest there."""
    rest = {name: json.loads(json.dumps(value)) for name, value in config.resting().items()}
    return [*new, *(key for key in old if key in rest and key not in new and old[key] != rest[key])]


def _remove_leftovers(data: Path) -> None:
    """Temporaries of processes that are gone."""
    for folder in (data, data / RAW, data / PLAN, data / REJECTED):
        ColumnFolder(folder.parent, folder.name).remove_leftovers()


def _sidecar(raw: Path, line: Line) -> Sidecar | None:
    """The sidecar of a finished unit, None of one that is left. Raises ShardError when it is that of another plan."""
    tar = raw / f"{line.name}.tar"
    sidecar = read_sidecar(tar)
    if sidecar is not None and sidecar.fingerprint != line.fingerprint:
        raise _foreign(tar)
    return sidecar


def _foreign(tar: Path) -> ShardError:
    return ShardError(f"{tar} was made from other videos or captions than the source holds now; restore them, use another "
                      f"output folder, or delete {tar} and {sidecar_path(tar)} to make the shard again (its columns become stale)")


@contextmanager
def _explained(data: Path) -> Iterator[None]:
    """Turn a disk's refusal into one message that says what to do."""
    try:
        yield
    except (BrokenPipeError, InterruptedError):
        raise
    except OSError as error:
        raise OSError(error.errno, f"cannot write the shards: {error.strerror}; finished shards are kept. Make room or choose another "
                      "output folder, then run the command again", str(error.filename or data)) from error


@contextmanager
def _decoders(config: ShardsConfig) -> Iterator[queue.SimpleQueue]:
    """One decoder for each worker."""
    idle: queue.SimpleQueue[SafeDecoder] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(config.job.workers):
            idle.put(stack.enter_context(SafeDecoder(
                timeout_s=config.job.timeout_s, memory_limit=config.job.memory_limit_mb << 20, max_pixels=config.max_pixels,
            )))
        yield idle


@contextmanager
def _borrowed(decoders: queue.SimpleQueue) -> Iterator[SafeDecoder]:
    decoder = decoders.get()
    try:
        yield decoder
    finally:
        decoders.put(decoder)
