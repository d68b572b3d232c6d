"""Reading of raw shards for the encoders: clips are decoded ahead and grouped by shape."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from landiff.data_pipeline.format.columns import DamagedSample, FolderReader
from landiff.data_pipeline.format.schema import RAW, RawSample, ShardEntry
from landiff.data_pipeline.video.codec import ClipDamaged, ClipDecoder
from landiff.data_pipeline.video.process import Backend

BATCHES_AHEAD = 2  # batches that are decoded before the caller takes them


@dataclass(frozen=True)
class ClipProblem:
    """Why a clip has no tensor in a column."""

    reason: str  # short code; rejects are counted by it
    detail: str = ""


Result = Tensor | ClipProblem


@dataclass(frozen=True)
class Clip:
    """One raw sample. `problem` says why `meta` or `frames` is None."""

    position: int  # in its raw shard
    key: str
    meta: RawSample | None
    frames: np.ndarray | None = None  # uint8 [T, H, W, 3]
    problem: ClipProblem | None = None

    def required_problem(self) -> ClipProblem:
        """The problem of a clip that could not be read or decoded."""
        assert self.problem is not None, f"clip {self.key} has neither content nor a problem"
        return self.problem


@dataclass(frozen=True)
class Piece:
    """One batch of a shard's clips. An empty shard has one piece with an empty batch."""

    shard: int
    clips: list[Clip]  # all of the shard, without frames
    batch: list[Clip]
    last: bool  # whether this is the shard's last batch


@dataclass(frozen=True)
class DecodedClip:
    """A clip with the time that reading and decoding it took."""

    clip: Clip
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this thread and of the decoder process


@dataclass(frozen=True)
class PendingBatch:
    """A batch whose clips may still be decoded in the background."""

    shard: int
    clips: list[Clip]
    work: list[DecodedClip | Future[DecodedClip]]
    last: bool


class ClipReader:
    """Reads raw shards. Threads decode up to two batches ahead of the caller.

    Each thread has its own decoder process, which receives only bytes whose checksum is correct.
    If the process crashes or hangs, only that clip is lost.
    """

    def __init__(
        self, data: Path, shards: Sequence[ShardEntry], *, decoder: Backend, threads: int
    ) -> None:
        self.threads = threads
        self.decode_s = 0.0  # wall-clock seconds, summed over all threads
        self.decode_cpu_s = 0.0  # CPU seconds of all threads and decoder processes
        self._shards = shards
        self._json = FolderReader(data, RAW, "json", shards, keep=4)
        self._mp4 = FolderReader(data, RAW, "mp4", shards, keep=4)
        self._decoders = [ClipDecoder(decoder) for _ in range(threads)]
        self._idle: queue.SimpleQueue[ClipDecoder] = queue.SimpleQueue()
        for clip_decoder in self._decoders:
            self._idle.put(clip_decoder)

    def clips(self, shard: int) -> list[Clip]:
        """All clips of a shard, without frames."""
        return [self._meta(shard, position) for position in range(self._shards[shard].samples)]

    def stream(self, plan: Iterable[tuple[int, bool]], size: int) -> Iterator[Piece]:
        """Yield the clips of the planned shards in order, in batches of at most `size`.

        `plan` yields (shard, whether its frames are needed). Decoding continues over the ends of
        shards, so `plan` is read ahead by up to two batches.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        ahead: deque[PendingBatch] = deque()
        try:
            for shard, with_frames in plan:
                clips = self.clips(shard)
                for start in range(0, max(1, len(clips)), size):
                    work: list[DecodedClip | Future[DecodedClip]] = []
                    for clip in clips[start : start + size]:
                        if with_frames:
                            work.append(pool.submit(self._decode, shard, clip))
                        else:
                            work.append(DecodedClip(clip))
                    ahead.append(PendingBatch(shard, clips, work, start + size >= len(clips)))
                    if len(ahead) > BATCHES_AHEAD:
                        yield self._finish(ahead.popleft())
            while ahead:
                yield self._finish(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Close all files and stop the decoder processes."""
        self._json.close()
        self._mp4.close()
        for decoder in self._decoders:
            decoder.close()

    def _finish(self, pending: PendingBatch) -> Piece:
        """Wait until a batch is decoded and add up its decoding time."""
        batch: list[Clip] = []
        for item in pending.work:
            decoded = item.result() if isinstance(item, Future) else item
            self.decode_s += decoded.seconds
            self.decode_cpu_s += decoded.cpu_seconds
            batch.append(decoded.clip)
        return Piece(pending.shard, pending.clips, batch, pending.last)

    def _meta(self, shard: int, position: int) -> Clip:
        """Read the metadata of one clip."""
        key = self._json.index(shard).keys[position]
        try:
            meta = RawSample.model_validate_json(self._json.read(shard, position).tobytes())
        except (DamagedSample, ValidationError) as error:
            return Clip(position, key, None, problem=ClipProblem("damaged", str(error)))
        return Clip(position, key, meta)

    def _decode(self, shard: int, clip: Clip) -> DecodedClip:
        """Read and decode one clip in a free decoder process."""
        if clip.meta is None:
            return DecodedClip(clip)
        decoder = self._idle.get()
        try:
            begin = time.perf_counter()
            cpu_begin = time.thread_time() + decoder.process.cpu_s
            frames = self._frames(decoder, shard, clip, clip.meta)
            seconds = time.perf_counter() - begin
            cpu_seconds = time.thread_time() + decoder.process.cpu_s - cpu_begin
        except Exception as error:
            error.add_note(f"clip {clip.key} of shard {self._shards[shard].name}")
            raise
        finally:
            self._idle.put(decoder)
        if isinstance(frames, ClipProblem):
            return DecodedClip(replace(clip, problem=frames), seconds, cpu_seconds)
        return DecodedClip(replace(clip, frames=frames), seconds, cpu_seconds)

    def _frames(
        self, decoder: ClipDecoder, shard: int, clip: Clip, meta: RawSample
    ) -> np.ndarray | ClipProblem:
        """Decode one clip and check its number of frames."""
        try:
            video = self._mp4.read(shard, clip.position).tobytes()
            frames = decoder.decode(video, sha256=meta.video_sha256)
        except DamagedSample as error:
            return ClipProblem("damaged", str(error))
        except ClipDamaged as error:
            return ClipProblem(error.failure.reason, error.failure.detail)
        if len(frames) != meta.num_frames:
            return ClipProblem(
                "frame_count", f"{len(frames)} frames, but its metadata says {meta.num_frames}"
            )
        return frames


def by_shape(
    clips: Sequence[Clip],
    prepare: Callable[[Clip], np.ndarray | Tensor | ClipProblem],
    compute: Callable[[list[Any], list[str]], Tensor],
) -> list[Result]:
    """Run `compute(inputs, keys)` once for each group of clips with the same input shape.

    `prepare` returns a clip's input. The result of a clip is a ClipProblem if it cannot be
    prepared or if its output is not finite.
    """
    results: dict[int, Result] = {}
    groups: dict[tuple[int, ...], list[tuple[int, np.ndarray | Tensor]]] = {}
    for index, clip in enumerate(clips):
        value = prepare(clip)
        if isinstance(value, ClipProblem):
            results[index] = value
        else:
            groups.setdefault(tuple(value.shape), []).append((index, value))
    for members in groups.values():
        inputs = [value for _, value in members]
        keys = [clips[index].key for index, _ in members]
        outputs = compute(inputs, keys)
        for (index, _), output in zip(members, outputs, strict=True):
            results[index] = finite(output)
    return [results[index] for index in range(len(clips))]


def finite(tensor: Tensor) -> Result:
    """Return the tensor, or a ClipProblem if it holds NaN or infinity."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        bad_values = int((~tensor.isfinite()).sum())
        return ClipProblem("not_finite", f"{bad_values} of {tensor.numel()} values")
    return tensor
