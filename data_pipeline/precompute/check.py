"""`landiff precompute estimate` before the work, `landiff precompute verify` after it. Neither writes anything."""

from __future__ import annotations

import hashlib
import time
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
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, ClipReader, Result
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.precompute.job import FEW, Bench, Build, Producer, column_groups
from landiff.data_pipeline.precompute.units import ColumnFolder, single_code

TAR_BLOCK = 512
SAME_TOKENS = 0.99  # of re-encoded tokens; other kernels may tip a code that lay on the edge
LARGEST_ERROR = (
    1e-2  # of re-encoded floats: root mean square of the difference, over that of the values
)


# ------------------------------------------------------------------------------------------------ estimate


@dataclass(frozen=True)
class ColumnEstimate:
    column: str
    clips_left: int
    seconds: float  # of this device alone, encoder only
    bytes: float
    rejects: dict[str, int]  # reason -> of the clips that were tried


@dataclass(frozen=True)
class Estimate:
    device: str
    clips: int  # that were tried
    columns: tuple[ColumnEstimate, ...]
    decode_s: float  # of one core
    load_s: float  # to build the encoders, once a task

    def __str__(self) -> str:
        lines = [
            f"{'column':<22}{'clips left':>12}{'disk':>10}{self.device + ' time':>14}  would be set aside"
        ]
        for row in self.columns:
            bad = ", ".join(f"{reason} {count}" for reason, count in row.rejects.items())
            lines.append(
                f"{row.column:<22}{row.clips_left:>12}{size(row.bytes):>10}{duration(row.seconds):>14}  {bad or 'none'} (of {self.clips})"
            )
        lines.append(
            f"{'decode':<22}{'':>12}{'':>10}{duration(self.decode_s):>14}  (on one core; it goes on beside the encoders)"
        )
        disk, seconds = (
            sum(row.bytes for row in self.columns),
            sum(row.seconds for row in self.columns),
        )
        lines.append(
            f"{'all':<22}{'':>12}{size(disk):>10}{duration(seconds):>14}  = {seconds / 3600:.2f} {self.device} hours, from {self.clips} clips; "
            f"encoders load in {self.load_s:.0f} s a task"
        )
        return "\n".join(lines)


def estimate_cost(
    config: PrecomputeConfig, manifest: Manifest, build: Build, clips: int
) -> Estimate:
    """Runs a few clips of the first shards through everything, and multiplies."""
    bench = Bench.of(config)
    reader = ClipReader(
        config.data, manifest.shards, decoder=config.decoder, threads=config.decode_threads
    )
    rows, tried, load_s = [], 0, 0.0
    try:
        for names in column_groups(config):
            begin = time.perf_counter()
            producers = build(names, bench)
            load_s += time.perf_counter() - begin
            tried, some = _try(manifest, reader, producers, clips, config)
            rows += some
    finally:
        reader.close()
    with_frames = max(
        (row.clips_left for row in rows if not row.column.startswith("text")), default=0
    )
    decode = reader.decode_s / max(1, tried) * with_frames
    return Estimate(bench.device.type, tried, tuple(rows), decode, load_s)


def _try(
    manifest: Manifest,
    reader: ClipReader,
    producers: Mapping[str, Producer],
    clips: int,
    config: PrecomputeConfig,
) -> tuple[int, list[ColumnEstimate]]:
    seconds, sizes = dict.fromkeys(producers, 0.0), dict.fromkeys(producers, 0)
    rejects: dict[str, dict[str, int]] = {name: {} for name in producers}
    tried, shard, encoders = 0, -1, {}
    with torch.inference_mode():
        plan = (
            (i, any([p.needs_frames(entry) for p in producers.values()]))
            for i, entry in enumerate(manifest.shards)
        )
        for piece in reader.stream(plan, min(config.batch_size, clips)):
            if piece.shard != shard:
                if shard < 0:  # the first call pays for what later ones don't
                    for producer in producers.values():
                        producer.begin(manifest.shards[piece.shard], piece.clips)(piece.batch)
                        producer.needs_frames(manifest.shards[piece.shard])
                encoders = {
                    name: producer.begin(manifest.shards[piece.shard], piece.clips)
                    for name, producer in producers.items()
                }
                shard = piece.shard
            for name, encode in encoders.items():
                begin = time.perf_counter()
                results = encode(piece.batch)
                seconds[name] += time.perf_counter() - begin
                for result in results:
                    if isinstance(result, ClipProblem):
                        rejects[name][result.reason] = rejects[name].get(result.reason, 0) + 1
                    else:
                        sizes[name] += (
                            TAR_BLOCK
                            + -(-len(pack_tensor(column_stem(name), result)) // TAR_BLOCK)
                            * TAR_BLOCK
                        )
            tried += len(piece.batch)
            if tried >= clips:
                break
    if not tried:
        raise ShardError(f"{config.data} holds no clip to estimate from")
    rows = []
    for name, producer in producers.items():
        folder = ColumnFolder(config.data, name)
        found = folder.survey(manifest.shards, producer.card.fingerprint)
        left = sum(
            entry.samples
            for entry, sidecar in zip(manifest.shards, found, strict=True)
            if sidecar is None
        )
        rows.append(
            ColumnEstimate(
                name, left, seconds[name] / tried * left, sizes[name] / tried * left, rejects[name]
            )
        )
    return tried, rows


# ------------------------------------------------------------------------------------------------ verify


@dataclass
class ColumnCheck:
    """What `verify` found of one column."""

    column: str
    shards: int = 0
    clips: int = 0
    equal: int = 0  # clips whose stored tensor is what encoding them again gives, bit for bit
    problems: list[str] = field(default_factory=list)
    measures: dict[str, list[float]] = field(default_factory=dict)  # per clip
    histogram: np.ndarray | None = None  # of token values

    def __str__(self) -> str:
        parts = [
            f"{self.column}: {self.clips} clips of {self.shards} shards read again, {self.equal} encoded again bit-equal"
        ]
        for name, values in self.measures.items():
            if name != "bad_values":
                parts.append(f"{name} {np.mean(values):.2f} (least {min(values):.2f})")
        if self.histogram is not None and self.histogram.sum():
            share = self.histogram[self.histogram > 0] / self.histogram.sum()
            used = np.flatnonzero(self.histogram)
            parts.append(
                f"{len(share)} codes in use, {used[0]} to {used[-1]}, as if {np.exp(-(share * np.log(share)).sum()):.0f} were used evenly; "
                f"the most frequent makes {share.max():.1%}"
            )
        return "; ".join(parts) + "".join(f"\n  WRONG: {problem}" for problem in self.problems)


def verify_columns(
    config: PrecomputeConfig, manifest: Manifest, build: Build, sample: float
) -> list[ColumnCheck]:
    """At least one finished shard of each column, and `sample` of them all, the same ones every time."""
    bench = Bench.of(config)
    reader = ClipReader(
        config.data, manifest.shards, decoder=config.decoder, threads=config.decode_threads
    )
    checks = []
    try:
        with torch.inference_mode():
            for names in column_groups(config):
                producers = build(names, bench)
                checks += [
                    _verify_column(config, manifest, reader, name, producers[name], sample)
                    for name in names
                ]
    finally:
        reader.close()
    return checks


def _verify_column(
    config: PrecomputeConfig,
    manifest: Manifest,
    reader: ClipReader,
    name: str,
    producer: Producer,
    sample: float,
) -> ColumnCheck:
    check = ColumnCheck(name)
    folder = ColumnFolder(config.data, name)
    card = folder.card()
    if card is None:
        check.problems.append("not one shard of it is there; run `landiff precompute`")
        return check
    if card.fingerprint != producer.card.fingerprint:
        check.problems.append(
            f"stale: made by {card.encoder} (fingerprint {card.fingerprint}), the config makes it with "
            f"{producer.card.encoder} (fingerprint {producer.card.fingerprint})"
        )
        return check
    finished = [
        i
        for i, sidecar in enumerate(folder.survey(manifest.shards, card.fingerprint))
        if sidecar is not None
    ]
    if len(finished) < len(manifest.shards):
        check.problems.append(
            f"{len(manifest.shards) - len(finished)} of {len(manifest.shards)} shards are missing, damaged or stale"
        )
    for shard in _chosen(finished, manifest.shards, sample):
        check.shards += 1
        _verify_shard(config, manifest.shards[shard], shard, reader, name, producer, check)
    sidecars = folder.survey([manifest.shards[shard] for shard in finished], card.fingerprint)
    problem = single_code([sidecar for sidecar in sidecars if sidecar is not None])
    if not problem and check.histogram is not None and check.clips >= FEW:
        problem = producer.collapse(check.histogram)
    if problem:
        way_out = f"train the tokenizer anew, then run with redo=[{name}]"
        check.problems.append(f"column {name!r}: {problem}; {way_out}")
    return check


def _chosen(finished: Sequence[int], shards: Sequence[ShardEntry], sample: float) -> list[int]:
    """By hash of the raw shard: so many more than 1 as the share says."""
    ranked = sorted(
        finished, key=lambda i: hashlib.sha256(f"verify/{shards[i].sha256}".encode()).digest()
    )
    return sorted(ranked[: max(1, round(sample * len(finished)))])


def _verify_shard(
    config: PrecomputeConfig,
    raw: ShardEntry,
    shard: int,
    reader: ClipReader,
    name: str,
    producer: Producer,
    check: ColumnCheck,
) -> None:
    folder = ColumnFolder(config.data, name)
    sidecar = folder.sidecar(raw)
    tar = folder.folder / f"{raw.name}.tar"
    if sha256_file(tar) != sidecar.entry.sha256:
        check.problems.append(
            f"{tar} does not have the sha256 of its sidecar; delete both and run `landiff precompute` again"
        )
    stored = FolderReader(
        config.data, name, f"{column_stem(name)}.safetensors", [sidecar.entry], checksum=True
    )
    slots = {key: slot for slot, (key, _) in enumerate(sidecar.index)}
    encode = None
    for piece in reader.stream([(shard, True)], config.batch_size):
        if encode is None:
            producer.needs_frames(raw)
            encode = producer.begin(raw, piece.clips)
        for clip, again in zip(piece.batch, encode(piece.batch), strict=True):
            check.clips += 1
            try:
                tensor = stored.read_tensor(0, slots[clip.key]) if clip.key in slots else None
            except ShardError as error:
                check.problems.append(str(error))
                continue
            problem = _compare(tensor, again)
            check.equal += problem == ""
            if problem not in ("", "close"):
                check.problems.append(f"{tar}, sample {clip.key}: {problem}")
            if tensor is not None:
                _measure(check, clip, tensor, producer, tar.name)
    stored.close()


def _measure(
    check: ColumnCheck, clip: Clip, tensor: Tensor, producer: Producer, where: str
) -> None:
    measured = producer.examine(clip, tensor)
    if measured["bad_values"]:
        check.problems.append(
            f"{where}, sample {clip.key}: {measured['bad_values']:.0f} values out of range or not finite"
        )
    for measure, value in measured.items():
        check.measures.setdefault(measure, []).append(value)
    if tensor.dtype == torch.uint16:
        counts = np.bincount(tensor.numpy(), minlength=1 << 16)
        check.histogram = counts if check.histogram is None else check.histogram + counts


def _compare(stored: Tensor | None, again: Result) -> str:
    """ "" where equal, "close" where within tolerance, else what is wrong."""
    if stored is None or isinstance(again, ClipProblem):
        reason = (
            f"set aside as {again.reason}" if isinstance(again, ClipProblem) else "encoded well"
        )
        here = "set aside" if stored is None else "stored"
        return (
            ""
            if stored is None and isinstance(again, ClipProblem)
            else f"it is {here}, but now it is {reason}"
        )
    if stored.shape != again.shape or stored.dtype != again.dtype:
        return f"it is {stored.dtype} {list(stored.shape)}, encoded again {again.dtype} {list(again.shape)}"
    if stored.equal(again):
        return ""
    if not stored.is_floating_point():
        same = float((stored.int() == again.int()).float().mean())
        return "close" if same >= SAME_TOKENS else f"{same:.1%} of its tokens come out again"
    error = (
        stored.float() - again.float()
    ).square().mean().sqrt() / again.float().square().mean().sqrt().clamp(min=1e-12)
    return (
        "close"
        if float(error) <= LARGEST_ERROR
        else f"encoded again it differs by {float(error):.2g} of its size"
    )
