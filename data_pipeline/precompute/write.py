"""What was encoded, on its way to disk: a thread that writes, the units it writes, and the seconds that stages take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from landiff.configs import ownership
from landiff.configs.ownership import OWNER
from landiff.data_pipeline.format.schema import ShardEntry, column_stem
from landiff.data_pipeline.format.tensors import pack_tensor
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, Result
from landiff.data_pipeline.precompute.units import (
    ColumnCard,
    ColumnFolder,
    UnitWriter,
    common_shape,
)

WRITES_AHEAD = 4  # batches that wait for the writer


@dataclass
class Stages:
    """Seconds by stage, and processor seconds of the threads that worked on it; of all threads together."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin, cpu = time.perf_counter(), time.thread_time()
        yield
        seconds, cpu = time.perf_counter() - begin, time.thread_time() - cpu
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
            self.cpu_seconds[stage] = self.cpu_seconds.get(stage, 0.0) + cpu


def widened(found: tuple[int, int] | None, codes: Tensor) -> tuple[int, int]:
    """`found` (the least and the largest value so far), widened to hold uint16 codes too."""
    values = codes.int()
    low, high = int(values.min()), int(values.max())
    return (low, high) if found is None else (min(found[0], low), max(found[1], high))


class WriterThread:
    """Runs calls one after another in a thread of its own. An error comes out of the next `submit`, or of `drain`."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._waiting: list[Future[None]] = []

    def submit(self, call: Callable[..., None], *arguments: object) -> None:
        while len(self._waiting) >= WRITES_AHEAD:
            with self._stages("wait for the writer"):
                self._waiting.pop(0).result()
        self._waiting.append(self._pool.submit(self._timed, call, *arguments))

    def drain(self) -> None:
        while self._waiting:
            self._waiting.pop(0).result()

    def close(self) -> None:
        """Wait for what was submitted; errors that nobody asked for are in the units' failure records."""
        self._pool.shutdown(wait=True)

    def _timed(self, call: Callable[..., None], *arguments: object) -> None:
        with self._stages("write"):
            call(*arguments)


class ColumnUnit:
    """One column of one shard that is being written. All but the constructor runs in the writer's thread.

    The constructor raises OwnedError where another process makes this unit.
    """

    def __init__(self, folder: ColumnFolder, entry: ShardEntry, card: ColumnCard) -> None:
        self.folder, self.entry, self.card = folder, entry, card
        what = f"shard {entry.name} of column {folder.name!r} in {folder.folder.parent}"
        self._lock = ownership.take(folder.folder / f".{entry.name}{OWNER}", what)
        self._writer: UnitWriter | None = None
        self._shapes: list[tuple[int, ...]] = []
        self._value_range: tuple[int, int] | None = None
        self._given_up = False
        self.truncated = 0  # clips whose text was cut; set before `commit`

    def write(self, clips: Sequence[Clip], results: Sequence[Result]) -> None:
        if self._given_up:
            return
        try:
            self._write(clips, results)
        except BaseException as error:
            self.give_up(error)
            raise

    def _write(self, clips: Sequence[Clip], results: Sequence[Result]) -> None:
        if self._writer is None:
            self._writer = UnitWriter(self.folder, self.entry, self.card.fingerprint)
            self._writer.__enter__()
        name = self.folder.name
        for clip, result in zip(clips, results, strict=True):
            if isinstance(result, ClipProblem):
                self._writer.reject(clip.key, name, result.reason, result.detail, clip.position)
                continue
            stem = column_stem(name)
            self._writer.add(clip.key, {f"{stem}.safetensors": pack_tensor(stem, result)})
            self._shapes.append(tuple(result.shape))
            if result.dtype == torch.uint16:
                self._value_range = widened(self._value_range, result)

    def commit(self) -> None:
        if self._given_up:
            return
        self._writer.dtype = self.card.parts["dtype"]
        self._writer.shape = list(common_shape(self._shapes))
        self._writer.truncated = self.truncated
        self._writer.value_range = self._value_range
        try:
            self._writer.__exit__(None, None, None)
        except BaseException as error:
            self.give_up(error)
            raise
        self._lock.release()

    def give_up(self, error: BaseException) -> None:
        """Leave nothing but word of why."""
        self._given_up = True
        if (
            isinstance(error, OSError) and error.filename is None
        ):  # a full disk says not of which file
            error.filename = str(self.folder.folder / f"{self.entry.name}.tar")
        with suppress(OSError):  # a full disk may refuse the closing and the word; `error` tells
            if self._writer is not None:
                self._writer.__exit__(type(error), error, error.__traceback__)
            self.folder.fail(self.entry, error)
        self._lock.release()
