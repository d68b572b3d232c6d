"""Clips of raw shards on their way through the encoders: read, decoded ahead, grouped by shape."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.columns import DamagedSample, FolderReader
from data_pipeline.schema import RAW, RawSample, ShardEntry
from data_pipeline.video import ClipBackend, ClipDamaged, decode_clip


@dataclass(frozen=True)
class Problem:
    """Why a clip has no tensor in a column."""

    reason: str  # short, countable
    detail: str = ""


Result = Tensor | Problem


@dataclass(frozen=True)
class Clip:
    """One raw sample. `problem` says why `meta` or `frames` is not there."""

    position: int  # in its raw shard
    key: str
    meta: RawSample | None
    frames: np.ndarray | None = None  # uint8 [T, H, W, 3]
    problem: Problem | None = None


class ClipReader:
    """Reads raw shards; threads decode up to two batches ahead of the caller."""

    def __init__(self, data: Path, shards: Sequence[ShardEntry], *, decoder: ClipBackend, threads: int) -> None:
        self.decoder, self.threads = decoder, threads
        self.decode_s = 0.0  # of all threads together
        self._shards = shards
        self._json = FolderReader(data, RAW, "json", shards, keep=2)
        self._mp4 = FolderReader(data, RAW, "mp4", shards, keep=2)

    def clips(self, shard: int) -> list[Clip]:
        """All clips of a shard, without frames."""
        return [self._meta(shard, position) for position in range(self._shards[shard].samples)]

    def batches(self, shard: int, clips: Sequence[Clip], size: int) -> Iterator[list[Clip]]:
        """The clips of a shard in order, with frames."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            coming = iter(clips)
            ahead = deque(pool.submit(self._decode, shard, clip) for clip in islice(coming, 3 * size))
            while ahead:
                batch = []
                for future in [ahead.popleft() for _ in range(min(size, len(ahead)))]:
                    clip, seconds = future.result()
                    self.decode_s += seconds
                    batch.append(clip)
                ahead.extend(pool.submit(self._decode, shard, clip) for clip in islice(coming, len(batch)))
                yield batch

    def close(self) -> None:
        self._json.close()
        self._mp4.close()

    def _meta(self, shard: int, position: int) -> Clip:
        key = self._json.index(shard).keys[position]
        try:
            meta = RawSample.model_validate_json(self._json.read(shard, position).numpy().tobytes())
        except (DamagedSample, ValidationError) as error:
            return Clip(position, key, None, problem=Problem("damaged", str(error)))
        return Clip(position, key, meta)

    def _decode(self, shard: int, clip: Clip) -> tuple[Clip, float]:
        if clip.meta is None:
            return clip, 0.0
        begin = time.perf_counter()
        try:
            data = self._mp4.read(shard, clip.position).numpy().tobytes()
            frames = decode_clip(data, backend=self.decoder, sha256=clip.meta.video_sha256)
        except (DamagedSample, ClipDamaged) as error:
            return replace(clip, problem=Problem("damaged", str(error))), time.perf_counter() - begin
        if len(frames) != clip.meta.num_frames:
            problem = Problem("frame_count", f"{len(frames)} frames, its JSON says {clip.meta.num_frames}")
            return replace(clip, problem=problem), time.perf_counter() - begin
        return replace(clip, frames=frames), time.perf_counter() - begin


def in_batches(clips: Sequence[Clip], size: int) -> Iterator[list[Clip]]:
    """The clips in order, as they are."""
    return (list(clips[at : at + size]) for at in range(0, len(clips), size))


def by_shape(clips: Sequence[Clip], prepare: Callable[[Clip], np.ndarray | Tensor | Problem],
             compute: Callable[[list, list[str]], Tensor]) -> list[Result]:
    """`compute(inputs, keys)` once for all clips whose prepared input has the same shape.

    A clip that cannot be prepared, or whose output is not finite, gives a Problem in its place.
    """
    results: list[Result | None] = [None] * len(clips)
    groups: dict[tuple[int, ...], list[tuple[int, np.ndarray | Tensor]]] = {}
    for at, clip in enumerate(clips):
        value = prepare(clip)
        if isinstance(value, Problem):
            results[at] = value
        else:
            groups.setdefault(tuple(value.shape), []).append((at, value))
    for members in groups.values():
        outputs = compute([value for _, value in members], [clips[at].key for at, _ in members])
        for (at, _), output in zip(members, outputs, strict=True):
            results[at] = finite(output)
    return results


def finite(tensor: Tensor) -> Result:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        return Problem("not_finite", f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} values")
    return tensor
