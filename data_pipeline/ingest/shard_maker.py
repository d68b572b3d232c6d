"""Makes the shards of a plan: decodes, filters and encodes their clips, in several threads.

Each shard is made by one thread. Rejects are counted while shards are made, so that too many
damaged clips stop a job early.
"""

from __future__ import annotations

import hashlib
import queue
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from threading import Event

from landiff.data_pipeline.format.progress import ProgressCallback
from landiff.data_pipeline.format.schema import RAW, RawSample, Reject, Sidecar
from landiff.data_pipeline.format.shards import ShardError, ShardWriter, read_sidecar, sidecar_path
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.filters import FILTERED, Filters
from landiff.data_pipeline.ingest.plan.planned_shard import HARMLESS, STAGE, PlannedShard, Span
from landiff.data_pipeline.ingest.plan.shard_plan import PlanEntry, ShardPlan
from landiff.data_pipeline.ingest.quarantine import Quarantine
from landiff.data_pipeline.ingest.sources.entries import Tally, printable
from landiff.data_pipeline.ingest.sources.text_files import TEXT_REASONS
from landiff.data_pipeline.video.codec import (
    DecodedSpan,
    DecodeFailure,
    SafeDecoder,
    Wanted,
    encode_clip,
)
from landiff.data_pipeline.video.motion import Motion, motion

BYTES_PER_REQUEST = 256 << 20  # of decoded frames: bounds the memory that a long video takes
MIN_CLIPS_TO_STOP = 20  # with fewer clips, a few damaged ones say nothing about the rest
REASONS_SHOWN = 4
MAX_EXAMPLE = 200  # characters of a rejected clip's name and detail in a message
POLL_S = 0.2

DecoderQueue = queue.SimpleQueue[SafeDecoder]
# One item per finished clip: its reject, or None if it became a sample.
ClipQueue = queue.SimpleQueue[Reject | None]


class TooManyRejectedClips(ShardError):
    """More clips are damaged than `max_bad_fraction` allows."""


@dataclass(frozen=True)
class ShardTaskSummary:
    """What one task of `landiff shards` has done."""

    made: int  # shards
    present: int  # shards of this task that existed before
    planned: int  # shards of all tasks
    rejected: Tally = field(default_factory=Tally)  # clips of this task's shards, by reason
    ignored: Tally = field(default_factory=Tally)  # files of the source that no clip uses

    @property
    def reject_counts(self) -> dict[str, int]:
        """Number of rejected clips by reason, sorted by reason."""
        return dict(sorted(self.rejected.counts.items()))


@dataclass
class _TaskCounts:
    """Clips of one task, counted while its shards are made."""

    spans: int  # in the planned shards of the task
    clips: int  # spans, and rejects of the plan
    done: int = 0  # spans that became samples or were rejected
    damaged: int = 0
    rejected: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class _OpenShard:
    """A shard that is being written."""

    planned: PlannedShard
    writer: ShardWriter
    quarantine: Quarantine


@dataclass(frozen=True)
class ShardMaker:
    """Makes the shards of a plan in several threads."""

    config: ShardsConfig
    data: Path
    plan: ShardPlan
    filters: Filters
    decoders: DecoderQueue
    pool: ThreadPoolExecutor

    def make(self, entries: list[PlanEntry], progress: ProgressCallback | None) -> ShardTaskSummary:
        """Make those of the planned shards that do not exist.

        `progress` is called with numbers of clips. Raises ShardError, TooManyRejectedClips and
        OSError.
        """
        counts = _TaskCounts(
            spans=sum(entry.spans for entry in entries),
            clips=sum(entry.spans + entry.rejects for entry in entries),
        )
        missing = []
        for entry in entries:
            sidecar = finished_sidecar(self.data / RAW, entry)
            if sidecar is None:
                missing.append(entry)
                counts.damaged += entry.damaged
            else:
                counts.done += entry.spans
                counts.damaged += count_damaged(sidecar.rejects)
                add_rejects(counts.rejected, sidecar.rejects)
        self._make_missing(missing, counts, progress)
        return ShardTaskSummary(
            made=len(missing),
            present=len(entries) - len(missing),
            planned=len(self.plan.entries),
            rejected=counts.rejected,
        )

    def _make_missing(
        self, missing: list[PlanEntry], counts: _TaskCounts, progress: ProgressCallback | None
    ) -> None:
        """Make shards in the thread pool, and update `counts` with each clip."""
        waiting = deque(missing)
        running: set[Future[list[Reject]]] = set()
        clips: ClipQueue = queue.SimpleQueue()
        stop = Event()
        if progress and counts.spans:
            progress(counts.done, counts.spans, _progress_text(counts.rejected.counts))
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self.config.job.workers:
                    entry = waiting.popleft()
                    running.add(self.pool.submit(self._make_shard, entry, clips, stop))
                finished, running = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                for future in finished:
                    add_rejects(counts.rejected, future.result())
                done_before = counts.done
                _count_clips(clips, counts)
                check_damaged(self.config, counts.damaged, counts.clips, counts.rejected)
                if progress and counts.done > done_before:
                    progress(counts.done, counts.spans, _progress_text(counts.rejected.counts))
        finally:
            stop.set()
            for future in running:
                future.cancel()

    def _make_shard(self, entry: PlanEntry, clips: ClipQueue, stop: Event) -> list[Reject]:
        """Make one shard. Returns the rejects of the plan; those of clips go to `clips`."""
        planned = self.plan.read_shard(entry)
        # the quarantine is closed, and so written, before the shard is committed
        with (
            ShardWriter(
                self.data / RAW,
                planned.name,
                fingerprint=entry.fingerprint,
                bucket=planned.bucket,
            ) as writer,
            Quarantine(
                self.data, planned.name, entry.fingerprint, self.config.quarantine
            ) as quarantine,
            borrow_decoder(self.decoders) as decoder,
        ):
            shard = _OpenShard(planned, writer, quarantine)
            for rejected in planned.rejects:
                writer.rejects.append(rejected.reject)
                if rejected.is_damaged and rejected.reject.reason not in TEXT_REASONS:
                    quarantine.keep_source(rejected.reject, rejected.video)
            for span, decoded in _decode_spans(self.config, planned, decoder):
                if stop.is_set():
                    raise InterruptedError(
                        f"shard {planned.name} was left unfinished, because another one failed"
                    )
                clips.put(self._add_clip(shard, span, decoded))
                del decoded  # so that the next frames can take its memory
        return [rejected.reject for rejected in planned.rejects]

    def _add_clip(
        self, shard: _OpenShard, span: Span, decoded: DecodedSpan | DecodeFailure
    ) -> Reject | None:
        """Add one sample to a shard, or its reject, which is returned."""
        writer = shard.writer
        if isinstance(decoded, DecodeFailure):
            detail = _reject_detail(span, decoded)
            writer.reject(span.key, STAGE, decoded.reason, detail)
            shard.quarantine.keep_source(writer.rejects[-1], span.video)
            return writer.rejects[-1]
        failure = self._write_sample(shard, span, decoded)
        if failure is None:
            return None
        writer.reject(span.key, STAGE, failure.reason, _reject_detail(span, failure))
        return writer.rejects[-1]

    def _write_sample(
        self, shard: _OpenShard, span: Span, decoded: DecodedSpan
    ) -> DecodeFailure | None:
        """Encode and write one sample, unless a filter rejects it; returns why it did."""
        config = self.config
        clip_motion = motion(decoded.frames, config.fps)
        failure = self.filters.refuse(decoded.frames, clip_motion)
        if failure and not config.quarantine.filtered:
            return failure
        clip = encode_clip(
            decoded.frames, config.fps, crf=config.encoding.crf, preset=config.encoding.preset
        )
        if failure:
            detail = _reject_detail(span, failure)
            shard.quarantine.keep_clip(span.key, failure.reason, "mp4", clip, detail=detail)
        else:
            metadata = _sample_json(
                config,
                shard.planned,
                span,
                clip_motion=clip_motion,
                clip=clip,
                conversions=decoded.conversions,
            )
            shard.writer.add(span.key, {"mp4": clip, "json": metadata})
        return failure


def _count_clips(clips: ClipQueue, counts: _TaskCounts) -> None:
    """Move the finished clips from the queue to the counts."""
    while not clips.empty():
        counts.done += 1
        reject = clips.get()
        if reject is not None:
            add_rejects(counts.rejected, [reject])
            counts.damaged += count_damaged([reject])


def _decode_spans(
    config: ShardsConfig, planned: PlannedShard, decoder: SafeDecoder
) -> Iterator[tuple[Span, DecodedSpan | DecodeFailure]]:
    """Every span with its frames, in order.

    Consecutive spans of one video are decoded with one request, up to `BYTES_PER_REQUEST`.
    """
    shape = planned.shape
    bytes_per_span = shape.num_frames * shape.height * shape.width * 3
    spans_per_request = max(1, BYTES_PER_REQUEST // bytes_per_span)
    for (video, crop), group in groupby(planned.spans, key=lambda span: (span.video, span.crop)):
        spans = list(group)
        wanted = Wanted(shape.num_frames, config.fps, shape.height, shape.width, crop)
        for index in range(0, len(spans), spans_per_request):
            part = spans[index : index + spans_per_request]
            decoded = decoder.decode_spans(video, [span.start_s for span in part], wanted)
            yield from zip(part, decoded, strict=True)


def _sample_json(
    config: ShardsConfig,
    planned: PlannedShard,
    span: Span,
    *,
    clip_motion: Motion,
    clip: bytes,
    conversions: tuple[str, ...],
) -> bytes:
    """The JSON part of a sample."""
    shape = planned.shape
    sample = RawSample(
        key=span.key,
        caption=span.caption,
        more_captions=span.more_captions,
        source=span.source,
        source_sha256=span.source_sha256,
        start_s=span.start_s,
        fps=config.fps,
        num_frames=shape.num_frames,
        height=shape.height,
        width=shape.width,
        motion_score=clip_motion.mean,
        motion_p95=clip_motion.p95,
        motion_residual=clip_motion.residual,
        motion_camera=clip_motion.camera,
        cuts=clip_motion.cuts,
        video_sha256=hashlib.sha256(clip).hexdigest(),
        conversions=conversions,
    )
    # Without conversions the bytes equal those of versions that had none.
    absent = set() if conversions else {"conversions"}
    return sample.model_dump_json(exclude=absent).encode()


# ----------------------------------------------------------------------------------------- rejects


def _reject_detail(span: Span, failure: DecodeFailure) -> str:
    return f"{span.source} at {span.start_s:g} s: {failure.detail}"


def _progress_text(reject_counts: Counter[str]) -> str:
    """Text of the progress line: the most frequent reasons of rejects."""
    if not reject_counts:
        return "clips"
    by_count = sorted(reject_counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {reason}" for reason, count in by_count[:REASONS_SHOWN]]
    if len(by_count) > REASONS_SHOWN:
        shown.append("...")
    return f"clips; rejected: {', '.join(shown)}"


def count_damaged(rejects: Iterable[Reject]) -> int:
    """Number of rejects that count towards `max_bad_fraction`: damaged, not merely unsuitable."""
    return sum(reject.reason not in HARMLESS | FILTERED for reject in rejects)


def add_rejects(tally: Tally, rejects: Iterable[Reject]) -> None:
    """Count rejects by reason, with name and detail of the first few."""
    for reject in rejects:
        example = printable(reject.key)
        if reject.detail:
            example = f"{example}: {printable(reject.detail)}"[:MAX_EXAMPLE]
        tally.add(reject.reason, example)


def tally_rejects(rejects: Iterable[Reject]) -> Tally:
    """Number of rejects by reason, with name and detail of the first few."""
    tally = Tally()
    add_rejects(tally, rejects)
    return tally


def check_damaged(
    config: ShardsConfig,
    damaged: int,
    clips: int,
    rejected: Tally | None = None,
    *,
    is_final: bool = False,
) -> None:
    """Raise TooManyRejectedClips if more clips are damaged than the config allows.

    Args:
        config: `max_bad_fraction` is the limit.
        damaged: Number of damaged clips.
        clips: Number of all clips.
        rejected: Rejects to name in the message.
        is_final: Check also if there are fewer than `MIN_CLIPS_TO_STOP` clips.
    """
    if damaged <= config.max_bad_fraction * clips:
        return
    if clips < MIN_CLIPS_TO_STOP and not is_final:
        return
    counts = f". Rejected: {rejected}" if rejected else ""
    raise TooManyRejectedClips(
        f"{damaged} of {clips} clips of {config.source!r} are damaged, "
        f"more than max_bad_fraction = {config.max_bad_fraction:g}. Fix the cause, or raise "
        f"max_bad_fraction, and run again; finished shards are kept{counts}"
    )


# ------------------------------------------------------------------------------------------ shards


def finished_sidecar(raw: Path, entry: PlanEntry) -> Sidecar | None:
    """The sidecar of a planned shard, None if the shard is not finished.

    Raises ShardError if the shard belongs to another plan.
    """
    tar = raw / f"{entry.name}.tar"
    sidecar = read_sidecar(tar)
    if sidecar is not None and sidecar.fingerprint != entry.fingerprint:
        raise foreign_shard_error(tar)
    return sidecar


def foreign_shard_error(tar: Path) -> ShardError:
    """The error for a shard that belongs to another plan."""
    return ShardError(
        f"{tar} was made from other videos or captions than the source holds now, or before HDR "
        "and interlaced video were converted; restore them, use another output folder, or delete "
        f"{tar} and {sidecar_path(tar)} to make the shard again (its columns become stale)"
    )


# ---------------------------------------------------------------------------------------- decoders


@contextmanager
def open_decoders(config: ShardsConfig) -> Iterator[DecoderQueue]:
    """A queue with one decoder for each worker."""
    idle: DecoderQueue = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(config.job.workers):
            decoder = SafeDecoder(
                timeout_s=config.job.timeout_s,
                memory_limit=config.job.memory_limit_mb << 20,
                max_pixels=config.max_pixels,
                hdr=config.video.hdr,
                interlaced=config.video.interlaced,
            )
            idle.put(stack.enter_context(decoder))
        yield idle


@contextmanager
def borrow_decoder(decoders: DecoderQueue) -> Iterator[SafeDecoder]:
    """Take a decoder from the queue, without its state, and put it back afterwards."""
    decoder = decoders.get()
    try:
        decoder.begin()
        yield decoder
    finally:
        decoders.put(decoder)
