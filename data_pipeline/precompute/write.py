"""Writing of encoded units in a background thread, and a timer of the task's stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
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

WRITES_AHEAD = 4  # batches that may wait for the writer thread


@dataclass
class StageTimer:
    """Wall-clock and CPU seconds by stage, summed over all threads.

    with timer("encode"):
        ...
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent in the `with` block to `stage`."""
        begin = time.perf_counter()
        cpu_begin = time.thread_time()
        yield
        seconds = time.perf_counter() - begin
        cpu_seconds = time.thread_time() - cpu_begin
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
            self.cpu_seconds[stage] = self.cpu_seconds.get(stage, 0.0) + cpu_seconds


def widened(value_range: tuple[int, int] | None, codes: Tensor) -> tuple[int, int]:
    """Extend (smallest, largest value so far) to include uint16 codes."""
    values = codes.int()
    low, high = int(values.min()), int(values.max())
    if value_range is None:
        return low, high
    return min(value_range[0], low), max(value_range[1], high)


class WriterThread:
    """Runs calls in submission order in one background thread.

    An error of a call is raised by the next `submit` that has to wait, or by `drain`.
    """

    def __init__(self, timer: StageTimer) -> None:
        self._timer = timer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._waiting: list[Future[None]] = []

    def submit(self, call: Callable[..., None], *arguments: object) -> None:
        """Queue a call. Blocks while `WRITES_AHEAD` calls are waiting."""
        while len(self._waiting) >= WRITES_AHEAD:
            with self._timer("wait for the writer"):
                self._waiting.pop(0).result()
        self._waiting.append(self._pool.submit(self._timed, call, *arguments))

    def drain(self) -> None:
        """Wait for all submitted calls. Raises the first error."""
        while self._waiting:
            self._waiting.pop(0).result()

    def close(self) -> None:
        """Wait for all submitted calls and stop the thread. Errors are in the failure records."""
        self._pool.shutdown(wait=True)

    def _timed(self, call: Callable[..., None], *arguments: object) -> None:
        """Run a call and add its time to the stage "write"."""
        with self._timer("write"):
            call(*arguments)


class UnitWrite:
    """Writes one column of one shard. All methods but the constructor run in the writer thread.

    The constructor raises OwnedError if another process computes this unit.
    """

    def __init__(self, folder: ColumnFolder, entry: ShardEntry, card: ColumnCard) -> None:
        self.folder = folder
        self.entry = entry
        self.card = card
        self.truncated = 0  # clips whose text was truncated; set before `commit`
        what = f"shard {entry.name} of column {folder.name!r} in {folder.folder.parent}"
        self._lock = ownership.take(folder.folder / f".{entry.name}{OWNER}", what)
        self._writer: UnitWriter | None = None
        self._open_files = ExitStack()  # closing it commits the unit
        self._shapes: list[tuple[int, ...]] = []
        self._value_range: tuple[int, int] | None = None
        self._given_up = False

    def write(self, clips: Sequence[Clip], results: Sequence[Result]) -> None:
        """Append a batch. Gives up the unit on an error and raises it."""
        if self._given_up:
            return
        try:
            self._write(clips, results)
        except BaseException as error:
            self.give_up(error)
            raise

    def _write(self, clips: Sequence[Clip], results: Sequence[Result]) -> None:
        """Append tensors and rejects to the temporary tar, which the first batch creates."""
        if self._writer is None:
            writer = UnitWriter(self.folder, self.entry, self.card.fingerprint)
            self._open_files.enter_context(writer)
            self._writer = writer
        name = self.folder.name
        stem = column_stem(name)
        for clip, result in zip(clips, results, strict=True):
            if isinstance(result, ClipProblem):
                self._writer.reject(clip.key, name, result.reason, result.detail, clip.position)
                continue
            self._writer.add(clip.key, {f"{stem}.safetensors": pack_tensor(stem, result)})
            self._shapes.append(tuple(result.shape))
            if result.dtype == torch.uint16:
                self._value_range = widened(self._value_range, result)

    def commit(self) -> None:
        """Commit tar and sidecar after the last batch. Gives up the unit on an error."""
        if self._given_up:
            return
        assert self._writer is not None, f"unit {self.entry.name} is committed before its batches"
        self._writer.dtype = self.card.parts["dtype"]
        self._writer.shape = list(common_shape(self._shapes))
        self._writer.truncated = self.truncated
        self._writer.value_range = self._value_range
        try:
            self._open_files.close()
        except BaseException as error:
            self.give_up(error)
            raise
        self._lock.release()

    def give_up(self, error: BaseException) -> None:
        """Delete what was written and record the error."""
        self._given_up = True
        if isinstance(error, OSError) and error.filename is None:
            # the error of a full disk does not name the file
            error.filename = str(self.folder.folder / f"{self.entry.name}.tar")
        self._open_files.pop_all()  # without running its callbacks: nothing may be committed now
        with suppress(OSError):  # on a full disk this may fail too; the caller raises `error`
            if self._writer is not None:
                self._writer.abort()
            self.folder.fail(self.entry, error, self.card.fingerprint)
        self._lock.release()
