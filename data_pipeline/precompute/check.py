"""`landiff precompute estimate` and `landiff precompute verify`. Neither writes anything."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from landiff.configs.durations import duration, size
from landiff.configs.files import sha256_file
from landiff.data_pipeline.format.columns import FolderReader
from landiff.data_pipeline.format.schema import Manifest, ShardEntry, column_stem
from landiff.data_pipeline.format.shards import ShardError
from landiff.data_pipeline.format.tensors import pack_tensor
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, ClipReader, Piece, Result
from landiff.data_pipeline.precompute.config import PrecomputeConfig, column_groups
from landiff.data_pipeline.precompute.interface import (
    BatchCache,
    BuildProducers,
    Encode,
    Producer,
    ProducerContext,
    prepare_shard,
)
from landiff.data_pipeline.precompute.job import MIN_CLIPS_COLLAPSED
from landiff.data_pipeline.precompute.summary import format_reject_counts
from landiff.data_pipeline.precompute.units import ColumnFolder, single_code

TAR_BLOCK = 512  # bytes
MIN_EQUAL_TOKENS = 0.99  # fraction; other kernels may change a code at a decision boundary
MAX_RELATIVE_ERROR = 1e-2  # root mean square of the difference over that of the values


# --------------------------------------------------------------------------------------- estimate


@dataclass(frozen=True)
class ColumnEstimate:
    """Estimated cost of a column's missing units."""

    column: str
    clips_left: int
    seconds: float  # on one device, encoder only
    bytes: float
    rejects: dict[str, int]  # clips by reason, of the clips that were tried


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of all missing units."""

    device: str
    clips: int  # clips that were tried
    columns: tuple[ColumnEstimate, ...]
    decode_s: float  # on one core
    load_s: float  # to build the encoders, once per task

    def __str__(self) -> str:
        """Format the estimate as a table."""
        time_title = f"{self.device} time"
        lines = [f"{'column':<22}{'clips left':>12}{'disk':>10}{time_title:>14}  rejected"]
        for row in self.columns:
            rejects = format_reject_counts(row.rejects) or "none"
            lines.append(
                f"{row.column:<22}{row.clips_left:>12}{size(row.bytes):>10}"
                f"{duration(row.seconds):>14}  {rejects} (of {self.clips})"
            )
        lines.append(
            f"{'decode':<22}{'':>12}{'':>10}{duration(self.decode_s):>14}"
            "  (on one core, in parallel with the encoders)"
        )
        disk = sum(row.bytes for row in self.columns)
        seconds = sum(row.seconds for row in self.columns)
        lines.append(
            f"{'all':<22}{'':>12}{size(disk):>10}{duration(seconds):>14}"
            f"  = {seconds / 3600:.2f} {self.device} hours, estimated from {self.clips} clips; "
            f"each task loads its encoders in {self.load_s:.0f} s"
        )
        return "\n".join(lines)


@dataclass
class _Trial:
    """Measured cost of one column for the clips that were tried."""

    seconds: float = 0.0
    bytes: int = 0
    rejects: Counter[str] = field(default_factory=Counter)

    def add(self, stem: str, results: Sequence[Result], seconds: float) -> None:
        """Add the results of one batch."""
        self.seconds += seconds
        for result in results:
            if isinstance(result, ClipProblem):
                self.rejects[result.reason] += 1
            else:
                blocks = -(-len(pack_tensor(stem, result)) // TAR_BLOCK)
                self.bytes += TAR_BLOCK + blocks * TAR_BLOCK  # the first block is the header


def estimate_cost(
    config: PrecomputeConfig, manifest: Manifest, build: BuildProducers, clips: int
) -> Estimate:
    """Run `clips` clips of the first shards through all encoders and extrapolate."""
    context = ProducerContext.of(config)
    reader = ClipReader(
        config.data, manifest.shards, decoder=config.decoder, threads=config.decode_threads
    )
    rows: list[ColumnEstimate] = []
    tried = 0
    load_s = 0.0
    try:
        for names in column_groups(config):
            begin = time.perf_counter()
            producers = build(names, context)
            load_s += time.perf_counter() - begin
            tried, trials = _try_clips(config, manifest, reader, producers, clips)
            for name, producer in producers.items():
                rows.append(_extrapolate(config, manifest, name, producer, trials[name], tried))
    finally:
        reader.close()
    left_with_frames = [row.clips_left for row in rows if not row.column.startswith("text")]
    decode_s = reader.decode_s / max(1, tried) * max(left_with_frames, default=0)
    return Estimate(context.device.type, tried, tuple(rows), decode_s, load_s)


def _try_clips(
    config: PrecomputeConfig,
    manifest: Manifest,
    reader: ClipReader,
    producers: Mapping[str, Producer],
    clips: int,
) -> tuple[int, dict[str, _Trial]]:
    """Encode at least `clips` clips. Returns their number, and the cost by column."""
    trials = {name: _Trial() for name in producers}
    encoders: dict[str, Encode] = {}
    tried = 0
    shard = -1
    with torch.inference_mode():
        plan = (
            (index, prepare_shard(producers.values(), entry))
            for index, entry in enumerate(manifest.shards)
        )
        for piece in reader.stream(plan, min(config.batch_size, clips)):
            if piece.shard != shard:
                entry = manifest.shards[piece.shard]
                if shard < 0:
                    _warm_up(producers, entry, piece)
                # only the clips that are tried, since text of all clips is encoded together
                batches = math.ceil((clips - tried) / max(1, len(piece.batch)))
                own = piece.clips[: batches * len(piece.batch)]
                encoders = {
                    name: producer.begin(entry, own) for name, producer in producers.items()
                }
                shard = piece.shard
            cache: BatchCache = {}
            for name, encode in encoders.items():
                begin = time.perf_counter()
                results = encode(piece.batch, cache)
                trials[name].add(column_stem(name), results, time.perf_counter() - begin)
            tried += len(piece.batch)
            if tried >= clips:
                break
    if not tried:
        raise ShardError(f"{config.data} holds no clips to estimate from; run `landiff shards`")
    return tried, trials


def _warm_up(producers: Mapping[str, Producer], entry: ShardEntry, piece: Piece) -> None:
    """Encode a batch without timing: the first call of an encoder is slower than later ones."""
    for producer in producers.values():
        producer.begin(entry, piece.batch)(piece.batch, {})
        producer.prepare(entry)  # for the timed `begin`


def _extrapolate(
    config: PrecomputeConfig,
    manifest: Manifest,
    name: str,
    producer: Producer,
    trial: _Trial,
    tried: int,
) -> ColumnEstimate:
    """Scale the cost of the clips that were tried to the column's missing units."""
    sidecars = ColumnFolder(config.data, name).survey(manifest.shards, producer.card.fingerprint)
    left = 0
    for entry, sidecar in zip(manifest.shards, sidecars, strict=True):
        if sidecar is None:
            left += entry.samples
    seconds = trial.seconds / tried * left
    return ColumnEstimate(name, left, seconds, trial.bytes / tried * left, dict(trial.rejects))


# ----------------------------------------------------------------------------------------- verify


@dataclass
class ColumnCheck:
    """What `verify` found in one column."""

    column: str
    shards: int = 0
    clips: int = 0
    equal: int = 0  # clips whose recomputed tensor is bit-equal to the stored one
    problems: list[str] = field(default_factory=list)
    measures: dict[str, list[float]] = field(default_factory=dict)  # by name, one per clip
    histogram: np.ndarray | None = None  # counts of token values

    def __str__(self) -> str:
        """Format the result as one line, and one more for each problem."""
        parts = [
            f"{self.column}: {self.clips} clips of {self.shards} shards read, "
            f"{self.equal} bit-equal when computed again"
        ]
        for name, values in self.measures.items():
            if name != "bad_values":
                parts.append(f"{name} {np.mean(values):.2f} (minimum {min(values):.2f})")
        if self.histogram is not None and self.histogram.sum():
            parts.append(_describe_codes(self.histogram))
        return "; ".join(parts) + "".join(f"\n  WRONG: {problem}" for problem in self.problems)


def _describe_codes(histogram: np.ndarray) -> str:
    """Describe how evenly the codes of a tokens column are used."""
    used = np.flatnonzero(histogram)
    fractions = histogram[used] / histogram.sum()
    perplexity = np.exp(-(fractions * np.log(fractions)).sum())
    return (
        f"{len(used)} codes in use, {used[0]} to {used[-1]}, perplexity {perplexity:.0f}; "
        f"the most frequent code has {fractions.max():.1%} of the tokens"
    )


@dataclass(frozen=True)
class _Verification:
    """What the checks of all shards of a column need."""

    config: PrecomputeConfig
    manifest: Manifest
    reader: ClipReader
    name: str
    producer: Producer
    folder: ColumnFolder
    check: ColumnCheck  # filled by the checks


def verify_columns(
    config: PrecomputeConfig, manifest: Manifest, build: BuildProducers, sample: float
) -> list[ColumnCheck]:
    """Check the fraction `sample` of each column's finished shards, at least one.

    The choice of shards is the same every time.
    """
    context = ProducerContext.of(config)
    reader = ClipReader(
        config.data, manifest.shards, decoder=config.decoder, threads=config.decode_threads
    )
    checks: list[ColumnCheck] = []
    try:
        with torch.inference_mode():
            for names in column_groups(config):
                producers = build(names, context)
                for name in names:
                    verification = _Verification(
                        config=config,
                        manifest=manifest,
                        reader=reader,
                        name=name,
                        producer=producers[name],
                        folder=ColumnFolder(config.data, name),
                        check=ColumnCheck(name),
                    )
                    _verify_column(verification, sample)
                    checks.append(verification.check)
    finally:
        reader.close()
    return checks


def _verify_column(verification: _Verification, sample: float) -> None:
    """Check the card of a column and a sample of its shards."""
    check = verification.check
    name = verification.name
    shards = verification.manifest.shards
    expected = verification.producer.card
    card = verification.folder.card()
    if card is None:
        check.problems.append("no shard of it is finished; run `landiff precompute`")
        return
    if card.fingerprint != expected.fingerprint:
        check.problems.append(
            f"stale: computed with {card.encoder} (fingerprint {card.fingerprint}), but the config "
            f"computes it with {expected.encoder} (fingerprint {expected.fingerprint})"
        )
        return
    sidecars = verification.folder.survey(shards, card.fingerprint)
    finished = [index for index, sidecar in enumerate(sidecars) if sidecar is not None]
    if len(finished) < len(shards):
        check.problems.append(
            f"{len(shards) - len(finished)} of {len(shards)} shards are missing, damaged or stale"
        )
    for shard in _sampled_shards(finished, shards, sample):
        check.shards += 1
        _verify_shard(verification, shard)
    problem = single_code([sidecar for sidecar in sidecars if sidecar is not None])
    if not problem and check.histogram is not None and check.clips >= MIN_CLIPS_COLLAPSED:
        problem = verification.producer.collapse(check.histogram)
    if problem:
        check.problems.append(
            f"column {name!r}: {problem}; train the tokenizer again, then run with redo=[{name}]"
        )


def _sampled_shards(
    finished: Sequence[int], shards: Sequence[ShardEntry], sample: float
) -> list[int]:
    """Choose the fraction `sample` of the finished shards, at least one, by hash."""

    def rank(shard: int) -> bytes:
        return hashlib.sha256(f"verify/{shards[shard].sha256}".encode()).digest()

    ranked = sorted(finished, key=rank)
    return sorted(ranked[: max(1, round(sample * len(finished)))])


def _verify_shard(verification: _Verification, shard: int) -> None:
    """Compare the stored tensors of one shard with a recomputation."""
    config = verification.config
    name = verification.name
    producer = verification.producer
    check = verification.check
    raw = verification.manifest.shards[shard]
    tar = verification.folder.folder / f"{raw.name}.tar"
    sidecar = verification.folder.sidecar(raw)
    if sidecar is None:
        check.problems.append(f"{tar} lost its sidecar during the check; run it again")
        return
    if sha256_file(tar) != sidecar.entry.sha256:
        check.problems.append(
            f"{tar} does not have the sha256 of its sidecar; "
            "delete both and run `landiff precompute` again"
        )
    part = f"{column_stem(name)}.safetensors"
    stored = FolderReader(config.data, name, part, [sidecar.entry], checksum=True)
    slots = {key: slot for slot, (key, _) in enumerate(sidecar.index)}
    encode: Encode | None = None
    for piece in verification.reader.stream([(shard, True)], config.batch_size):
        if encode is None:
            producer.prepare(raw)
            encode = producer.begin(raw, piece.clips)
        for clip, again in zip(piece.batch, encode(piece.batch, {}), strict=True):
            check.clips += 1
            tensor: Tensor | None = None
            try:
                if clip.key in slots:
                    tensor = stored.read_tensor(0, slots[clip.key])
            except ShardError as error:
                check.problems.append(str(error))
                continue
            problem = _compare(tensor, again)
            if problem == "":
                check.equal += 1
            elif problem != "close":
                check.problems.append(f"{tar}, sample {clip.key}: {problem}")
            if tensor is not None:
                _measure(verification, clip, tensor, tar.name)
    stored.close()


def _measure(verification: _Verification, clip: Clip, tensor: Tensor, tar: str) -> None:
    """Add the measures of a stored tensor to the check."""
    check = verification.check
    measured = verification.producer.examine(clip, tensor)
    if measured["bad_values"]:
        check.problems.append(
            f"{tar}, sample {clip.key}: {measured['bad_values']:.0f} values out of range or "
            "not finite"
        )
    for measure, value in measured.items():
        check.measures.setdefault(measure, []).append(value)
    if tensor.dtype == torch.uint16:
        counts = np.bincount(tensor.numpy(), minlength=1 << 16)
        if check.histogram is not None:
            counts = check.histogram + counts
        check.histogram = counts


def _compare(stored: Tensor | None, again: Result) -> str:
    """Compare a stored tensor with a recomputed one.

    `stored` is None if the clip was rejected. Returns "" if both are equal, "close" if they are
    within tolerance, and else a description of the difference.
    """
    if isinstance(again, ClipProblem):
        if stored is None:
            return ""
        return f"it is stored, but is now rejected as {again.reason}"
    if stored is None:
        return "it is rejected, but can now be encoded"
    if stored.shape != again.shape or stored.dtype != again.dtype:
        return (
            f"it is {stored.dtype} {list(stored.shape)}, but computed again it is "
            f"{again.dtype} {list(again.shape)}"
        )
    if stored.equal(again):
        return ""
    if not stored.is_floating_point():
        equal = float((stored.int() == again.int()).float().mean())
        if equal >= MIN_EQUAL_TOKENS:
            return "close"
        return f"only {equal:.1%} of its tokens are the same when computed again"
    difference = (stored.float() - again.float()).square().mean().sqrt()
    values = again.float().square().mean().sqrt().clamp(min=1e-12)
    error = float(difference / values)
    if error <= MAX_RELATIVE_ERROR:
        return "close"
    return f"its relative error is {error:.2g} when computed again"
