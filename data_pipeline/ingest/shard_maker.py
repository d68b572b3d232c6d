"""Makes the shards of a plan: decodes, filters and encodes their clips, in several threads.

One shard is one unit of work. What becomes of a clip is known on screen while it is made.
"""

from __future__ import annotations

import hashlib
import queue
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from threading import Event

from landiff.data_pipeline.format.schema import RAW, RawSample, Reject, Sidecar
from landiff.data_pipeline.format.shards import ShardError, ShardWriter, read_sidecar, sidecar_path
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.filters import FILTERED, Filters
from landiff.data_pipeline.ingest.plan.planned_shard import HARMLESS, STAGE, PlannedShard, Span
from landiff.data_pipeline.ingest.plan.shard_plan import Line, ShardPlan
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

BYTES_PER_REQUEST = 256 << 20  # of decoded frames, so that a long video doesn't fill the memory
FEW = 20  # clips: of fewer, one bad one says nothing about the rest
REASONS_ON_SCREEN = 4
MAX_EXAMPLE = 200  # characters of a rejected clip's name and detail in a message

ProgressCallback = Callable[[int, int, str], None]  # (clips done, clips in all, what is being done)


class TooManyRejectedClips(ShardError):
    """More clips are damaged than `max_bad_fraction` allows."""


@dataclass(frozen=True)
class TaskPart:
    """What one task has done."""

    made: int  # shards
    there: int  # shards that were there before
    planned: int  # shards of all tasks
    set_aside: dict[str, int]  # reason -> clips, of the shards of this task
    rejected: Tally = field(default_factory=Tally)  # the same, with the first of each reason
    ignored: Tally = field(default_factory=Tally)  # files of the source that no clip uses


@dataclass(frozen=True)
class Maker:
    """Makes units of a plan in several threads."""

    config: ShardsConfig
    data: Path
    plan: ShardPlan
    filters: Filters
    decoders: queue.SimpleQueue
    pool: ThreadPoolExecutor

    def make(self, lines: list[Line], progress: ProgressCallback | None) -> TaskPart:
        """Make those of `lines` that aren't there. Raises ShardError, TooManyRejectedClips, OSError."""
        todo, rejected, bad = [], Tally(), 0
        for line in lines:
            sidecar = sidecar_of(self.data / RAW, line)
            if sidecar is None:
                todo.append(line)
                bad += line.bad
            else:
                for reject in sidecar.rejects:
                    rejected.add(*_named(reject))
                bad += count_bad(sidecar.rejects)
        total, seen = (
            sum(line.spans for line in lines),
            sum(line.spans + line.aside for line in lines),
        )
        done = total - sum(line.spans for line in todo)
        clips: queue.SimpleQueue[Reject | None] = (
            queue.SimpleQueue()
        )  # of each that is done why it was rejected
        waiting, running, stop = iter(todo), set(), Event()
        try:
            if progress and total:
                progress(done, total, _note(rejected.counts))
            while running := running | {
                self._submit(line, clips, stop)
                for line in islice(waiting, 2 * self.config.job.workers - len(running))
            }:
                finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    for reject in future.result():
                        rejected.add(*_named(reject))
                before = done
                while not clips.empty():
                    done += 1
                    reject = clips.get()
                    if reject is not None:
                        rejected.add(*_named(reject))
                        bad += count_bad([reject])
                check_bad(self.config, bad, seen, rejected)
                if progress and done > before:
                    progress(done, total, _note(rejected.counts))
        finally:
            stop.set()
            for future in running:
                future.cancel()
        return TaskPart(
            made=len(todo),
            there=len(lines) - len(todo),
            planned=len(self.plan.lines),
            set_aside=dict(sorted(rejected.counts.items())),
            rejected=rejected,
        )

    def _submit(self, line: Line, clips: queue.SimpleQueue, stop: Event) -> Future:
        return self.pool.submit(self._make_shard, line, clips, stop)

    def _make_shard(self, line: Line, clips: queue.SimpleQueue, stop: Event) -> list[Reject]:
        """-> what the plan rejected."""
        unit, raw = self.plan.unit(line), self.data / RAW
        # the quarantine is left, and written, before the shard is committed
        with (
            ShardWriter(raw, unit.name, fingerprint=line.fingerprint, bucket=unit.bucket) as writer,
            Quarantine(
                self.data, unit.name, line.fingerprint, self.config.quarantine
            ) as quarantine,
            borrowed(self.decoders) as decoder,
        ):
            for aside in unit.aside:
                writer.rejects.append(aside.reject)
                if aside.is_bad and aside.reject.reason not in TEXT_REASONS:
                    quarantine.keep_source(aside.reject, aside.video)
            for span, decoded in _decoded(self.config, unit, decoder):
                if stop.is_set():
                    raise InterruptedError(
                        f"shard {unit.name} was left unfinished, because another one failed"
                    )
                if isinstance(decoded, DecodeFailure):
                    failure = decoded
                else:
                    failure = self._add(writer, quarantine, unit, span, decoded)
                if failure:
                    writer.reject(
                        span.key,
                        STAGE,
                        failure.reason,
                        f"{span.source} at {span.start_s:g} s: {failure.detail}",
                    )
                    if failure is decoded:
                        quarantine.keep_source(writer.rejects[-1], span.video)
                clips.put(writer.rejects[-1] if failure else None)
                del decoded  # the next ones take their memory
        return [aside.reject for aside in unit.aside]

    def _add(
        self,
        writer: ShardWriter,
        quarantine: Quarantine,
        unit: PlannedShard,
        span: Span,
        decoded: DecodedSpan,
    ) -> DecodeFailure | None:
        """Write one sample, unless a filter refuses it."""
        frames = decoded.frames
        moving = motion(frames, self.config.fps)
        failure = self.filters.refuse(frames, moving)
        if failure and not self.config.quarantine.filtered:
            return failure
        clip = encode_clip(
            frames,
            self.config.fps,
            crf=self.config.encoding.crf,
            preset=self.config.encoding.preset,
        )
        if failure:
            quarantine.keep(
                span.key,
                failure.reason,
                "mp4",
                clip,
                f"{span.source} at {span.start_s:g} s: {failure.detail}",
            )
        else:
            meta = _meta(self.config, unit, span, moving, clip, decoded.conversions)
            writer.add(span.key, {"mp4": clip, "json": meta})
        return failure


def _decoded(
    config: ShardsConfig, unit: PlannedShard, decoder: SafeDecoder
) -> Iterator[tuple[Span, DecodedSpan | DecodeFailure]]:
    """Every span with its frames, in order; neighbours of one video are decoded in one go."""
    shape = unit.shape
    at_once = max(1, BYTES_PER_REQUEST // (shape.num_frames * shape.height * shape.width * 3))
    for (video, crop), group in groupby(unit.spans, key=lambda span: (span.video, span.crop)):
        same = list(group)
        wanted = Wanted(shape.num_frames, config.fps, shape.height, shape.width, crop)
        for index in range(0, len(same), at_once):
            part = same[index : index + at_once]
            decoded = decoder.decode_spans(video, [span.start_s for span in part], wanted)
            yield from zip(part, decoded, strict=True)


def _meta(
    config: ShardsConfig,
    unit: PlannedShard,
    span: Span,
    moving: Motion,
    clip: bytes,
    conversions: tuple[str, ...],
) -> bytes:
    shape = unit.shape
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
        motion_score=moving.mean,
        motion_p95=moving.p95,
        motion_residual=moving.residual,
        motion_camera=moving.camera,
        cuts=moving.cuts,
        video_sha256=hashlib.sha256(clip).hexdigest(),
        conversions=conversions,
    )
    # Without conversions the bytes are those of versions that knew none.
    absent = set() if conversions else {"conversions"}
    return sample.model_dump_json(exclude=absent).encode()


def _note(reasons: Counter[str]) -> str:
    """What the progress says beside the numbers."""
    most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    counts = [f"{count} {reason}" for reason, count in most[:REASONS_ON_SCREEN]] + ["..."] * (
        len(most) > REASONS_ON_SCREEN
    )
    return f"clips; set aside: {', '.join(counts)}" if counts else "clips"


# ---------------------------------------------------------------------------------------------- what is refused


def count_bad(rejects: list[Reject]) -> int:
    """How many of them are damaged, not merely unwanted."""
    return sum(reject.reason not in HARMLESS | FILTERED for reject in rejects)


def _named(reject: Reject) -> tuple[str, str]:
    """(reason, which clip and why) of a rejected clip."""
    name = printable(reject.key)
    return reject.reason, f"{name}: {printable(reject.detail)}"[
        :MAX_EXAMPLE
    ] if reject.detail else name


def tally_rejects(rejects: Iterable[Reject]) -> Tally:
    """How many clips were rejected for each reason, with the first few of each."""
    tally = Tally()
    for reject in rejects:
        tally.add(*_named(reject))
    return tally


def check_bad(
    config: ShardsConfig, bad: int, seen: int, rejected: Tally | None = None, *, last: bool = False
) -> None:
    """Raise TooManyRejectedClips where more clips are damaged than the config allows. `rejected`: what to name."""
    if bad > config.max_bad_fraction * seen and (last or seen >= FEW):
        counts = f". Rejected: {rejected}" if rejected else ""
        raise TooManyRejectedClips(
            f"{bad} of {seen} clips of {config.source!r} are damaged, more than max_bad_fraction = {config.max_bad_fraction:g}. "
            f"Fix the cause, or raise max_bad_fraction, and run again; finished shards stay{counts}"
        )


def sidecar_of(raw: Path, line: Line) -> Sidecar | None:
    """The sidecar of a finished unit, None of one that is left. Raises ShardError when it is that of another plan."""
    tar = raw / f"{line.name}.tar"
    sidecar = read_sidecar(tar)
    if sidecar is not None and sidecar.fingerprint != line.fingerprint:
        raise foreign(tar)
    return sidecar


def foreign(tar: Path) -> ShardError:
    return ShardError(
        f"{tar} was made from other videos or captions than the source holds now, or before HDR "
        "and interlaced video were converted; restore them, use another "
        f"output folder, or delete {tar} and {sidecar_path(tar)} to make the shard again (its columns become stale)"
    )


# ------------------------------------------------------------------------------------------------- the decoders


@contextmanager
def decoders(config: ShardsConfig) -> Iterator[queue.SimpleQueue]:
    """One decoder for each worker."""
    idle: queue.SimpleQueue[SafeDecoder] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(config.job.workers):
            idle.put(
                stack.enter_context(
                    SafeDecoder(
                        timeout_s=config.job.timeout_s,
                        memory_limit=config.job.memory_limit_mb << 20,
                        max_pixels=config.max_pixels,
                        **config.video.model_dump(),
                    )
                )
            )
        yield idle


@contextmanager
def borrowed(decoders: queue.SimpleQueue) -> Iterator[SafeDecoder]:
    """A decoder that remembers nothing."""
    decoder = decoders.get()
    try:
        decoder.begin()
        yield decoder
    finally:
        decoders.put(decoder)
