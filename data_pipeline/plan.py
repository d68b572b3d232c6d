"""The plan of a shard set: which spans of which videos become which shard. Made before any shard is.

    <data>/plan/looks-<mark>.jsonl    what was seen of some videos (hash, length, shots); one line for each
    <data>/plan/<mark>.jsonl          one line for each shard to be: its spans and what was set aside
    <data>/plan/<mark>.json           where each line lies; commits the plan

The marks are of names, sizes and times of change of the source and of the config, so an unchanged source is
never read twice, and a changed one gets another plan. Any number of processes may plan at once: each starts
with its share of the videos and goes on with what others have not finished; all write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.files import atomic_file, write_text
from data_pipeline.ingest_config import Bucket, ShardsConfig
from data_pipeline.schema import Reject, fingerprint
from data_pipeline.shots import Look, Looker
from data_pipeline.sources import Listing, SourceClip
from data_pipeline.video import Failure, SafeDecoder, VideoFile

PLAN = "plan"
STAGE = "shards"
LOOKS_VERSION = 1  # of what is seen of a video
VIDEOS_PER_FILE = 64  # of looks, on average
# What says nothing about the state of the clip
HARMLESS = frozenset(("empty_caption", "long_caption", "duplicate", "too_short", "too_large"))

Progress = Callable[[int, int, str], None]  # (done, of all, what is being done)
Borrow = Callable[[], Any]  # -> context manager of a SafeDecoder


@dataclass(frozen=True)
class Span:
    """One future sample."""

    key: str
    source: str
    video: VideoFile
    caption: str
    source_sha256: str
    start_s: float
    crop: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class SetAside:
    """A clip that won't be in a shard, and where its bytes are."""

    reject: Reject
    video: VideoFile

    @property
    def is_bad(self) -> bool:
        return self.reject.reason not in HARMLESS


@dataclass
class Unit:
    """One future shard."""

    name: str
    shape: Bucket
    bucket: str  # of the shard's entry: the shape's name, "" where all shards have one shape
    spans: list[Span] = field(default_factory=list)
    aside: list[SetAside] = field(default_factory=list)

    def fingerprint(self, config: ShardsConfig) -> str:
        """Of everything the shard is made from."""
        return fingerprint(config.identity(), [(s.key, s.caption) for s in self.spans],
                           [(a.reject.key, a.reject.reason) for a in self.aside])


@dataclass(frozen=True)
class Line:
    """What the index says of one unit."""

    name: str
    fingerprint: str
    offset: int
    size: int
    spans: int
    aside: int
    bad: int


class Plan:
    """A committed plan. Reading a unit costs as much as the unit is long."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [Line(*line) for line in json.loads(path.read_text(encoding="utf-8"))["units"]]

    def unit(self, line: Line) -> Unit:
        with open(self.path.with_suffix(".jsonl"), "rb") as file:
            return _unit_of(json.loads(os.pread(file.fileno(), line.size, line.offset)))

    def share(self, task: tuple[int, int]) -> list[Line]:
        """The units of task (number, of): in the order of their hashes every of-th, so that shares are even and mixed."""
        number, of = task
        return sorted(self.lines, key=lambda line: hashlib.sha256(line.name.encode()).digest())[number::of]


def load_or_make(config: ShardsConfig, data: Path, listing: Listing, task: tuple[int, int], executor: Executor, borrow: Borrow,
                 progress: Progress | None) -> Plan:
    """The plan of this source and config; its work is shared with the other tasks."""
    stamps = _stamps(listing)
    path = plan_path(config, data, listing, stamps)
    if not path.exists():
        clips = list(listing.clips())
        looks = _look_at_all(config, path.parent, clips, stamps, task, executor, borrow, progress)
        _write(config, path, lay(config, clips, looks))
    return Plan(path)


def load(config: ShardsConfig, data: Path, listing: Listing) -> Plan | None:
    """The plan, where one was made."""
    path = plan_path(config, data, listing, _stamps(listing))
    return Plan(path) if path.exists() else None


def plan_path(config: ShardsConfig, data: Path, listing: Listing, stamps: dict[Path, tuple[int, int]]) -> Path:
    digest = hashlib.sha256(fingerprint(LOOKS_VERSION, config.identity(), config.columns.model_dump()).encode())
    for path, stamp in stamps.items():
        digest.update(json.dumps([os.fspath(path), stamp]).encode())
    for clip in () if listing.is_tars else listing.clips():
        digest.update(json.dumps([clip.name, os.fspath(clip.video.path), clip.caption, clip.start_s, clip.end_s]).encode())
    return data / PLAN / f"{digest.hexdigest()[:16]}.json"


def _stamps(listing: Listing) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every file; -1 for those that aren't there."""
    stamps = {}
    for path in listing.files:
        try:
            found = os.stat(path)
            stamps[path] = (found.st_size, found.st_mtime_ns)
        except (OSError, ValueError):  # a name with a null byte
            stamps[path] = (-1, -1)
    return stamps


# ------------------------------------------------------------------------------------------------ the looks


def _look_at_all(config: ShardsConfig, folder: Path, clips: Sequence[SourceClip], stamps: dict[Path, tuple[int, int]],
                 task: tuple[int, int], executor: Executor, borrow: Borrow, progress: Progress | None) -> dict[VideoFile, Look]:
    videos = list(dict.fromkeys(clip.video for clip in clips if not unusable(config, clip)))
    looker = Looker(config)
    chunks = [(_looks_path(config, folder, chunk, stamps), chunk) for chunk in _chunks(videos)]
    looks: dict[VideoFile, Look] = {}
    number, of = task
    mine, others = chunks[number::of], [chunk for at, chunk in enumerate(chunks) if at % of != number]
    random.Random(number).shuffle(others)  # two that help out seldom choose the same
    for path, chunk in mine + others:
        lines = _read_looks(path)
        if lines is None:
            found = executor.map(lambda video: inspect(looker, video, borrow), chunk)
            lines = []
            for look in found:
                lines.append(look)
                if progress:
                    progress(len(looks) + len(lines), len(videos), "look")
            write_text(path, "".join(json.dumps(look.as_json()) + "\n" for look in lines))
        looks |= zip(chunk, lines, strict=True)
    return looks


def _chunks(videos: Sequence[VideoFile]) -> Iterator[list[VideoFile]]:
    """Cut where the names say so, so that a new video changes one chunk only."""
    chunk: list[VideoFile] = []
    for video in videos:
        chunk.append(video)
        mark = hashlib.sha256(f"{os.fspath(video.path)!r}:{video.offset}".encode()).digest()
        if int.from_bytes(mark[:8], "big") % VIDEOS_PER_FILE == 0 or len(chunk) == 4 * VIDEOS_PER_FILE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _looks_path(config: ShardsConfig, folder: Path, chunk: Sequence[VideoFile], stamps: dict[Path, tuple[int, int]]) -> Path:
    shots = config.shots.model_dump(mode="json") if config.shots else None
    rows = [(repr(os.fspath(video.path)), video.offset, video.size, *stamps.get(video.path, ())) for video in chunk]
    return folder / f"looks-{fingerprint(LOOKS_VERSION, config.max_pixels, shots, config.filters.letterbox, rows)}.jsonl"


def _read_looks(path: Path) -> list[Look] | None:
    try:
        return [Look.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return None


def inspect(looker: Looker, video: VideoFile, borrow: Borrow) -> Look:
    """Hash one video, and look at it."""
    try:
        sha256 = sha256_of(video)
    except ValueError as error:  # a name with a null byte
        return Look(failure=Failure("unreadable_file", str(error)))
    except OSError as error:
        return Look(failure=Failure("unreadable_file", error.strerror or str(error)))
    decoder: SafeDecoder
    with borrow() as decoder:
        return looker.look(decoder, video, sha256)


def sha256_of(video: VideoFile) -> str:
    """Raises OSError, also for what is no regular file: reading a pipe would never end."""
    digest = hashlib.sha256()
    with open(os.open(video.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file")
        file.seek(video.offset)
        left = video.size if video.size >= 0 else math.inf
        while left > 0 and (data := file.read(int(min(left, 1 << 20)))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ the spans


class Layout:
    """Spans and rejects in the order of the source -> units. A shard is full or it is the last of its shape."""

    def __init__(self, config: ShardsConfig) -> None:
        self.config = config
        self.units: list[Unit] = []
        self._open: dict[str, Unit] = {}  # the last of each shape
        self._last = config.shapes[0]  # where rejects go

    def add(self, span: Span, shape: Bucket) -> None:
        self._last = shape
        unit = self._open.get(shape.name)
        if unit is None or len(unit.spans) == self.config.samples_per_shard:
            unit = self._begin(shape)
        unit.spans.append(span)

    def reject(self, clip: SourceClip, reason: str, detail: str = "") -> None:
        unit = self._open.get(self._last.name) or self._begin(self._last)
        unit.aside.append(SetAside(Reject(key=clip.name, stage=STAGE, reason=reason, detail=detail), clip.video))

    def _begin(self, shape: Bucket) -> Unit:
        unit = Unit(f"{len(self.units):06d}", shape, shape.name if self.config.buckets else "")
        self.units.append(unit)
        self._open[shape.name] = unit
        return unit


def lay(config: ShardsConfig, clips: Sequence[SourceClip], looks: dict[VideoFile, Look]) -> list[Unit]:
    """All units of a source."""
    layout, shapes = Layout(config), config.shapes
    first_of: dict[str, str] = {}  # key -> name of the source it came from first
    for clip in clips:
        failure = unusable(config, clip) or looks[clip.video].failure
        if failure:
            layout.reject(clip, failure.reason, failure.detail)
            continue
        look = looks[clip.video]
        spans = list(lay_spans(config, shapes, clip, look))
        if not spans:
            layout.reject(clip, "too_short", _too_short(config, clip, look))
        for start, shape in spans:
            key = span_key(config, look.sha256, start, shape)
            if key in first_of:
                layout.reject(clip, "duplicate", f"span at {start:g} s is that of {first_of[key]}")
                continue
            first_of[key] = clip.name
            layout.add(Span(key, clip.name, clip.video, clip.caption, look.sha256, start, look.crop), shape)
    return layout.units


def unusable(config: ShardsConfig, clip: SourceClip) -> Failure | None:
    """What is wrong with a row before its video is opened."""
    if clip.failure:
        return clip.failure
    if not clip.caption:
        return Failure("empty_caption")
    if len(clip.caption) > config.max_caption:
        return Failure("long_caption", f"{len(clip.caption)} characters, more than max_caption = {config.max_caption}")
    return None


def lay_spans(config: ShardsConfig, shapes: Sequence[Bucket], clip: SourceClip, look: Look) -> Iterator[tuple[float, Bucket]]:
    """(start, shape) of at most `max_spans` spans, one after the other, none of them across a cut."""
    left = config.max_spans
    end_s = min(clip.end_s, look.duration_s)
    for first, last in look.shots or ((0.0, math.inf),):
        begin, until, at = max(clip.start_s, first), min(end_s, last), 0.0
        while left and (shape := best_shape(shapes, config.fps, look.aspect, until - begin - at)):
            yield round(begin + at, 6), shape
            at += shape.num_frames / config.fps
            left -= 1


def best_shape(shapes: Sequence[Bucket], fps: float, aspect: float, length_s: float) -> Bucket | None:
    """The bucket that a clip of this aspect and length goes to: the nearest aspect that is not too long, of those the longest."""
    fitting = [shape for shape in shapes if (shape.num_frames - 1) / fps < length_s - 1e-6]
    if len(shapes) == 1 or not fitting:
        return next(iter(fitting), None)
    return min(fitting, key=lambda shape: (round(abs(math.log(shape.width / shape.height / aspect)), 6), -shape.num_frames, -shape.height, shape.width))


def span_key(config: ShardsConfig, source_sha256: str, start_s: float, shape: Bucket) -> str:
    """The sample's key: equal content and span, equal key."""
    return hashlib.sha1(f"{source_sha256}/{start_s:.6f}/{shape.num_frames}/{config.fps:g}".encode()).hexdigest()


def _too_short(config: ShardsConfig, clip: SourceClip, look: Look) -> str:
    lasts = max(0.0, min(clip.end_s, look.duration_s) - clip.start_s)
    frames = min(shape.num_frames for shape in config.shapes)
    shots = f" in {len(look.shots)} shots" if look.shots else ""
    return f"{lasts:.3f} s{shots}; {frames} frames at {config.fps:g} fps need more than {(frames - 1) / config.fps:.3f} s"


# ---------------------------------------------------------------------------------------------- the documents


def _write(config: ShardsConfig, path: Path, units: Sequence[Unit]) -> None:
    lines: list[tuple[Any, ...]] = []
    with atomic_file(path.with_suffix(".jsonl")) as file:
        for unit in units:
            text = json.dumps(_unit_json(unit)).encode() + b"\n"
            bad = sum(entry.is_bad for entry in unit.aside)
            lines.append((unit.name, unit.fingerprint(config), file.tell(), len(text), len(unit.spans), len(unit.aside), bad))
            file.write(text)
    write_text(path, json.dumps({"units": lines}))


def _unit_json(unit: Unit) -> dict[str, Any]:
    return {
        "name": unit.name, "shape": unit.shape.model_dump(), "bucket": unit.bucket,
        "spans": [(s.key, s.source, _video_json(s.video), s.caption, s.source_sha256, s.start_s, s.crop) for s in unit.spans],
        "aside": [(a.reject.model_dump(), _video_json(a.video)) for a in unit.aside],
    }


def _unit_of(plain: dict[str, Any]) -> Unit:
    return Unit(
        plain["name"], Bucket(**plain["shape"]), plain["bucket"],
        [Span(key, source, _video_of(video), caption, sha256, start, tuple(crop))
         for key, source, video, caption, sha256, start, crop in plain["spans"]],
        [SetAside(Reject(**reject), _video_of(video)) for reject, video in plain["aside"]],
    )


def _video_json(video: VideoFile) -> tuple[str, int, int]:
    return os.fspath(video.path), video.offset, video.size


def _video_of(plain: Sequence[Any]) -> VideoFile:
    return VideoFile(Path(plain[0]), plain[1], plain[2])
