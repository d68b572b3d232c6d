"""One task of `landiff precompute`: clips decoded, encoded and written at the same time.

Threads decode ahead, others run the encoders (one on a GPU, one a core on a CPU), another one writes, hashes and
commits: whatever is slowest is always busy, and the progress line says how busy each is. What a unit holds does
not depend on how many threads there are.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from landiff.data_pipeline.format.schema import Manifest, ShardEntry
from landiff.data_pipeline.format.shards import ShardError
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, ClipReader, Piece, Result
from landiff.data_pipeline.precompute.config import PrecomputeConfig, TextColumn
from landiff.data_pipeline.precompute.units import ColumnCard, ColumnFolder, share
from landiff.data_pipeline.precompute.write import ColumnUnit, Stages, WriterThread
from landiff.model_zoo.device import pick_device

ProgressCallback = Callable[
    [int, int, str], None
]  # (clips done, clips of this task, which columns go through together)
FEW = 8  # clips; of fewer, equal tokens are no sign of a collapsed codebook before the end
SMALL = 100  # clips; of fewer, one bad clip is no fraction to stop for before the end
MOST_ENCODE_THREADS = 8  # on a CPU, unless the config says otherwise; each holds a batch of frames


class TooManyColumnRejects(ShardError):
    """More clips were set aside than `max_bad_fraction` allows."""


class CollapsedTokens(ShardError):
    """The tokenizer gives one code for everything."""


@dataclass(frozen=True)
class ColumnSummary:
    made: int = 0  # units of this run
    found: int = 0  # units that were finished before
    clips: int = 0  # of this run, those set aside included
    rejects: dict[str, int] = field(default_factory=dict)  # reason -> clips, of both
    truncated: int = 0  # clips of both whose text is longer than the encoder takes


@dataclass(frozen=True)
class Summary:
    """What one task did."""

    columns: dict[str, ColumnSummary]
    stage_seconds: dict[str, float]  # each of all its threads together
    cpu_seconds: dict[str, float]  # the same of processor time, that of decoder processes included
    wall_s: float

    def __str__(self) -> str:
        parts = []
        for name, column in self.columns.items():
            bad = (
                f", {sum(column.rejects.values())} set aside ({format_reject_counts(column.rejects)})"
                if column.rejects
                else ""
            )
            cut = ""
            if column.truncated:
                cut = f", {column.truncated} captions cut to the encoder's length"
            made = f"{column.clips} clips in {column.made} shards, {column.found} shards were done"
            parts.append(f"{name}: {made}{bad}{cut}")
        stages = ", ".join(
            f"{stage} {seconds:.1f}" for stage, seconds in self.stage_seconds.items()
        )
        return (
            "; ".join(parts)
            + f"; {self.wall_s:.1f} s"
            + (f" (seconds by stage: {stages})" if stages else "")
        )


Encode = Callable[
    [Sequence[Clip]], list[Result]
]  # a batch of one shard's clips -> their tensors; from several threads


class Producer(Protocol):
    """Clips -> tensors of one column."""

    card: ColumnCard

    def needs_frames(self, entry: ShardEntry) -> bool:
        """Asked ahead, in the order of `begin`."""
        ...

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        """What encodes this shard. Its batches begin in order; a batch may end before another that began earlier."""
        ...

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """What `landiff precompute verify` wants to know of a stored tensor; "bad_values" above 0 is a fault."""
        ...

    def collapse(self, counts: np.ndarray) -> str:
        """What is wrong with a histogram of the column's codes, "" for nothing and for other columns."""
        ...


@dataclass(frozen=True)
class Bench:
    """What producers work with."""

    config: PrecomputeConfig
    device: torch.device
    stages: Stages
    encode_threads: int  # batches that are encoded at the same time

    @classmethod
    def of(cls, config: PrecomputeConfig) -> Bench:
        device = pick_device(config.device)
        # a GPU does one batch after another; of a CPU each gets one of the cores that torch would take for one
        threads = min(torch.get_num_threads(), MOST_ENCODE_THREADS) if device.type == "cpu" else 1
        return cls(config, device, Stages(), config.encode_threads or threads)

    def stack(self, videos: list[np.ndarray]) -> Tensor:
        """uint8 [B, T, H, W, 3] on the device."""
        return torch.from_numpy(np.stack(videos)).to(self.device)


Build = Callable[[Sequence[str], Bench], dict[str, Producer]]


def column_groups(config: PrecomputeConfig) -> list[list[str]]:
    """Columns that go through together: each text column alone, so that one big encoder is in memory at a time;
    those that need frames at once, so that each clip is decoded once."""
    texts = [[name] for name, column in config.columns.items() if isinstance(column, TextColumn)]
    with_frames = [
        name for name, column in config.columns.items() if not isinstance(column, TextColumn)
    ]
    return [*texts, with_frames] if with_frames else texts


class OpenShard:
    """A shard whose clips are on their way: its units, and what encodes them."""

    def __init__(self, units: dict[str, ColumnUnit], encoders: dict[str, Encode]) -> None:
        self.units, self.encoders = units, encoders
        self.rejects: dict[str, Counter[str]] = {name: Counter() for name in units}

    def truncated(self, name: str) -> int:
        """Clips whose caption was cut in column `name`; after the last batch. 0 for other columns."""
        return getattr(self.encoders[name], "truncated", 0)

    def encode_all(self, batch: Sequence[Clip]) -> dict[str, list[Result]]:
        with torch.inference_mode():
            return {name: encode(batch) for name, encode in self.encoders.items()}


class CodeCount:
    """Histogram of a column's tokens."""

    def __init__(self) -> None:
        self.clips = 0
        self.counts = np.zeros(1 << 16, np.int64)

    def add(self, codes: Tensor) -> None:
        """Count the codes of one clip, uint16 [N]."""
        self.clips += 1
        self.counts += np.bincount(codes.numpy(), minlength=len(self.counts))


@contextmanager
def threads_of_torch(bench: Bench) -> Iterator[None]:
    """Share the cores among the threads that encode."""
    before = torch.get_num_threads()
    if bench.device.type == "cpu":
        torch.set_num_threads(max(1, before // bench.encode_threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PrecomputeJob:
    """One task's run over its shards."""

    def __init__(
        self,
        config: PrecomputeConfig,
        manifest: Manifest,
        task: tuple[int, int],
        build: Build,
        progress: ProgressCallback | None = None,
    ) -> None:
        self.config, self.manifest, self.build = config, manifest, build
        self.bench = Bench.of(config)
        self.stages = self.bench.stages
        self.shards = share(manifest.shards, task)
        self.folders = {name: ColumnFolder(config.data, name) for name in config.columns}
        self.summaries = {name: ColumnSummary() for name in config.columns}
        self.seen: Counter[str] = (
            Counter()
        )  # clips by column, those of units found finished included
        self.done: Counter[str] = Counter()  # clips by column, for the progress line
        self.codes: dict[str, CodeCount] = {}  # of the columns of tokens, of units made here
        self._open: list[OpenShard] = []  # begun, not yet handed over to be committed
        self._found: set[tuple[str, int]] = set()  # (column, shard) that were finished before
        self._progress = progress
        self._names: Sequence[str] = ()  # columns that go through now
        self._producers: Mapping[str, Producer] = {}  # of these columns
        self._began = (time.perf_counter(), {"decode": 0.0})  # of the columns that go through now
        self._reader = ClipReader(
            config.data, manifest.shards, decoder=config.decoder, threads=config.decode_threads
        )

    def run(self) -> Summary:
        begin = time.perf_counter()
        try:
            with threads_of_torch(self.bench):
                for names in column_groups(self.config):
                    self._run_columns(names)
        finally:
            self._reader.close()
        return Summary(
            self.summaries,
            {"decode": self._reader.decode_s, **self.stages.seconds},
            {"decode": self._reader.decode_cpu_s, **self.stages.cpu_seconds},
            time.perf_counter() - begin,
        )

    def _run_columns(self, names: Sequence[str]) -> None:
        if not self.shards:  # no reason to load an encoder
            return
        self._names = names
        with self.stages("load encoders"):
            producers = self.build(names, self.bench)
        for name, producer in producers.items():
            self.folders[name].remove_leftovers()
            self.folders[name].claim(producer.card, redo=name in self.config.redo)
        self._producers = producers
        left = [shard for shard in self.shards if not self._find_finished(shard, producers)]
        self._began = (
            time.perf_counter(),
            {"decode": self._reader.decode_s, **self.stages.seconds},
        )
        self._report()
        self._make(left, producers)
        for name in names:
            self._stop_if_too_many(name, last=True)

    def _make(self, left: Sequence[int], producers: Mapping[str, Producer]) -> None:
        """Decode, encode and write the shards `left`."""
        encoders = ThreadPoolExecutor(self.bench.encode_threads, thread_name_prefix="encode")
        writer = WriterThread(self.stages)
        shard: OpenShard | None = None
        ahead: deque[tuple[OpenShard, Piece, Future[dict[str, list[Result]]]]] = deque()
        try:
            for piece in self._timed(
                self._reader.stream(self._plan(left, producers), self.config.batch_size)
            ):
                if shard is None:
                    shard = self._begin(piece, producers)
                ahead.append((shard, piece, encoders.submit(shard.encode_all, piece.batch)))
                if piece.last:
                    shard = None
                while len(ahead) > self.bench.encode_threads:
                    self._hand_over(*ahead.popleft(), writer, last=left[-1])
            while ahead:
                self._hand_over(*ahead.popleft(), writer, last=left[-1])
            writer.drain()
        finally:
            encoders.shutdown(cancel_futures=True)
            writer.close()
            error = sys.exc_info()[1]
            if isinstance(error, KeyboardInterrupt):
                error = RuntimeError("its task was told to stop")
            for shard in self._open:
                for unit in shard.units.values():
                    unit.give_up(error or RuntimeError("its task stopped"))

    def _plan(
        self, left: Sequence[int], producers: Mapping[str, Producer]
    ) -> Iterator[tuple[int, bool]]:
        for shard in left:
            if not self._find_finished(shard, producers):  # a twin of this task was faster
                entry = self.manifest.shards[shard]
                yield (
                    shard,
                    any(
                        [
                            producer.needs_frames(entry)
                            for name, producer in producers.items()
                            if (name, shard) not in self._found
                        ]
                    ),
                )

    def _begin(self, piece: Piece, producers: Mapping[str, Producer]) -> OpenShard:
        entry = self.manifest.shards[piece.shard]
        wanted = {
            name: producer
            for name, producer in producers.items()
            if (name, piece.shard) not in self._found
        }
        units: dict[str, ColumnUnit] = {}
        try:
            for name, producer in wanted.items():
                units[name] = ColumnUnit(self.folders[name], entry, producer.card)
        except BaseException as error:
            for unit in units.values():
                unit.give_up(error)
            raise
        shard = OpenShard(
            units, {name: producer.begin(entry, piece.clips) for name, producer in wanted.items()}
        )
        self._open.append(shard)
        return shard

    def _hand_over(
        self,
        shard: OpenShard,
        piece: Piece,
        encoded: Future[dict[str, list[Result]]],
        writer: WriterThread,
        *,
        last: int,
    ) -> None:
        """What was encoded to the writer; with the last batch of a shard, its units to be committed."""
        with self.stages("wait for the encoders"):
            results = encoded.result()
        for name, unit in shard.units.items():
            shard.rejects[name].update(
                result.reason for result in results[name] if isinstance(result, ClipProblem)
            )
            self._count_codes(name, results[name])
            writer.submit(unit.write, piece.batch, results[name])
            self.done[name] += len(piece.batch)
        self._report()
        if piece.last:
            # before units are committed, so that they are made again when the cause of too many rejects is mended
            for name, unit in shard.units.items():
                unit.truncated = shard.truncated(name)
                clips = unit.entry.samples
                self._count(name, shard.rejects[name], clips, made=1, truncated=unit.truncated)
                self._stop_if_too_many(name, last=piece.shard == last)
                self._stop_if_collapsed(name, last=piece.shard == last)
            for unit in shard.units.values():
                writer.submit(unit.commit)
            self._open.remove(shard)

    def _find_finished(self, shard: int, producers: Mapping[str, Producer]) -> bool:
        """Count the shard's units that are finished; True if they all are."""
        entry = self.manifest.shards[shard]
        for name, producer in producers.items():
            if (name, shard) in self._found:
                continue
            sidecar = self.folders[name].finished(entry, producer.card.fingerprint, index=False)
            if sidecar is not None:
                self._found.add((name, shard))
                self.done[name] += entry.samples
                reasons = Counter(r.reason for r in sidecar.rejects)
                self._count(name, reasons, entry.samples, found=1, truncated=sidecar.truncated)
        return all((name, shard) in self._found for name in producers)

    def _timed(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        while True:
            with self.stages("wait for clips"):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _count(
        self,
        name: str,
        rejects: Counter[str],
        clips: int,
        *,
        made: int = 0,
        found: int = 0,
        truncated: int = 0,
    ) -> None:
        old = self.summaries[name]
        self.seen[name] += clips
        self.summaries[name] = ColumnSummary(
            made=old.made + made,
            found=old.found + found,
            clips=old.clips + (clips if made else 0),
            rejects=dict(Counter(old.rejects) + rejects),
            truncated=old.truncated + truncated,
        )

    def _count_codes(self, name: str, results: Sequence[Result]) -> None:
        for result in results:
            if isinstance(result, Tensor) and result.dtype == torch.uint16:
                self.codes.setdefault(name, CodeCount()).add(result)

    def _stop_if_collapsed(self, name: str, *, last: bool) -> None:
        """Raise CollapsedTokens before the unit is committed."""
        codes = self.codes.get(name)
        if codes is None or codes.clips < (2 if last else FEW):
            return
        problem = self._producers[name].collapse(codes.counts)
        if problem:
            raise CollapsedTokens(
                f"column {name!r}, {codes.clips} clips: {problem}. Train the tokenizer anew or choose "
                f"another in columns.{name}.tokenizer; the unit is not written"
            )

    def _stop_if_too_many(self, name: str, *, last: bool) -> None:
        rejects, seen = self.summaries[name].rejects, self.seen[name]
        bad = sum(rejects.values())
        if bad > self.config.max_bad_fraction * seen and (last or seen >= SMALL):
            raise TooManyColumnRejects(
                f"column {name!r}: {bad} of {seen} clips were set aside ({format_reject_counts(rejects)}), more than max_bad_fraction = "
                f"{self.config.max_bad_fraction:g}. Mend the cause, or raise max_bad_fraction, and run again; finished shards stay"
            )

    def _report(self) -> None:
        if self._progress is not None:
            total = sum(self.manifest.shards[s].samples for s in self.shards)
            note = f"clips ({', '.join(self._names)})"
            self._progress(
                sum(self.done[name] for name in self._names) // len(self._names),
                total,
                "; ".join([note, *self._busy()]),
            )

    def _busy(self) -> list[str]:
        """How busy the threads of each stage were since these columns began."""
        began, before = self._began
        wall = time.perf_counter() - began
        if wall < 1e-3:
            return []
        threads = {"decode": self.config.decode_threads, "write": 1}
        spent = {"decode": self._reader.decode_s, **self.stages.seconds}
        shares = {
            stage: (seconds - before.get(stage, 0.0))
            / wall
            / threads.get(stage, self.bench.encode_threads)
            for stage, seconds in spent.items()
            if not stage.startswith(("wait", "load"))
        }
        return [
            f"busy: {', '.join(f'{stage} {share:.0%}' for stage, share in shares.items() if share >= 0.005)}"
        ]


def format_reject_counts(rejects: Mapping[str, int]) -> str:
    return ", ".join(
        f"{reason} {count}" for reason, count in sorted(rejects.items(), key=lambda item: -item[1])
    )
