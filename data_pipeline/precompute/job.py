"""One task of `landiff precompute`: clips are decoded, encoded and written at the same time.

Some threads decode ahead, others run the encoders, and one writes, hashes and commits. On a CPU,
there is one encoding thread per core. On a GPU there are two: one copies its batch while the other
runs the encoder. So the slowest stage is always busy; the progress line shows how busy each is.
The content of a unit does not depend on the number of threads.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from landiff.data_pipeline.format.progress import ProgressCallback
from landiff.data_pipeline.format.schema import Manifest, ShardEntry
from landiff.data_pipeline.format.shards import ShardError
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, ClipReader, Piece, Result
from landiff.data_pipeline.precompute.config import PrecomputeConfig, column_groups
from landiff.data_pipeline.precompute.interface import (
    BatchCache,
    BuildProducers,
    CountsTruncated,
    Encode,
    Producer,
    ProducerContext,
    prepare_shard,
)
from landiff.data_pipeline.precompute.summary import (
    ColumnSummary,
    Summary,
    format_reject_counts,
)
from landiff.data_pipeline.precompute.units import ColumnFolder, shards_of_task
from landiff.data_pipeline.precompute.write import UnitWrite, WriterThread

# Before the last shard, a column is judged only on enough clips.
MIN_CLIPS_COLLAPSED = 8  # equal tokens in fewer clips do not prove a collapsed codebook
MIN_CLIPS_REJECTED = 100  # in fewer clips, one reject may already exceed `max_bad_fraction`


class TooManyColumnRejects(ShardError):
    """More clips of a column were rejected than `max_bad_fraction` allows."""


class CollapsedTokens(ShardError):
    """The tokenizer gives almost the same code for everything."""


class OpenShard:
    """A shard in progress: its units and their encoders, by column."""

    def __init__(self, units: dict[str, UnitWrite], encoders: dict[str, Encode]) -> None:
        self.units = units
        self.encoders = encoders
        self.rejects: dict[str, Counter[str]] = {name: Counter() for name in units}

    def truncated(self, name: str) -> int:
        """Clips with a truncated caption in a column, valid after the last batch."""
        encoder = self.encoders[name]
        return encoder.truncated if isinstance(encoder, CountsTruncated) else 0

    def encode_all(self, batch: Sequence[Clip]) -> dict[str, list[Result]]:
        """Encode a batch for every column. Results are by column."""
        cache: BatchCache = {}
        results: dict[str, list[Result]] = {}
        with torch.inference_mode():
            for name, encode in self.encoders.items():
                try:
                    results[name] = encode(batch, cache)
                except Exception as error:
                    clips = ", ".join(clip.key for clip in batch)
                    error.add_note(f"column {name!r}, clips {clips}")
                    raise
        return results


@dataclass(frozen=True)
class EncodingBatch:
    """A batch that is being encoded in the background."""

    shard: OpenShard
    piece: Piece
    results: Future[dict[str, list[Result]]]


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
def limited_torch_threads(context: ProducerContext) -> Iterator[None]:
    """Divide the torch threads of a CPU among the encoding threads."""
    before = torch.get_num_threads()
    if context.device.type == "cpu":
        torch.set_num_threads(max(1, before // context.encode_threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PrecomputeTask:
    """Computes the columns of one task's shards."""

    def __init__(
        self,
        config: PrecomputeConfig,
        manifest: Manifest,
        task: tuple[int, int],
        build: BuildProducers,
        progress: ProgressCallback | None = None,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.build = build
        self.context = ProducerContext.of(config)
        self.timer = self.context.timer
        self.shards = shards_of_task(manifest.shards, task)
        self.folders = {name: ColumnFolder(config.data, name) for name in config.columns}
        self.summaries = {name: ColumnSummary() for name in config.columns}
        self.seen: Counter[str] = Counter()  # clips by column, of units found and computed
        self.done: Counter[str] = Counter()  # clips by column, for the progress line
        self.codes: dict[str, CodeCount] = {}  # by column of tokens, of units computed here
        self._open: list[OpenShard] = []  # shards that are not yet submitted for commit
        self._found: set[tuple[str, int]] = set()  # (column, shard) that were finished before
        self._progress = progress
        self._producers: Mapping[str, Producer] = {}  # of the current group of columns
        self._group_began = time.perf_counter()
        self._group_seconds: dict[str, float] = {}  # seconds by stage when the group began
        self._reader = ClipReader(
            config.data, manifest.shards, decoder=config.decoder, threads=config.decode_threads
        )

    def run(self) -> Summary:
        """Compute all missing units of this task."""
        begin = time.perf_counter()
        try:
            with limited_torch_threads(self.context):
                for names in column_groups(self.config):
                    self._run_columns(names)
        finally:
            self._reader.close()
        return Summary(
            columns=self.summaries,
            stage_seconds=self._seconds_by_stage(),
            cpu_seconds={"decode": self._reader.decode_cpu_s, **self.timer.cpu_seconds},
            wall_s=time.perf_counter() - begin,
        )

    def _run_columns(self, names: Sequence[str]) -> None:
        """Compute one group of columns."""
        if not self.shards:  # then no encoder needs to be loaded
            return
        with self.timer("load encoders"):
            producers = self.build(names, self.context)
        for name, producer in producers.items():
            self.folders[name].remove_leftovers()
            self.folders[name].claim(producer.card, redo=name in self.config.redo)
        self._producers = producers
        left = [shard for shard in self.shards if not self._find_finished(shard)]
        self._group_began = time.perf_counter()
        self._group_seconds = self._seconds_by_stage()
        self._report()
        self._compute(left)
        for name in names:
            self._stop_if_too_many_rejects(name, last=True)

    def _compute(self, left: Sequence[int]) -> None:
        """Decode, encode and write the shards `left`."""
        pool = ThreadPoolExecutor(self.context.encode_threads, thread_name_prefix="encode")
        writer = WriterThread(self.timer)
        shard: OpenShard | None = None
        ahead: deque[EncodingBatch] = deque()
        pieces = self._reader.stream(self._plan(left), self.config.batch_size)
        try:
            for piece in self._timed(pieces):
                if shard is None:
                    shard = self._begin(piece)
                results = pool.submit(shard.encode_all, piece.batch)
                ahead.append(EncodingBatch(shard, piece, results))
                if piece.last:
                    shard = None
                while len(ahead) > self.context.encode_threads:
                    self._hand_over(ahead.popleft(), writer, last=left[-1])
            while ahead:
                self._hand_over(ahead.popleft(), writer, last=left[-1])
            writer.drain()
        finally:
            pool.shutdown(cancel_futures=True)
            writer.close()
            self._give_up_open_shards(sys.exc_info()[1])

    def _give_up_open_shards(self, error: BaseException | None) -> None:
        """Record why the units that are not committed were given up."""
        if error is None:
            error = RuntimeError("its task stopped")
        elif isinstance(error, KeyboardInterrupt):
            error = RuntimeError("its task was interrupted")
        for shard in self._open:
            for unit in shard.units.values():
                unit.give_up(error)

    def _plan(self, left: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """Yield each shard that is still missing, and whether its frames are needed."""
        for shard in left:
            # a duplicate of this task may have finished the shard in the meantime
            if not self._find_finished(shard):
                producers = self._missing_producers(shard)
                yield shard, prepare_shard(producers.values(), self.manifest.shards[shard])

    def _missing_producers(self, shard: int) -> dict[str, Producer]:
        """Producers of the columns of the current group that a shard lacks."""
        missing = {}
        for name, producer in self._producers.items():
            if (name, shard) not in self._found:
                missing[name] = producer
        return missing

    def _begin(self, piece: Piece) -> OpenShard:
        """Create the units and encoders of a shard."""
        entry = self.manifest.shards[piece.shard]
        producers = self._missing_producers(piece.shard)
        units: dict[str, UnitWrite] = {}
        try:
            for name, producer in producers.items():
                units[name] = UnitWrite(self.folders[name], entry, producer.card)
        except BaseException as error:
            for unit in units.values():
                unit.give_up(error)
            raise
        encoders = {
            name: producer.begin(entry, piece.clips) for name, producer in producers.items()
        }
        shard = OpenShard(units, encoders)
        self._open.append(shard)
        return shard

    def _hand_over(self, batch: EncodingBatch, writer: WriterThread, *, last: int) -> None:
        """Wait for an encoded batch and submit it to the writer.

        After the last batch of a shard, its units are submitted for commit. `last` is the last
        shard of this task.
        """
        shard = batch.shard
        piece = batch.piece
        with self.timer("wait for the encoders"):
            results = batch.results.result()
        for name, unit in shard.units.items():
            self._count_results(shard, name, results[name])
            writer.submit(unit.write, piece.batch, results[name])
            self.done[name] += len(piece.batch)
        self._report()
        if not piece.last:
            return
        # The checks come before any commit. So the units are computed again once the cause of
        # the rejects is fixed.
        is_last = piece.shard == last
        for name, unit in shard.units.items():
            unit.truncated = shard.truncated(name)
            self._count_unit(name, unit.entry, shard.rejects[name], unit.truncated, found=False)
            self._stop_if_too_many_rejects(name, last=is_last)
            self._stop_if_collapsed(name, last=is_last)
        for unit in shard.units.values():
            writer.submit(unit.commit)
        self._open.remove(shard)

    def _find_finished(self, shard: int) -> bool:
        """Count the finished units of a shard. Returns whether all of them are finished."""
        entry = self.manifest.shards[shard]
        for name, producer in self._missing_producers(shard).items():
            sidecar = self.folders[name].finished(entry, producer.card.fingerprint, index=False)
            if sidecar is not None:
                self._found.add((name, shard))
                self.done[name] += entry.samples
                reasons = Counter(reject.reason for reject in sidecar.rejects)
                self._count_unit(name, entry, reasons, sidecar.truncated, found=True)
        return not self._missing_producers(shard)

    def _timed(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Yield pieces. Waiting for them is added to the stage "wait for clips"."""
        while True:
            with self.timer("wait for clips"):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _count_unit(
        self, name: str, entry: ShardEntry, rejects: Counter[str], truncated: int, *, found: bool
    ) -> None:
        """Add a unit to the summary of its column."""
        self.seen[name] += entry.samples
        old = self.summaries[name]
        summary = replace(
            old,
            rejects=dict(Counter(old.rejects) + rejects),
            truncated=old.truncated + truncated,
        )
        if found:
            summary = replace(summary, found=old.found + 1)
        else:
            summary = replace(summary, made=old.made + 1, clips=old.clips + entry.samples)
        self.summaries[name] = summary

    def _count_results(self, shard: OpenShard, name: str, results: Sequence[Result]) -> None:
        """Count the rejects and the tokens of a batch."""
        for result in results:
            if isinstance(result, ClipProblem):
                shard.rejects[name][result.reason] += 1
            elif result.dtype == torch.uint16:
                self.codes.setdefault(name, CodeCount()).add(result)

    def _stop_if_collapsed(self, name: str, *, last: bool) -> None:
        """Raise CollapsedTokens before a unit of a collapsed tokenizer is committed."""
        codes = self.codes.get(name)
        if codes is None or codes.clips < (2 if last else MIN_CLIPS_COLLAPSED):
            return
        problem = self._producers[name].collapse(codes.counts)
        if problem:
            raise CollapsedTokens(
                f"column {name!r}, {codes.clips} clips: {problem}. Train the tokenizer again or "
                f"choose another in columns.{name}.tokenizer; the unit is not written"
            )

    def _stop_if_too_many_rejects(self, name: str, *, last: bool) -> None:
        """Raise TooManyColumnRejects if more clips are rejected than the config allows."""
        rejects = self.summaries[name].rejects
        seen = self.seen[name]
        count = sum(rejects.values())
        is_certain = last or seen >= MIN_CLIPS_REJECTED
        if is_certain and count > self.config.max_bad_fraction * seen:
            raise TooManyColumnRejects(
                f"column {name!r}: {count} of {seen} clips were rejected "
                f"({format_reject_counts(rejects)}), more than max_bad_fraction = "
                f"{self.config.max_bad_fraction:g}. Fix the cause, or raise max_bad_fraction, and "
                "run the same command again; finished shards are kept"
            )

    def _report(self) -> None:
        """Report progress in clips, averaged over the columns of the group."""
        if self._progress is None:
            return
        names = list(self._producers)
        total = sum(self.manifest.shards[shard].samples for shard in self.shards)
        done = sum(self.done[name] for name in names) // len(names)
        what = f"clips ({', '.join(names)})"
        busy = self._busy()
        if busy is not None:
            what += f"; busy: {busy}"
        self._progress(done, total, what)

    def _busy(self) -> str | None:
        """How busy the threads of each stage were since the group of columns began.

        None right after the beginning.
        """
        wall = time.perf_counter() - self._group_began
        if wall < 1e-3:
            return None
        threads = {"decode": self.config.decode_threads, "write": 1}
        parts = []
        for stage, seconds in self._seconds_by_stage().items():
            if stage.startswith(("wait", "load")):
                continue
            spent = seconds - self._group_seconds.get(stage, 0.0)
            fraction = spent / wall / threads.get(stage, self.context.running_encoders)
            if fraction >= 0.005:
                parts.append(f"{stage} {fraction:.0%}")
        return ", ".join(parts)

    def _seconds_by_stage(self) -> dict[str, float]:
        """Wall-clock seconds of all stages so far, decoding included."""
        return {"decode": self._reader.decode_s, **self.timer.seconds}
