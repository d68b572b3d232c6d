"""One task of `landiff precompute`: clips decoded, encoded and written at the same time.

Threads decode ahead, this thread runs the encoders, another one writes, hashes and commits: whatever is
slowest is always busy, and the progress line says how busy each is.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.clips import Clip, ClipReader, Piece, Problem, Result
from data_pipeline.columns import pack_tensor
from data_pipeline.precompute_config import PrecomputeConfig, TextColumn
from data_pipeline.schema import Manifest, ShardEntry, column_stem
from data_pipeline.shards import ShardError
from data_pipeline.units import ColumnCard, ColumnFolder, UnitWriter, common_shape, share

Progress = Callable[[int, int, str], None]  # (clips done, clips of this task, which columns go through together)
SMALL = 100  # clips; of fewer, one bad clip is no fraction to stop for before the end
WRITES_AHEAD = 4  # batches that wait for the writer


class TooManyRejects(ShardError):
    """More clips were set aside than `max_bad_fraction` allows."""


@dataclass
class Stages:
    """Seconds by stage, and processor seconds of the thread that it belongs to."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin, cpu = time.perf_counter(), time.thread_time()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
        self.cpu_seconds[stage] = self.cpu_seconds.get(stage, 0.0) + time.thread_time() - cpu


@dataclass(frozen=True)
class ColumnSummary:
    made: int = 0  # units of this run
    found: int = 0  # units that were finished before
    clips: int = 0  # of this run, those set aside included
    rejects: dict[str, int] = field(default_factory=dict)  # reason -> clips, of both


@dataclass(frozen=True)
class Summary:
    """What one task did."""

    columns: dict[str, ColumnSummary]
    stage_seconds: dict[str, float]  # "decode" is that of all its threads together
    cpu_seconds: dict[str, float]  # the same of processor time, that of decoder processes included
    wall_s: float

    def __str__(self) -> str:
        parts = []
        for name, column in self.columns.items():
            bad = f", {sum(column.rejects.values())} set aside ({counted(column.rejects)})" if column.rejects else ""
            parts.append(f"{name}: {column.clips} clips in {column.made} shards, {column.found} shards were done{bad}")
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.stage_seconds.items())
        return "; ".join(parts) + f"; {self.wall_s:.1f} s" + (f" (seconds by stage: {stages})" if stages else "")


class Producer(Protocol):
    """Clips of a shard -> tensors of one column."""

    card: ColumnCard

    def needs_frames(self, entry: ShardEntry) -> bool:
        """Asked ahead, in the order of `begin`."""
        ...

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> None:
        """Before the clips of a shard come, in batches."""
        ...

    def __call__(self, clips: Sequence[Clip]) -> list[Result]:
        ...

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """What `landiff precompute verify` wants to know of a stored tensor; "bad_values" above 0 is a fault."""
        ...


@dataclass(frozen=True)
class Bench:
    """What producers work with."""

    config: PrecomputeConfig
    device: torch.device
    stages: Stages

    @classmethod
    def of(cls, config: PrecomputeConfig) -> Bench:
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        return cls(config, torch.device(device), Stages())

    def stack(self, videos: list[np.ndarray]) -> Tensor:
        """uint8 [B, T, H, W, 3] on the device."""
        return torch.from_numpy(np.stack(videos)).to(self.device)


Build = Callable[[Sequence[str], Bench], dict[str, Producer]]


def groups(config: PrecomputeConfig) -> list[list[str]]:
    """Columns that go through together: each text column alone, so that one big encoder is in memory at a time;
    those that need frames at once, so that each clip is decoded once."""
    texts = [[name] for name, column in config.columns.items() if isinstance(column, TextColumn)]
    with_frames = [name for name, column in config.columns.items() if not isinstance(column, TextColumn)]
    return [*texts, with_frames] if with_frames else texts


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


class Unit:
    """One column of one shard on its way to disk. All but the constructor runs in the writer's thread."""

    def __init__(self, folder: ColumnFolder, entry: ShardEntry, card: ColumnCard) -> None:
        self.folder, self.entry, self.card = folder, entry, card
        self._writer: UnitWriter | None = None
        self._shapes: list[tuple[int, ...]] = []
        self._given_up = False

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
            if isinstance(result, Problem):
                self._writer.reject(clip.key, name, result.reason, result.detail, clip.position)
                continue
            stem = column_stem(name)
            self._writer.add(clip.key, {f"{stem}.safetensors": pack_tensor(stem, result)})
            self._shapes.append(tuple(result.shape))

    def commit(self) -> None:
        if self._given_up:
            return
        self._writer.dtype = self.card.parts["dtype"]
        self._writer.shape = list(common_shape(self._shapes))
        try:
            self._writer.__exit__(None, None, None)
        except BaseException as error:
            self.give_up(error)
            raise

    def give_up(self, error: BaseException) -> None:
        """Leave nothing but word of why."""
        self._given_up = True
        with suppress(OSError):  # a full disk may refuse the closing and the word; `error` tells
            if self._writer is not None:
                self._writer.__exit__(type(error), error, error.__traceback__)
            self.folder.fail(self.entry, error)


class Job:
    """One task's run over its shards."""

    def __init__(self, config: PrecomputeConfig, manifest: Manifest, task: tuple[int, int], build: Build, progress: Progress | None = None) -> None:
        self.config, self.manifest, self.build = config, manifest, build
        self.bench = Bench.of(config)
        self.stages = self.bench.stages
        self.shards = share(manifest.shards, task)
        self.folders = {name: ColumnFolder(config.data, name) for name in config.columns}
        self.summaries = {name: ColumnSummary() for name in config.columns}
        self.seen: Counter[str] = Counter()  # clips by column, those of units found finished included
        self.done: Counter[str] = Counter()  # clips by column, for the progress line
        self._rejects: dict[str, Counter[str]] = {name: Counter() for name in config.columns}  # of the unit in work
        self._found: set[tuple[str, int]] = set()  # (column, shard) that were finished before
        self._progress = progress
        self._began = (time.perf_counter(), {"decode": 0.0})  # of the columns that go through now
        self._reader = ClipReader(config.data, manifest.shards, decoder=config.decoder, threads=config.decode_threads)

    def run(self) -> Summary:
        begin = time.perf_counter()
        try:
            for names in groups(self.config):
                self._run_columns(names)
        finally:
            self._reader.close()
        return Summary(self.summaries, {"decode": self._reader.decode_s, **self.stages.seconds},
                       {"decode": self._reader.decode_cpu_s, **self.stages.cpu_seconds}, time.perf_counter() - begin)

    def _run_columns(self, names: Sequence[str]) -> None:
        with torch.inference_mode():
            with self.stages("load encoders"):
                producers = self.build(names, self.bench)
            for name, producer in producers.items():
                self.folders[name].remove_leftovers()
                self.folders[name].claim(producer.card, redo=name in self.config.redo)
            left = [shard for shard in self.shards if not self._find_finished(shard, producers)]
            self._began = (time.perf_counter(), {"decode": self._reader.decode_s, **self.stages.seconds})
            self._report(names)
            writer = WriterThread(self.stages)
            units: dict[str, Unit] = {}
            try:
                for piece in self._timed(self._reader.stream(self._plan(left, producers), self.config.batch_size)):
                    if not units:
                        units = self._begin(piece, producers)
                    self._encode(piece, {name: producers[name] for name in units}, units, writer, names)
                    if piece.last:
                        self._check(units, last=piece.shard == left[-1])
                        for unit in units.values():
                            writer.submit(unit.commit)
                        units = {}
                writer.drain()
            finally:
                self._end(writer, units, sys.exc_info()[1])
            for name in names:
                self._stop_if_too_many(name, last=True)

    def _plan(self, left: Sequence[int], producers: Mapping[str, Producer]) -> Iterator[tuple[int, bool]]:
        for shard in left:
            if not self._find_finished(shard, producers):  # a twin of this task was faster
                entry = self.manifest.shards[shard]
                yield shard, any([producer.needs_frames(entry) for name, producer in producers.items() if (name, shard) not in self._found])

    def _begin(self, piece: Piece, producers: Mapping[str, Producer]) -> dict[str, Unit]:
        entry = self.manifest.shards[piece.shard]
        units = {name: Unit(self.folders[name], entry, producer.card) for name, producer in producers.items()
                 if (name, piece.shard) not in self._found}
        for name in units:
            producers[name].begin(entry, piece.clips)
            self._rejects[name].clear()
        return units

    def _encode(self, piece: Piece, producers: Mapping[str, Producer], units: Mapping[str, Unit], writer: WriterThread,
                names: Sequence[str]) -> None:
        for name, producer in producers.items():
            results = producer(piece.batch)
            self._rejects[name].update(result.reason for result in results if isinstance(result, Problem))
            writer.submit(units[name].write, piece.batch, results)
            self.done[name] += len(piece.batch)
        self._report(names)

    def _check(self, units: Mapping[str, Unit], *, last: bool) -> None:
        """Before units are committed, so that they are made again when the cause of too many rejects is mended."""
        for name, unit in units.items():
            self._count(name, self._rejects[name], unit.entry.samples, made=1)
            self._stop_if_too_many(name, last=last)

    def _end(self, writer: WriterThread, units: Mapping[str, Unit], error: BaseException | None) -> None:
        writer.close()
        for unit in units.values():
            unit.give_up(error or RuntimeError("the task stopped"))

    def _find_finished(self, shard: int, producers: Mapping[str, Producer]) -> bool:
        """Count the shard's units that are finished; True if they all are."""
        entry = self.manifest.shards[shard]
        for name, producer in producers.items():
            if (name, shard) in self._found:
                continue
            sidecar = self.folders[name].finished(entry, producer.card.fingerprint)
            if sidecar is not None:
                self._found.add((name, shard))
                self.done[name] += entry.samples
                self._count(name, Counter(r.reason for r in sidecar.rejects), entry.samples, found=1)
        return all((name, shard) in self._found for name in producers)

    def _timed(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        while True:
            with self.stages("wait for clips"):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _count(self, name: str, rejects: Counter[str], clips: int, *, made: int = 0, found: int = 0) -> None:
        old = self.summaries[name]
        self.seen[name] += clips
        self.summaries[name] = ColumnSummary(old.made + made, old.found + found, old.clips + (clips if made else 0),
                                             dict(Counter(old.rejects) + rejects))

    def _stop_if_too_many(self, name: str, *, last: bool) -> None:
        rejects, seen = self.summaries[name].rejects, self.seen[name]
        bad = sum(rejects.values())
        if bad > self.config.max_bad_fraction * seen and (last or seen >= SMALL):
            raise TooManyRejects(
                f"column {name!r}: {bad} of {seen} clips were set aside ({counted(rejects)}), more than max_bad_fraction = "
                f"{self.config.max_bad_fraction:g}. Mend the cause, or raise max_bad_fraction, and run again; finished shards stay"
            )

    def _report(self, names: Sequence[str]) -> None:
        if self._progress is not None:
            total = sum(self.manifest.shards[s].samples for s in self.shards)
            note = f"clips ({', '.join(names)})"
            self._progress(sum(self.done[name] for name in names) // len(names), total, "; ".join([note, *self._busy()]))

    def _busy(self) -> list[str]:
        """How busy each stage was since these columns began."""
        began, before = self._began
        wall = time.perf_counter() - began
        if wall < 1e-3:
            return []
        spent = {"decode": self._reader.decode_s / self.config.decode_threads, **self.stages.seconds}
        before = {**before, "decode": before["decode"] / self.config.decode_threads}
        shares = {stage: (seconds - before.get(stage, 0.0)) / wall for stage, seconds in spent.items() if not stage.startswith(("wait", "load"))}
        return [f"busy: {', '.join(f'{stage} {share:.0%}' for stage, share in shares.items() if share >= 0.005)}"]


def counted(rejects: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(rejects.items(), key=lambda item: -item[1]))
