"""Spans and rejects in the order of the source become shards to be.

Equal content and span means equal key, and the first row that has a key keeps it. Which ones came before is found
on disk: keys are spread over files, and only one of those is in memory at a time.
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
from landiff.data_pipeline.ingest.plan.planned_shard import STAGE, PlannedShard, SetAside, Span
from landiff.data_pipeline.ingest.plan.probes import seen
from landiff.data_pipeline.ingest.plan.rows import SourceRow
from landiff.data_pipeline.ingest.shots import Look
from landiff.data_pipeline.ingest.sources.entries import SourceClip

BYTES_PER_FILE = 32 << 20  # of rows whose keys are in memory together
MOST_FILES = 256


def lay(config: ShardsConfig, rows: Path) -> Iterator[PlannedShard]:
    """All units of a source, each when it is complete: not in the order of their names."""
    layout = ShardLayout(config)
    files = min(MOST_FILES, 1 + rows.stat().st_size // BYTES_PER_FILE)
    with Repeats(rows.parent, files) as repeats:
        for row, look in seen(config, rows):
            for start, shape in (
                []
                if row.clip.failure or look.failure
                else lay_spans(config, config.shapes, row.clip, look)
            ):
                repeats.add(span_key(config, look.sha256, start, shape), row.clip.name)
        repeated = repeats.found()
        upcoming, number = next(repeated, None), 0
        for row, look in seen(config, rows):
            failure = row.clip.failure or look.failure
            if failure:
                layout.reject(row, failure.reason, failure.detail)
                continue
            spans = list(lay_spans(config, config.shapes, row.clip, look))
            if not spans:
                layout.reject(row, "too_short", _too_short(config, row.clip, look))
            for start, shape in spans:
                if upcoming and upcoming[0] == number:
                    unused = (
                        f"; the caption of line {row.clip.line} is not used"
                        if row.clip.line
                        else ""
                    )
                    layout.reject(
                        row, "duplicate", f"span at {start:g} s is that of {upcoming[1]}{unused}"
                    )
                    upcoming = next(repeated, None)
                else:
                    clip, key = row.clip, span_key(config, look.sha256, start, shape)
                    span = Span(
                        key,
                        clip.name,
                        clip.video,
                        clip.caption,
                        look.sha256,
                        start,
                        look.crop,
                        row.offset,
                        clip.more_captions,
                        look.conversions,
                    )
                    layout.add(span, shape)
                number += 1
            yield from layout.complete()
    yield from layout.rest()


class ShardLayout:
    """Puts spans and rejects into units. A shard is full or it is the last of its shape."""

    def __init__(self, config: ShardsConfig) -> None:
        self.config = config
        self._begun = 0
        self._open: dict[str, PlannedShard] = {}  # the last of each shape
        self._complete: list[PlannedShard] = []
        self._last = config.shapes[0]  # where rejects go

    def add(self, span: Span, shape: Bucket) -> None:
        self._last = shape
        unit = self._open.get(shape.name)
        if unit is None or len(unit.spans) == self.config.samples_per_shard:
            unit = self._begin(shape)
        unit.spans.append(span)

    def reject(self, row: SourceRow, reason: str, detail: str = "") -> None:
        unit = self._open.get(self._last.name) or self._begin(self._last)
        unit.aside.append(
            SetAside(
                Reject(key=row.clip.name, stage=STAGE, reason=reason, detail=detail),
                row.clip.video,
                row.offset,
            )
        )

    def complete(self) -> list[PlannedShard]:
        """Units that nothing more comes to, each told once."""
        complete, self._complete = self._complete, []
        return complete

    def rest(self) -> list[PlannedShard]:
        return [*self.complete(), *self._open.values()]

    def _begin(self, shape: Bucket) -> PlannedShard:
        if shape.name in self._open:
            self._complete.append(self._open[shape.name])
        unit = self._open[shape.name] = PlannedShard(
            f"{self._begun:06d}", shape, shape.name if self.config.buckets else ""
        )
        self._begun += 1
        return unit


class Repeats:
    """Finds which of many keys came before."""

    def __init__(self, folder: Path, files: int) -> None:
        self.folder, self.number = folder, 0
        self._stack = ExitStack()
        self._files = [self._temporary() for _ in range(files)]

    def __enter__(self) -> Repeats:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, key: str, name: str) -> None:
        """Keys are counted from 0."""
        self._files[int(key[:8], 16) % len(self._files)].write(
            json.dumps([key, self.number, name]).encode() + b"\n"
        )
        self.number += 1

    def found(self) -> Iterator[tuple[int, str]]:
        """(number of a key that is there already, name of the first that had it), in order of the numbers."""
        files = [self._repeats_of(keys) for keys in self._files]
        return heapq.merge(*(map(tuple, map(json.loads, file)) for file in files))

    def _repeats_of(self, keys: BinaryIO) -> BinaryIO:
        """Those of one file, in a file. A key is in one file only, and in each file the numbers rise."""
        first: dict[str, str] = {}
        found = self._temporary()
        keys.seek(0)
        for key, number, name in map(json.loads, keys):
            if key in first:
                found.write(json.dumps([number, first[key]]).encode() + b"\n")
            else:
                first[key] = name
        found.seek(0)
        return found

    def _temporary(self) -> BinaryIO:
        """A file without a name: it is gone when this process is."""
        return self._stack.enter_context(tempfile.TemporaryFile(dir=self.folder))


def lay_spans(
    config: ShardsConfig, shapes: Sequence[Bucket], clip: SourceClip, look: Look
) -> Iterator[tuple[float, Bucket]]:
    """(start, shape) of at most `max_spans` spans, one after the other, none of them across a cut."""
    left = config.max_spans
    end_s = min(clip.end_s, look.duration_s)
    for first, last in look.shots or ((0.0, math.inf),):
        begin, until, at = max(clip.start_s, first), min(end_s, last), 0.0
        while left and (shape := best_shape(shapes, config.fps, look.aspect, until - begin - at)):
            yield round(begin + at, 6), shape
            at += shape.num_frames / config.fps
            left -= 1


def best_shape(
    shapes: Sequence[Bucket], fps: float, aspect: float, length_s: float
) -> Bucket | None:
    """The bucket that a clip of this aspect and length goes to: the nearest aspect that is not too long, of those the longest."""
    fitting = [shape for shape in shapes if (shape.num_frames - 1) / fps < length_s - 1e-6]
    if len(shapes) == 1 or not fitting:
        return next(iter(fitting), None)
    return min(
        fitting,
        key=lambda shape: (
            round(abs(math.log(shape.width / shape.height / aspect)), 6),
            -shape.num_frames,
            -shape.height,
            shape.width,
        ),
    )


def span_key(config: ShardsConfig, source_sha256: str, start_s: float, shape: Bucket) -> str:
    """The sample's key: equal content and span, equal key."""
    return hashlib.sha1(
        f"{source_sha256}/{start_s:.6f}/{shape.num_frames}/{config.fps:g}".encode()
    ).hexdigest()


def _too_short(config: ShardsConfig, clip: SourceClip, look: Look) -> str:
    lasts = max(0.0, min(clip.end_s, look.duration_s) - clip.start_s)
    frames = min(shape.num_frames for shape in config.shapes)
    shots = f" in {len(look.shots)} shots" if look.shots else ""
    return f"{lasts:.3f} s{shots}; {frames} frames at {config.fps:g} fps need more than {(frames - 1) / config.fps:.3f} s"
