"""Any videos in, clean training clips out: the job behind `landiff shards`.

1. plan: every video is hashed and looked at; spans of the wanted length are laid out; what can't be used is
   set aside. Consecutive spans make up a shard, so the plan says what each shard holds before any is made.
2. make: one shard is one unit of work. Finished shards are never redone; an unfinished one leaves nothing.
3. the manifest, from the sidecars.

Equal input gives equal bytes, whatever the number of workers and however often the job was killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import yaml

from configs.base import ConfigError
from configs.files import write_text
from data_pipeline.ingest_config import ShardsConfig
from data_pipeline.motion import motion
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
from data_pipeline.sources import SourceClip, read_source
from data_pipeline.video import Failure, SafeDecoder, VideoFile, Wanted, encode_clip

STAGE = "shards"
CONFIG_FILE = "config.yaml"
BYTES_PER_REQUEST = 256 << 20  # of decoded frames, so that a long video doesn't fill the memory

Progress = Callable[[int, int, str], None]  # (clips done, clips in all, what is being done)


@dataclass(frozen=True)
class Span:
    """One future sample."""

    key: str
    source: SourceClip
    source_sha256: str
    start_s: float


@dataclass
class Unit:
    """One future shard: the spans that go into it, and what was set aside on the way to them."""

    name: str
    spans: list[Span] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    def fingerprint(self, config: ShardsConfig) -> str:
        """Of everything the shard is made from."""
        return fingerprint(config.identity(), [(s.key, s.source.caption) for s in self.spans],
                           [(r.key, r.reason) for r in self.rejects])


@dataclass(frozen=True)
class Inspected:
    """What the plan knows of one video."""

    sha256: str = ""
    duration_s: float = 0.0
    failure: Failure | None = None


def make_shards(config: ShardsConfig, data: Path, progress: Progress | None = None) -> Manifest:
    """Fill `<data>/raw` and write `<data>/manifest.json`; go on where an earlier call stopped.

    Raises ConfigError when the source is unusable or `data` was made with another config, ShardError when
    it holds shards of another source, OSError when it can't be written.
    """
    clips = read_source(config)
    raw = data / RAW
    with _explained(data), _exclusive(raw):
        _check_config(config, raw)
        _remove_stale(raw)
        if not (raw / CONFIG_FILE).exists():
            write_text(raw / CONFIG_FILE, yaml.safe_dump(config.recorded(), sort_keys=False, allow_unicode=True))
        with _decoders(config) as decoders, ThreadPoolExecutor(config.job.workers) as pool:
            units = _plan(config, clips, decoders, pool, progress)
            _check_units(config, units, raw)
            _make(config, units, raw, decoders, pool, progress)
        return _finish(config, units, data)


# ------------------------------------------------------------------------------------------------- the plan


def _plan(config: ShardsConfig, clips: list[SourceClip], decoders: queue.SimpleQueue, pool: ThreadPoolExecutor,
          progress: Progress | None) -> list[Unit]:
    videos = list(dict.fromkeys(clip.video for clip in clips if clip.caption))
    looks = _inspect_all(videos, decoders, pool, progress)
    units: list[Unit] = []
    first_of: dict[str, str] = {}  # key -> name of the source it came from first

    def add(span: Span) -> None:
        if not units or len(units[-1].spans) == config.samples_per_shard:
            units.append(Unit(f"{len(units):06d}"))
        units[-1].spans.append(span)

    def reject(clip: SourceClip, reason: str, detail: str = "") -> None:
        if not units:
            units.append(Unit("000000"))
        units[-1].rejects.append(Reject(key=clip.name, stage=STAGE, reason=reason, detail=detail))

    for clip in clips:
        if not clip.caption:
            reject(clip, "empty_caption")
            continue
        look = looks[clip.video]
        if look.failure:
            reject(clip, look.failure.reason, look.failure.detail)
            continue
        starts = span_starts(config, clip.start_s, min(clip.end_s, look.duration_s))
        if not starts:
            reject(clip, "too_short", _too_short(config, clip, look))
        for start in starts:
            key = span_key(config, look.sha256, start)
            if key in first_of:
                reject(clip, "duplicate", f"span at {start:g} s is that of {first_of[key]}")
            else:
                first_of[key] = clip.name
                add(Span(key, clip, look.sha256, start))
    return units


def span_starts(config: ShardsConfig, start_s: float, end_s: float) -> list[float]:
    """Starts of the spans that fit into [start_s, end_s): one after the other, at most `max_spans`."""
    last, step = (config.num_frames - 1) / config.fps, config.num_frames / config.fps
    starts = (round(start_s + index * step, 6) for index in range(config.max_spans))
    return [start for start in starts if start + last < end_s - 1e-6]


def span_key(config: ShardsConfig, source_sha256: str, start_s: float) -> str:
    """The sample's key: equal content and span, equal key."""
    return hashlib.sha1(f"{source_sha256}/{start_s:.6f}/{config.num_frames}/{config.fps:g}".encode()).hexdigest()


def _too_short(config: ShardsConfig, clip: SourceClip, look: Inspected) -> str:
    lasts = max(0.0, min(clip.end_s, look.duration_s) - clip.start_s)
    return f"{lasts:.3f} s; {config.num_frames} frames at {config.fps:g} fps need more than {(config.num_frames - 1) / config.fps:.3f} s"


def _inspect_all(videos: list[VideoFile], decoders: queue.SimpleQueue, pool: ThreadPoolExecutor,
                 progress: Progress | None) -> dict[VideoFile, Inspected]:
    looks = {}
    for video, look in zip(videos, pool.map(lambda video: _inspect(video, decoders), videos), strict=True):
        looks[video] = look
        if progress:
            progress(len(looks), len(videos), "look")
    return looks


def _inspect(video: VideoFile, decoders: queue.SimpleQueue) -> Inspected:
    try:
        sha256 = _sha256(video)
    except OSError as error:
        return Inspected(failure=Failure("unreadable_file", error.strerror or str(error)))
    with _borrowed(decoders) as decoder:
        info = decoder.probe(video)
    return Inspected(sha256, failure=info) if isinstance(info, Failure) else Inspected(sha256, info.duration_s)


def _sha256(video: VideoFile) -> str:
    digest = hashlib.sha256()
    with open(video.path, "rb") as file:
        file.seek(video.offset)
        left = video.size if video.size >= 0 else math.inf
        while left > 0 and (data := file.read(int(min(left, 1 << 20)))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ the shards


def _make(config: ShardsConfig, units: list[Unit], raw: Path, decoders: queue.SimpleQueue, pool: ThreadPoolExecutor,
          progress: Progress | None) -> None:
    todo = [unit for unit in units if read_sidecar(raw / f"{unit.name}.tar") is None]
    total = sum(len(unit.spans) for unit in units)
    done = total - sum(len(unit.spans) for unit in todo)
    counts: queue.SimpleQueue[int] = queue.SimpleQueue()
    stop = Event()
    running: set[Future] = {pool.submit(_make_shard, config, unit, raw, decoders, counts, stop) for unit in todo}
    try:
        if progress:
            progress(done, total, "clips")
        while running:
            finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            before = done
            while not counts.empty():
                done += counts.get()
            if progress and done > before:
                progress(done, total, "clips")
    finally:
        stop.set()
        for future in running:
            future.cancel()


def _make_shard(config: ShardsConfig, unit: Unit, raw: Path, decoders: queue.SimpleQueue, counts: queue.SimpleQueue,
                stop: Event) -> None:
    with _borrowed(decoders) as decoder, ShardWriter(raw, unit.name, fingerprint=unit.fingerprint(config)) as writer:
        writer.rejects.extend(unit.rejects)
        for span, frames in _frames(config, unit.spans, decoder):
            if stop.is_set():
                raise InterruptedError(f"shard {unit.name} was left unfinished, because another one failed")
            if isinstance(frames, Failure):
                writer.reject(span.key, STAGE, frames.reason, f"{span.source.name} at {span.start_s:g} s: {frames.detail}")
            else:
                writer.add(span.key, _sample(config, span, frames))
            counts.put(1)


def _frames(config: ShardsConfig, spans: list[Span], decoder: SafeDecoder) -> Iterator[tuple[Span, np.ndarray | Failure]]:
    """Every span with its frames, in order; each video is decoded once for all its spans."""
    wanted = Wanted(config.num_frames, config.fps, config.height, config.width)
    at_once = max(1, BYTES_PER_REQUEST // (config.num_frames * config.height * config.width * 3))
    for video, group in groupby(spans, key=lambda span: span.source.video):
        same = list(group)
        for index in range(0, len(same), at_once):
            part = same[index : index + at_once]
            yield from zip(part, decoder.decode(video, [span.start_s for span in part], wanted), strict=True)


def _sample(config: ShardsConfig, span: Span, frames: np.ndarray) -> dict[str, bytes]:
    clip = encode_clip(frames, config.fps, crf=config.encoding.crf, preset=config.encoding.preset)
    moving = motion(frames, config.fps)
    sample = RawSample(
        key=span.key, caption=span.source.caption, source=span.source.name, source_sha256=span.source_sha256,
        start_s=span.start_s, fps=config.fps, num_frames=config.num_frames, height=config.height, width=config.width,
        motion_score=moving.mean, motion_p95=moving.p95, motion_residual=moving.residual, motion_camera=moving.camera,
        cuts=moving.cuts, video_sha256=hashlib.sha256(clip).hexdigest(),
    )
    return {"mp4": clip, "json": sample.model_dump_json().encode()}


# ----------------------------------------------------------------------------------------------- the folder


def _check_config(config: ShardsConfig, raw: Path) -> None:
    path = raw / CONFIG_FILE
    if not path.exists():
        return
    # as plain values: a config of another version may not fit today's class
    old, new = yaml.safe_load(path.read_text(encoding="utf-8")), config.identity()
    differing = [f"{key} = {new[key]!r} (there: {old.get(key)!r})" for key in new if new[key] != old.get(key)]
    if differing:
        raise ConfigError(f"{raw} was made with another config: {'; '.join(differing)}. Use the old values, or another output folder")


def _check_units(config: ShardsConfig, units: list[Unit], raw: Path) -> None:
    """Finished shards must be those of this plan. Raises ShardError naming the first that isn't."""
    planned = {unit.name: unit.fingerprint(config) for unit in units}
    for tar in sorted(raw.glob("*.tar")):
        sidecar = read_sidecar(tar)
        if sidecar is not None and planned.get(tar.stem) != sidecar.fingerprint:
            raise ShardError(f"{tar} was made from other videos or captions than the source holds now; restore them, use another "
                             f"output folder, or delete {tar} and {sidecar_path(tar)} to make the shard again (its columns become stale)")


def _remove_stale(raw: Path) -> None:
    """Temporaries of killed runs. Nobody else writes here: the folder is locked."""
    for path in (*raw.glob(".*.tmp"), *raw.parent.glob(f".{MANIFEST}.*.tmp")):
        path.unlink(missing_ok=True)


def _finish(config: ShardsConfig, units: list[Unit], data: Path) -> Manifest:
    sidecars = [_sidecar(data / RAW / f"{unit.name}.tar") for unit in units]
    rejects = [reject for sidecar in sidecars for reject in sidecar.rejects]
    shards = [sidecar.entry for sidecar in sidecars]
    if not sum(shard.samples for shard in shards):
        raise ShardError(f"no clip of {config.source!r} could be used: {count_rejects(rejects)}")
    mark = fingerprint(config.identity(), [shard.sha256 for shard in shards])
    columns: dict[str, Any] = {}
    if (data / MANIFEST).exists():
        old = read_manifest(data)
        if old.fingerprint == mark:
            columns = old.columns
            rejects += [reject for reject in old.rejects if reject.stage != STAGE]
    manifest = Manifest(fingerprint=mark, config=config.recorded(), shards=shards, columns=columns, rejects=rejects,
                        reject_counts=count_rejects(rejects))
    write_manifest(data, manifest)
    return manifest


def _sidecar(tar: Path) -> Sidecar:
    sidecar = read_sidecar(tar)
    if sidecar is None:
        raise ShardError(f"{tar} has vanished while the job ran")
    return sidecar


@contextmanager
def _exclusive(raw: Path) -> Iterator[None]:
    """Let one process at a time write into `raw`. The lock ends with the process, and leaves no file."""
    raw.mkdir(parents=True, exist_ok=True)
    fd = os.open(raw, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"another `landiff shards` is writing to {raw}; wait for it, or use another output folder") from None
        yield
    finally:
        os.close(fd)


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
