"""Divides the spans and rejects of a source, in the order of its rows, into planned shards.

Spans of equal content have equal keys, and the first span of a key is kept. Duplicates are found on
disk: keys are distributed over files, and only one of those files is in memory at a time.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from landiff.data_pipeline.format.schema import Reject
from landiff.data_pipeline.ingest.config import Bucket, ShardsConfig
from landiff.data_pipeline.ingest.plan.planned_shard import STAGE, PlannedShard, RejectedRow, Span
from landiff.data_pipeline.ingest.plan.probes import read_probes
from landiff.data_pipeline.ingest.plan.rows import SourceRow
from landiff.data_pipeline.ingest.shots import VideoProbe
from landiff.data_pipeline.ingest.sources.entries import SourceClip
from landiff.data_pipeline.video.promised import truncated_detail

BYTES_PER_FILE = 32 << 20  # of rows whose keys are in memory together
MAX_FILES = 256


def plan_shards(config: ShardsConfig, rows: Path) -> Iterator[PlannedShard]:
    """All planned shards of a source, each as soon as it is complete: not in order of their names.

    `rows` is the file of rows; the probes of its videos must exist.
    """
    layout = ShardLayout(config)
    num_files = min(MAX_FILES, 1 + rows.stat().st_size // BYTES_PER_FILE)
    with DuplicateFinder(rows.parent, num_files) as finder:
        for row, probe in read_probes(config, rows):
            if row.clip.failure or probe.failure:
                continue
            for start_s, shape in plan_spans(config, row.clip, probe):
                finder.add(span_key(config, probe.sha256, start_s, shape), row.clip.name)
        duplicates = finder.duplicates()
        duplicate = next(duplicates, None)
        number = 0
        for row, probe in read_probes(config, rows):
            failure = row.clip.failure or probe.failure
            if failure:
                layout.reject(row, failure.reason, failure.detail)
                continue
            spans = list(plan_spans(config, row.clip, probe))
            if not spans:
                layout.reject(row, *_too_short(config, row.clip, probe))
            for start_s, shape in spans:
                if duplicate is not None and duplicate[0] == number:
                    detail = _duplicate_detail(row.clip, start_s, first_name=duplicate[1])
                    layout.reject(row, "duplicate", detail)
                    duplicate = next(duplicates, None)
                else:
                    layout.add(_make_span(config, row, probe, start_s, shape), shape)
                number += 1
            yield from layout.take_complete()
    yield from layout.take_rest()


def _make_span(
    config: ShardsConfig, row: SourceRow, probe: VideoProbe, start_s: float, shape: Bucket
) -> Span:
    clip = row.clip
    return Span(
        key=span_key(config, probe.sha256, start_s, shape),
        source=clip.name,
        video=clip.video,
        caption=clip.caption,
        source_sha256=probe.sha256,
        start_s=start_s,
        crop=probe.crop,
        row=row.offset,
        more_captions=clip.more_captions,
        conversions=probe.conversions,
    )


class ShardLayout:
    """Divides spans and rejects into planned shards.

    A shard is full, or it is the last one of its shape.
    """

    def __init__(self, config: ShardsConfig) -> None:
        self.config = config
        self._num_shards = 0
        self._open: dict[str, PlannedShard] = {}  # the last shard of each shape
        self._complete: list[PlannedShard] = []
        self._last_shape = config.shapes[0]  # rejects go to the shard of this shape

    def add(self, span: Span, shape: Bucket) -> None:
        """Add a span to the open shard of its shape."""
        self._last_shape = shape
        shard = self._open.get(shape.name)
        if shard is None or len(shard.spans) == self.config.samples_per_shard:
            shard = self._begin_shard(shape)
        shard.spans.append(span)

    def reject(self, row: SourceRow, reason: str, detail: str = "") -> None:
        """Add a reject to the shard that got the last span."""
        shard = self._open.get(self._last_shape.name) or self._begin_shard(self._last_shape)
        reject = Reject(key=row.clip.name, stage=STAGE, reason=reason, detail=detail)
        shard.rejects.append(RejectedRow(reject, row.clip.video, row.offset))

    def take_complete(self) -> list[PlannedShard]:
        """Remove and return the complete shards."""
        complete = self._complete
        self._complete = []
        return complete

    def take_rest(self) -> list[PlannedShard]:
        """Return the complete shards and the open ones. Call once, at the end."""
        return [*self.take_complete(), *self._open.values()]

    def _begin_shard(self, shape: Bucket) -> PlannedShard:
        if shape.name in self._open:
            self._complete.append(self._open[shape.name])
        bucket = shape.name if self.config.buckets else ""
        shard = PlannedShard(f"{self._num_shards:06d}", shape, bucket)
        self._open[shape.name] = shard
        self._num_shards += 1
        return shard


class DuplicateFinder:
    """Finds the keys that occurred before, among more keys than fit into memory.

    Use as a context manager: add all keys, then read `duplicates`. The temporary files have no
    names, so they are deleted when the process ends.
    """

    def __init__(self, folder: Path, num_files: int) -> None:
        self.folder = folder
        self.num_keys = 0
        self._stack = ExitStack()
        self._files = [self._open_temporary() for _ in range(num_files)]

    def __enter__(self) -> DuplicateFinder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, key: str, name: str) -> None:
        """Add the next key, a hexadecimal number, with the name of its clip."""
        file = self._files[int(key[:8], 16) % len(self._files)]
        file.write(json.dumps([key, self.num_keys, name]).encode() + b"\n")
        self.num_keys += 1

    def duplicates(self) -> Iterator[tuple[int, str]]:
        """(number of the key, name of the first clip with this key), in order of the numbers.

        Keys are numbered from 0 in the order in which they were added.
        """
        files = [self._write_duplicates(keys) for keys in self._files]
        return heapq.merge(*[_read_duplicates(file) for file in files])

    def _write_duplicates(self, keys: BinaryIO) -> BinaryIO:
        """Write the duplicates of one file to a new file, in order of their numbers.

        Equal keys are in one file, and numbers increase within each file.
        """
        first_names: dict[str, str] = {}
        found = self._open_temporary()
        keys.seek(0)
        for line in keys:
            key, number, name = json.loads(line)
            if key in first_names:
                found.write(json.dumps([number, first_names[key]]).encode() + b"\n")
            else:
                first_names[key] = name
        found.seek(0)
        return found

    def _open_temporary(self) -> BinaryIO:
        return self._stack.enter_context(tempfile.TemporaryFile(dir=self.folder))


def _read_duplicates(file: BinaryIO) -> Iterator[tuple[int, str]]:
    for line in file:
        number, first_name = json.loads(line)
        yield number, first_name


def plan_spans(
    config: ShardsConfig, clip: SourceClip, probe: VideoProbe
) -> Iterator[tuple[float, Bucket]]:
    """(start in s, shape) of at most `max_spans` spans, one after the other, none across a cut."""
    shapes = shapes_for(config.shapes, is_image=probe.is_image)
    spans_left = 1 if probe.is_image else config.max_spans
    end_s = min(clip.end_s, probe.duration_s)
    for shot_start_s, shot_end_s in probe.shots or ((0.0, math.inf),):
        begin_s = max(clip.start_s, shot_start_s)
        until_s = min(end_s, shot_end_s)
        at_s = 0.0
        while spans_left:
            shape = best_shape(
                shapes, fps=config.fps, aspect=probe.aspect, length_s=until_s - begin_s - at_s
            )
            if shape is None:
                break
            yield round(begin_s + at_s, 6), shape
            at_s += shape.num_frames / config.fps
            spans_left -= 1


def shapes_for(shapes: Sequence[Bucket], *, is_image: bool) -> list[Bucket]:
    """The shapes that clips of an image, or of a video, can have.

    Shapes of one frame are for images. Videos have them only if there are no others.
    """
    single = [shape for shape in shapes if shape.num_frames == 1]
    if is_image:
        return single
    return [shape for shape in shapes if shape.num_frames > 1] or single


def best_shape(
    shapes: Sequence[Bucket], *, fps: float, aspect: float, length_s: float
) -> Bucket | None:
    """The shape of a clip of this aspect ratio and length; None if the clip is too short for all.

    Of the shapes that are short enough, those with the nearest aspect ratio, and of those the
    longest.
    """
    fitting = [shape for shape in shapes if (shape.num_frames - 1) / fps < length_s - 1e-6]
    if not fitting:
        return None
    if len(fitting) == 1:
        return fitting[0]

    def preference(shape: Bucket) -> tuple[float, int, int, int]:
        distance = abs(math.log(shape.width / shape.height / aspect))
        return round(distance, 6), -shape.num_frames, -shape.height, shape.width

    return min(fitting, key=preference)


def span_key(config: ShardsConfig, source_sha256: str, start_s: float, shape: Bucket) -> str:
    """The key of a sample. Equal content and equal spans give equal keys."""
    text = f"{source_sha256}/{start_s:.6f}/{shape.num_frames}/{config.fps:g}"
    return hashlib.sha1(text.encode()).hexdigest()


def _duplicate_detail(clip: SourceClip, start_s: float, *, first_name: str) -> str:
    detail = f"span at {start_s:g} s is that of {first_name}"
    if clip.line:
        detail += f"; the caption of line {clip.line} is not used"
    return detail


def _too_short(config: ShardsConfig, clip: SourceClip, probe: VideoProbe) -> tuple[str, str]:
    """Reason and detail of a reject: how long the clip is, and how long it must be.

    A clip that lies in the missing part of a truncated video is truncated, not too short.
    """
    length_s = max(0.0, min(clip.end_s, probe.duration_s) - clip.start_s)
    shapes = shapes_for(config.shapes, is_image=probe.is_image) or config.shapes
    frames = min(shape.num_frames for shape in shapes)
    needed_s = (frames - 1) / config.fps
    shots = f" in {len(probe.shots)} shots" if probe.shots else ""
    promised_s = probe.duration_s + probe.missing_s
    if probe.missing_s and min(clip.end_s, promised_s) - clip.start_s > needed_s:
        return "truncated", truncated_detail(probe.duration_s, promised_s)
    detail = (
        f"{length_s:.3f} s{shots}; {frames} frames at {config.fps:g} fps need more than "
        f"{needed_s:.3f} s"
    )
    return "too_short", detail
