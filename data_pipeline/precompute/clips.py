"""Clips of raw shards on their way through the encoders: read, decoded ahead, grouped by shape."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from landiff.data_pipeline.format.columns import DamagedSample, FolderReader
from landiff.data_pipeline.format.schema import RAW, RawSample, ShardEntry
from landiff.data_pipeline.video.codec import ClipDamaged, ClipDecoder
from landiff.data_pipeline.video.process import Backend

BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ClipProblem:
    """Why a clip has no tensor in a column."""

    reason: str  # short, countable
    detail: str = ""


Result = Tensor | ClipProblem


@dataclass(frozen=True)
class Clip:
    """One raw sample. `problem` says why `meta` or `frames` is not there."""

    position: int  # in its raw shard
    key: str
    meta: RawSample | None
    frames: np.ndarray | None = None  # uint8 [T, H, W, 3]
    problem: ClipProblem | None = None


@dataclass(frozen=True)
class Piece:
    """A batch of one shard's clips on its way; `last` of its shard, and empty where the shard is."""

    shard: int
    clips: list[Clip]  # all of the shard, without frames
    batch: list[Clip]
    last: bool


class ClipReader:
    """Reads raw shards; threads decode up to two batches ahead of the caller.

    Each thread has a decoder process, which sees only bytes whose checksum says that we wrote them. Whatever
    happens there costs a clip.
    """

    def __init__(
        self, data: Path, shards: Sequence[ShardEntry], *, decoder: Backend, threads: int
    ) -> None:
        self.threads = threads
        self.decode_s = self.decode_cpu_s = 0.0  # of all threads and their children together
        self._shards = shards
        self._json = FolderReader(data, RAW, "json", shards, keep=4)
        self._mp4 = FolderReader(data, RAW, "mp4", shards, keep=4)
        self._decoders = [ClipDecoder(decoder) for _ in range(threads)]
        self._idle: queue.SimpleQueue[ClipDecoder] = queue.SimpleQueue()
        for one in self._decoders:
            self._idle.put(one)

    def clips(self, shard: int) -> list[Clip]:
        """All clips of a shard, without frames."""
        return [self._meta(shard, position) for position in range(self._shards[shard].samples)]

    def stream(self, plan: Iterable[tuple[int, bool]], size: int) -> Iterator[Piece]:
        """The clips of the shards of `plan`, in order and batches; (shard, True) asks for their frames.

        Decoding goes on over the ends of shards, and `plan` is asked as far ahead.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        ahead: deque[
            tuple[int, list[Clip], list[Future[tuple[Clip, float, float]]] | list[Clip], bool]
        ] = deque()
        try:
            for shard, with_frames in plan:
                clips = self.clips(shard)
                parts = [clips[at : at + size] for at in range(0, len(clips), size)] or [[]]
                for number, part in enumerate(parts):
                    work = (
                        [pool.submit(self._decode, shard, clip) for clip in part]
                        if with_frames
                        else part
                    )
                    ahead.append((shard, clips, work, number == len(parts) - 1))
                    if len(ahead) > BATCHES_AHEAD:
                        yield self._ready(*ahead.popleft())
            while ahead:
                yield self._ready(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        self._json.close()
        self._mp4.close()
        for decoder in self._decoders:
            decoder.close()

    def _ready(self, shard: int, clips: list[Clip], work: list, last: bool) -> Piece:
        batch = []
        for item in work:
            clip, seconds, cpu = item.result() if isinstance(item, Future) else (item, 0.0, 0.0)
            self.decode_s += seconds
            self.decode_cpu_s += cpu
            batch.append(clip)
        return Piece(shard, clips, batch, last)

    def _meta(self, shard: int, position: int) -> Clip:
        key = self._json.index(shard).keys[position]
        try:
            meta = RawSample.model_validate_json(self._json.read(shard, position).tobytes())
        except (DamagedSample, ValidationError) as error:
            return Clip(position, key, None, problem=ClipProblem("damaged", str(error)))
        return Clip(position, key, meta)

    def _decode(self, shard: int, clip: Clip) -> tuple[Clip, float, float]:
        """With the seconds it took, and those of processor time, the child's included."""
        if clip.meta is None:
            return clip, 0.0, 0.0
        decoder = self._idle.get()
        try:
            begin, cpu = time.perf_counter(), time.thread_time() + decoder.process.cpu_s
            frames = self._frames(decoder, shard, clip)
            seconds, cpu = (
                time.perf_counter() - begin,
                time.thread_time() + decoder.process.cpu_s - cpu,
            )
        finally:
            self._idle.put(decoder)
        return (
            replace(clip, problem=frames)
            if isinstance(frames, ClipProblem)
            else replace(clip, frames=frames),
            seconds,
            cpu,
        )

    def _frames(self, decoder: ClipDecoder, shard: int, clip: Clip) -> np.ndarray | ClipProblem:
        try:
            frames = decoder.decode(
                self._mp4.read(shard, clip.position).tobytes(), sha256=clip.meta.video_sha256
            )
        except DamagedSample as error:
            return ClipProblem("damaged", str(error))
        except ClipDamaged as error:
            return ClipProblem(error.failure.reason, error.failure.detail)
        if len(frames) != clip.meta.num_frames:
            return ClipProblem(
                "frame_count", f"{len(frames)} frames, its JSON says {clip.meta.num_frames}"
            )
        return frames


def by_shape(
    clips: Sequence[Clip],
    prepare: Callable[[Clip], np.ndarray | Tensor | ClipProblem],
    compute: Callable[[list, list[str]], Tensor],
) -> list[Result]:
    """`compute(inputs, keys)` once for all clips whose prepared input has the same shape.

    A clip that cannot be prepared, or whose output is not finite, gives a ClipProblem in its place.
    """
    results: list[Result | None] = [None] * len(clips)
    groups: dict[tuple[int, ...], list[tuple[int, np.ndarray | Tensor]]] = {}
    for at, clip in enumerate(clips):
        value = prepare(clip)
        if isinstance(value, ClipProblem):
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
        return ClipProblem(
            "not_finite", f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} values"
        )
    return tensor
