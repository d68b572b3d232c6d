"""`landiff precompute`: columns from raw shards.

    run(config, task=(0, 1))   compute what is missing of this task's shards
    status(config)             per column, what is done and left
    finalize(config)           enter finished columns into the manifest

A unit is one column of one shard (units.py). It depends on its raw shard and the config alone, so tasks may
share a folder, die and be started again. Columns that need the frames go through a shard together, so that
each clip is decoded once; text columns go one by one, so that one big text encoder is in memory at a time.
Threads decode ahead while the encoders work.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from configs.base import ConfigError
from data_pipeline.clips import Clip, ClipReader, Problem, Result, by_shape, finite, in_batches
from data_pipeline.columns import FolderReader, pack_tensor
from data_pipeline.precompute_config import (
    FeaturesColumn,
    LatentsColumn,
    PrecomputeConfig,
    TextColumn,
    TokensColumn,
)
from data_pipeline.schema import Manifest, ShardEntry, column_stem
from data_pipeline.shards import ShardError, ShardWriter, read_manifest
from data_pipeline.units import ColumnCard, ColumnFolder, ColumnStatus, common_shape, share
from data_pipeline.units import finalize as finalize_units
from data_pipeline.units import status as status_of_units
from model_zoo import frozen, registry
from model_zoo.frozen.base import LatentCodec, TextEncoder, VisionFeatures
from model_zoo.frozen.config import semantic_frame_indices

Progress = Callable[[int, int, str], None]  # (clips done, clips of this task, which columns go through together)
SMALL = 100  # clips; of fewer, one bad clip is no fraction to stop for before the end


class TooManyRejects(ShardError):
    """More clips were set aside than `max_bad_fraction` allows."""


@dataclass
class Stages:
    """Seconds by stage, of the thread that runs the encoders."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


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
    stage_seconds: dict[str, float]
    wall_s: float

    def __str__(self) -> str:
        parts = []
        for name, column in self.columns.items():
            bad = f", {sum(column.rejects.values())} set aside ({_counted(column.rejects)})" if column.rejects else ""
            parts.append(f"{name}: {column.clips} clips in {column.made} shards, {column.found} shards were done{bad}")
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.stage_seconds.items())
        return "; ".join(parts) + f"; {self.wall_s:.1f} s" + (f" (seconds by stage: {stages})" if stages else "")


# ------------------------------------------------------------------------------------------------ producers


class Producer(Protocol):
    """Clips of a shard -> tensors of one column."""

    card: ColumnCard

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> bool:
        """Before the clips of a shard come, in batches. Returns whether their frames are needed."""
        ...

    def __call__(self, clips: Sequence[Clip]) -> list[Result]:
        ...


class FeaturesProducer:
    """float16 [T, C, h, w] of the semantic frames."""

    def __init__(self, column: FeaturesColumn, encoder: VisionFeatures, job: Job) -> None:
        self.stride, self.encoder, self.job = column.frame_stride, encoder, job
        parts = {"encoders": {encoder.name: encoder.fingerprint}, "decoder": job.config.decoder,
                 "frame_stride": self.stride, "dtype": "float16"}
        self.card = ColumnCard.of(encoder.name, parts, column.model_dump(mode="json"))
        self._last: tuple[Sequence[Clip], list[Result]] = ((), [])

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> bool:
        return True

    def __call__(self, clips: Sequence[Clip]) -> list[Result]:
        if self._last[0] is not clips:  # the tokens of the same batch ask again
            self._last = (clips, by_shape(clips, self._frames, self._compute))
        return self._last[1]

    def _frames(self, clip: Clip) -> np.ndarray | Problem:
        if clip.frames is None:
            return clip.problem
        length, height, width = clip.frames.shape[:3]
        if (length - 1) % self.stride:
            return Problem("frame_count", f"{length} frames are not 1 + {self.stride}k")
        if height % self.encoder.cell or width % self.encoder.cell:
            return Problem("frame_size", f"{height}x{width} does not divide into cells of {self.encoder.cell}")
        return clip.frames[semantic_frame_indices(length, 1 + (length - 1) // self.stride)]

    def _compute(self, frames: list[np.ndarray], keys: list[str]) -> Tensor:
        with self.job.stages("features"):
            return self.encoder(self.job.stack(frames)).half().cpu()


class TokensProducer:
    """uint16 [N]: codes of the features as float16 holds them, whether they come from their column or from frames."""

    def __init__(self, column: TokensColumn, features: FeaturesProducer, job: Job) -> None:
        entry = registry.resolve(job.config.zoo, column.tokenizer, kind="tokenizer")
        if entry.config.codebook_size > 1 << 16:
            raise ConfigError(f"columns: {entry.reference} has a codebook of {entry.config.codebook_size}; tokens are uint16")
        self.tokenizer = registry.load_model(entry, job.device)
        self.sizes = entry.config
        self.features, self.job = features, job
        parts = {**features.card.parts, "encoders": {entry.name: entry.fingerprint, **features.card.parts["encoders"]},
                 "dtype": "uint16"}
        self.card = ColumnCard.of(entry.reference, parts, column.model_dump(mode="json"))
        self._reader: FolderReader | None = None
        self._slots: dict[str, int] = {}

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> bool:
        sidecar = ColumnFolder(self.job.config.data, "features").finished(entry, self.features.card.fingerprint)
        self._reader = None
        if sidecar is not None:
            self._reader = FolderReader(self.job.config.data, "features", "features.safetensors", [sidecar.entry])
            self._slots = {key: slot for slot, (key, _) in enumerate(sidecar.index)}
        return self._reader is None

    def __call__(self, clips: Sequence[Clip]) -> list[Result]:
        known = [self._stored(clip) for clip in clips] if self._reader else self.features(clips)
        known = [f if isinstance(f, Problem) else self._fitting(f) for f in known]
        by_clip = {clip.key: f for clip, f in zip(clips, known, strict=True)}
        return by_shape(clips, lambda clip: by_clip[clip.key], self._compute)

    def _stored(self, clip: Clip) -> Result:
        slot = self._slots.get(clip.key)
        return Problem("no_features", "set aside in column 'features'") if slot is None else self._reader.read_tensor(0, slot)

    def _fitting(self, features_TChw: Tensor) -> Result:
        found, wanted = list(features_TChw.shape[1:]), [self.sizes.feature_channels, self.sizes.grid_height, self.sizes.grid_width]
        return features_TChw if found == wanted else Problem("feature_size", f"features {found}, the tokenizer takes {wanted}")

    def _compute(self, features: list[Tensor], keys: list[str]) -> Tensor:
        with self.job.stages("tokens"):
            features_BTChw = torch.stack(features).float().to(self.job.device)
            # each segment on its own, as the grammar of longer clips has it
            segments = [self.tokenizer.encode(part) for part in features_BTChw.split(self.sizes.segment_frames, dim=1)]
            return torch.cat(segments, dim=1).cpu().to(torch.uint16)


class LatentsProducer:
    """bfloat16 [T, C, H, W], scaled."""

    def __init__(self, column: LatentsColumn, codec: LatentCodec, job: Job) -> None:
        self.codec, self.seed, self.job = codec, column.sample_seed, job
        parts = {"encoders": {codec.name: codec.fingerprint}, "decoder": job.config.decoder, "sample_seed": self.seed,
                 "dtype": "bfloat16"}
        self.card = ColumnCard.of(codec.name, parts, column.model_dump(mode="json"))

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> bool:
        return True

    def __call__(self, clips: Sequence[Clip]) -> list[Result]:
        return by_shape(clips, self._frames, self._compute)

    def _frames(self, clip: Clip) -> np.ndarray | Problem:
        if clip.frames is None:
            return clip.problem
        length, height, width = clip.frames.shape[:3]
        if (length - 1) % self.codec.time:
            return Problem("frame_count", f"{length} frames are not 1 + {self.codec.time}k")
        if height % self.codec.space or width % self.codec.space:
            return Problem("frame_size", f"{height}x{width} does not divide into cells of {self.codec.space}")
        return clip.frames

    def _compute(self, videos: list[np.ndarray], keys: list[str]) -> Tensor:
        with self.job.stages("latents"):
            length, height, width = videos[0].shape[:3]
            noise = None
            if self.seed is not None:
                shape = (1 + (length - 1) // self.codec.time, self.codec.channels, height // self.codec.space, width // self.codec.space)
                noise = torch.stack([clip_noise(self.seed, key, shape) for key in keys]).to(self.job.device)
            return self.codec.encode(self.job.stack(videos), noise).bfloat16().cpu()


class TextProducer:
    """bfloat16 [L, D]: the rows of each caption; a caption that comes again in its shard is not encoded again."""

    def __init__(self, column: TextColumn, encoder: TextEncoder, job: Job) -> None:
        self.encoder, self.job = encoder, job
        self.card = ColumnCard.of(encoder.name, {"encoders": {encoder.name: encoder.fingerprint}, "dtype": "bfloat16"},
                                  column.model_dump(mode="json"))
        self._to_come: Counter[str] = Counter()
        self._states: dict[str, Tensor] = {}

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> bool:
        self._to_come = Counter(clip.meta.caption for clip in clips if clip.meta is not None)
        self._states = {}
        return False

    def __call__(self, clips: Sequence[Clip]) -> list[Result]:
        captions = [clip.meta.caption for clip in clips if clip.meta is not None]
        new = [c for c in dict.fromkeys(captions) if c.strip() and c not in self._states]
        if new:
            with self.job.stages("text"):
                states_BLD, lengths_B = self.encoder(new)
                states_BLD = states_BLD.bfloat16().cpu()
                for caption, states, length in zip(new, states_BLD, lengths_B.tolist(), strict=True):
                    self._states[caption] = states[:length].clone()
        results = [self._result(clip) for clip in clips]
        for caption in captions:
            self._to_come[caption] -= 1
            if not self._to_come[caption]:
                self._states.pop(caption, None)
        return results

    def _result(self, clip: Clip) -> Result:
        if clip.meta is None:
            return clip.problem
        states = self._states.get(clip.meta.caption)
        return Problem("empty_caption") if states is None else finite(states)


def clip_noise(seed: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal, keyed by the clip: the same on any task, in any batch. Drawn on the CPU."""
    digest = hashlib.blake2b(f"{seed}/latents/{key}".encode(), digest_size=8).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))


# ------------------------------------------------------------------------------------------------ the job


class Job:
    """One task's run over its shards."""

    def __init__(self, config: PrecomputeConfig, manifest: Manifest, task: tuple[int, int], progress: Progress | None) -> None:
        self.config, self.manifest = config, manifest
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device)
        self.shards = share(manifest.shards, task)
        self.stages = Stages()
        self.folders = {name: ColumnFolder(config.data, name) for name in config.columns}
        self.summaries = {name: ColumnSummary() for name in config.columns}
        self.seen: Counter[str] = Counter()  # clips by column, those of units found finished included
        self.done: Counter[str] = Counter()  # clips by column, for the progress line
        self._found: set[tuple[str, int]] = set()  # (column, shard) that were finished before
        self._progress = progress
        self._reader = ClipReader(config.data, manifest.shards, decoder=config.decoder, threads=config.decode_threads)

    def run(self) -> Summary:
        begin = time.perf_counter()
        columns = self.config.columns
        for name, column in columns.items():
            if isinstance(column, TextColumn):
                self._run_columns([name])
        with_frames = [name for name, column in columns.items() if not isinstance(column, TextColumn)]
        if with_frames:
            self._run_columns(with_frames)
        self._reader.close()
        return Summary(self.summaries, {"decode": self._reader.decode_s, **self.stages.seconds}, time.perf_counter() - begin)

    def stack(self, videos: list[np.ndarray]) -> Tensor:
        """uint8 [B, T, H, W, 3] on the device."""
        return torch.from_numpy(np.stack(videos)).to(self.device)

    def _run_columns(self, names: Sequence[str]) -> None:
        with torch.inference_mode():
            producers = self._producers(names)
            for name, producer in producers.items():
                self.folders[name].remove_leftovers()
                self.folders[name].claim(producer.card, redo=name in self.config.redo)
            left = [shard for shard in self.shards if not self._find_finished(shard, producers)]
            self._report(names)
            for shard in left:
                if self._find_finished(shard, producers):  # a twin of this task was faster
                    continue
                pending = {name: producer for name, producer in producers.items() if (name, shard) not in self._found}
                self._run_shard(shard, pending, names, last=shard == left[-1])
            for name in names:
                self._stop_if_too_many(name, last=True)

    def _find_finished(self, shard: int, producers: dict[str, Producer]) -> bool:
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

    def _producers(self, names: Sequence[str]) -> dict[str, Producer]:
        producers: dict[str, Producer] = {}
        vision: dict[FeaturesColumn, FeaturesProducer] = {}  # one for all columns that take the same features
        for name in names:
            match column := self.config.columns[name]:
                case FeaturesColumn() | TokensColumn():
                    features = FeaturesColumn(encoder=column.encoder, frame_stride=column.frame_stride)
                    if features not in vision:
                        vision[features] = FeaturesProducer(features, frozen.build(column.encoder, self.device), self)
                    producers[name] = vision[features]
                    if isinstance(column, TokensColumn):
                        producers[name] = TokensProducer(column, vision[features], self)
                case LatentsColumn():
                    producers[name] = LatentsProducer(column, frozen.build(column.encoder, self.device), self)
                case TextColumn():
                    producers[name] = TextProducer(column, frozen.build(column.encoder, self.device), self)
        return producers

    def _run_shard(self, shard: int, producers: dict[str, Producer], names: Sequence[str], *, last: bool) -> None:
        """Make the units of one shard; they are committed together at the end, or not at all."""
        entry = self.manifest.shards[shard]
        clips = self._reader.clips(shard)
        needs_frames = any([producer.begin(entry, clips) for producer in producers.values()])
        shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in producers}
        with ExitStack() as stack:
            writers = {}
            for name, producer in producers.items():
                self.folders[name].withdraw(entry)
                writers[name] = stack.enter_context(ShardWriter(
                    self.folders[name].folder, entry.name, fingerprint=producer.card.fingerprint, raw_sha256=entry.sha256))
            size = self.config.batch_size
            batches = self._reader.batches(shard, clips, size) if needs_frames else in_batches(clips, size)
            for batch in self._timed(batches):
                for name, producer in producers.items():
                    for clip, result in zip(batch, producer(batch), strict=True):
                        self._write(writers[name], name, clip, result, shapes[name])
                    self.done[name] += len(batch)
                self._report(names)
            for name, writer in writers.items():
                self._count(name, Counter(r.reason for r in writer.rejects), entry.samples, made=1)
                writer.dtype = producers[name].card.parts["dtype"]
                writer.shape = list(common_shape(shapes[name]))
                self._stop_if_too_many(name, last=last)

    def _timed(self, batches: Iterator[list[Clip]]) -> Iterator[list[Clip]]:
        while True:
            with self.stages("wait for clips"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _write(self, writer: ShardWriter, name: str, clip: Clip, result: Result, shapes: list[tuple[int, ...]]) -> None:
        with self.stages("write"):
            if isinstance(result, Problem):
                writer.reject(clip.key, name, result.reason, result.detail, clip.position)
                return
            stem = column_stem(name)
            writer.add(clip.key, {f"{stem}.safetensors": pack_tensor(stem, result)})
            shapes.append(tuple(result.shape))

    def _count(self, name: str, rejects: Counter[str], clips: int, *, made: int = 0, found: int = 0) -> None:
        old = self.summaries[name]
        self.seen[name] += clips
        self.summaries[name] = ColumnSummary(old.made + made, old.found + found, old.clips + (clips if made else 0),
                                             dict(Counter(old.rejects) + rejects))

    def _stop_if_too_many(self, name: str, *, last: bool) -> None:
        """Called before a unit is committed, so that it is made again when the cause is mended."""
        rejects, seen = self.summaries[name].rejects, self.seen[name]
        bad = sum(rejects.values())
        if bad > self.config.max_bad_fraction * seen and (last or seen >= SMALL):
            raise TooManyRejects(
                f"column {name!r}: {bad} of {seen} clips were set aside ({_counted(rejects)}), more than max_bad_fraction = "
                f"{self.config.max_bad_fraction:g}. Mend the cause, or raise max_bad_fraction, and run again; finished shards stay"
            )

    def _report(self, names: Sequence[str]) -> None:
        if self._progress is not None:
            total = sum(self.manifest.shards[s].samples for s in self.shards)
            self._progress(sum(self.done[name] for name in names) // len(names), total, f"clips ({', '.join(names)})")


def _counted(rejects: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(rejects.items(), key=lambda item: -item[1]))


def run(config: PrecomputeConfig, task: tuple[int, int] = (0, 1), progress: Progress | None = None) -> Summary:
    """Compute the columns of this task's shards; units that are finished stay as they are.

    Raises ConfigError where a folder holds another encoder's column, TooManyRejects above `max_bad_fraction`.
    """
    return Job(config, read_manifest(config.data), task, progress).run()


def status(config: PrecomputeConfig) -> list[ColumnStatus]:
    """What is done and left of each column of the config; builds no encoder."""
    return status_of_units(config.data, read_manifest(config.data), list(config.columns))


def finalize(config: PrecomputeConfig) -> Manifest:
    """Enter the config's columns into the manifest. Raises ShardError listing the shards that are missing."""
    return finalize_units(config.data, list(config.columns))
