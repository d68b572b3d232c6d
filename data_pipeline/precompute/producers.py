"""`landiff precompute`: columns from raw shards.

    run(config, task=(0, 1))      compute what is missing of this task's shards
    status(config)                per column, what is done, running, failed and left, how fast
    retry(config, tasks)          which tasks of an array have work left
    finalize(config)              enter finished columns into the manifest
    estimate(config, clips)       disk and hours of what is left, from a few clips
    verify(config, sample)        read a share of it again, and make it again

A unit is one column of one shard (units.py). It depends on its raw shard and the config alone, so tasks may
share a folder, die and be started again. This file knows the encoders; precompute_job.py runs them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.columns import FolderReader
from landiff.data_pipeline.format.schema import Manifest, ShardEntry, Sidecar
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.precompute import check as precompute_check
from landiff.data_pipeline.precompute import status as precompute_status
from landiff.data_pipeline.precompute.check import ColumnCheck, Estimate
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, Result, by_shape, finite
from landiff.data_pipeline.precompute.config import (
    FeaturesColumn,
    LatentsColumn,
    PrecomputeConfig,
    TextColumn,
    TokensColumn,
)
from landiff.data_pipeline.precompute.job import (
    Bench,
    Encode,
    PrecomputeJob,
    Producer,
    ProgressCallback,
    Summary,
    TooManyColumnRejects,
)
from landiff.data_pipeline.precompute.status import ColumnStatus
from landiff.data_pipeline.precompute.units import ColumnCard, ColumnFolder, share
from landiff.data_pipeline.precompute.units import finalize_columns as finalize_units
from landiff.model_zoo import frozen, health, keyed_random, registry
from landiff.model_zoo.frozen.base import LatentCodec, TextEncoder, VisionFeatures, posterior_mean
from landiff.model_zoo.frozen.config import semantic_frame_indices

__all__ = [
    "TooManyColumnRejects",
    "estimate",
    "finalize",
    "retry",
    "run",
    "share",
    "status",
    "verify",
]


class FeaturesProducer:
    """float16 [T, C, h, w] of the semantic frames."""

    def __init__(self, column: FeaturesColumn, encoder: VisionFeatures, bench: Bench) -> None:
        self.stride, self.encoder, self.bench = column.frame_stride, encoder, bench
        parts = {
            "encoders": {encoder.name: encoder.fingerprint},
            "decoder": bench.config.decoder,
            "frame_stride": self.stride,
            "dtype": "float16",
        }
        self.card = ColumnCard.of(encoder.name, parts, column.model_dump(mode="json"))
        self._own = threading.local()

    def needs_frames(self, entry: ShardEntry) -> bool:
        return True

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        self._own.last = (None, [])

        def encode(batch: Sequence[Clip]) -> list[Result]:
            """The tokens of the same batch ask again, in the same thread."""
            wanted = (entry.sha256, [clip.position for clip in batch])
            known, results = getattr(self._own, "last", (None, []))
            if known != wanted:
                results = by_shape(batch, self._frames, self._compute)
                self._own.last = (wanted, results)
            return results

        return encode

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        return {
            "bad_values": float((~tensor.isfinite()).sum()),
            "mean": float(tensor.float().mean()),
            "std": float(tensor.float().std()),
        }

    def collapse(self, counts: np.ndarray) -> str:
        return ""

    def _frames(self, clip: Clip) -> np.ndarray | ClipProblem:
        if clip.frames is None:
            return clip.problem
        length, height, width = clip.frames.shape[:3]
        if (length - 1) % self.stride:
            return ClipProblem("frame_count", f"{length} frames are not 1 + {self.stride}k")
        if height % self.encoder.cell or width % self.encoder.cell:
            return ClipProblem(
                "frame_size", f"{height}x{width} does not divide into cells of {self.encoder.cell}"
            )
        return clip.frames[semantic_frame_indices(length, 1 + (length - 1) // self.stride)]

    def _compute(self, frames: list[np.ndarray], keys: list[str]) -> Tensor:
        with self.bench.stages("features"):
            return self.encoder(self.bench.stack(frames)).half().cpu()


class TokensProducer:
    """uint16 [N]: codes of the features as float16 holds them, whether they come from their column or from frames."""

    def __init__(self, column: TokensColumn, features: FeaturesProducer, bench: Bench) -> None:
        entry = registry.resolve(bench.config.zoo, column.tokenizer, kind="tokenizer")
        if entry.config.codebook_size > 1 << 16:
            raise ConfigError(
                f"columns: {entry.reference} has a codebook of {entry.config.codebook_size}; tokens are uint16"
            )
        self.tokenizer = registry.load_model(entry, bench.device)
        self.sizes = entry.config
        self.features, self.bench = features, bench
        parts = {
            **features.card.parts,
            "encoders": {entry.name: entry.fingerprint, **features.card.parts["encoders"]},
            "dtype": "uint16",
        }
        self.precision = column.precision
        # float32 columns keep the fingerprint they had before there was a choice
        if column.precision != "fp32":
            parts["precision"] = column.precision
        self.card = ColumnCard.of(entry.reference, parts, column.model_dump(mode="json"))
        self._planned: dict[str, Sidecar | None] = {}  # shard -> its features, where they are there

    def needs_frames(self, entry: ShardEntry) -> bool:
        sidecar = ColumnFolder(self.bench.config.data, "features").finished(
            entry, self.features.card.fingerprint
        )
        self._planned[entry.name] = sidecar
        return sidecar is None

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        sidecar = self._planned.pop(entry.name)
        features = self.features.begin(entry, clips) if sidecar is None else self._stored(sidecar)

        def encode(batch: Sequence[Clip]) -> list[Result]:
            known = [f if isinstance(f, ClipProblem) else self._fitting(f) for f in features(batch)]
            by_position = {clip.position: f for clip, f in zip(batch, known, strict=True)}
            return by_shape(batch, lambda clip: by_position[clip.position], self._compute)

        return encode

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        return {"bad_values": float((tensor.int() >= self.sizes.codebook_size).sum())}

    def collapse(self, counts: np.ndarray) -> str:
        return health.collapse(counts)

    def _stored(self, sidecar: Sidecar) -> Encode:
        reader = FolderReader(
            self.bench.config.data, "features", "features.safetensors", [sidecar.entry]
        )
        slots = {key: slot for slot, (key, _) in enumerate(sidecar.index)}

        def read(batch: Sequence[Clip]) -> list[Result]:
            return [
                reader.read_tensor(0, slots[clip.key])
                if clip.key in slots
                else ClipProblem("no_features", "set aside in column 'features'")
                for clip in batch
            ]

        return read

    def _fitting(self, features_TChw: Tensor) -> Result:
        found, wanted = (
            list(features_TChw.shape[1:]),
            [self.sizes.feature_channels, self.sizes.grid_height, self.sizes.grid_width],
        )
        return (
            features_TChw
            if found == wanted
            else ClipProblem("feature_size", f"features {found}, the tokenizer takes {wanted}")
        )

    def _compute(self, features: list[Tensor], keys: list[str]) -> Tensor:
        with self.bench.stages("tokens"):
            features_BTChw = torch.stack(features).float().to(self.bench.device)
            # each segment on its own, as the grammar of longer clips has it
            parts = features_BTChw.split(self.sizes.segment_frames, dim=1)
            bf16 = self.precision == "bf16"
            with torch.autocast(self.bench.device.type, torch.bfloat16, enabled=bf16):
                segments = [self.tokenizer.encode(part) for part in parts]
            return torch.cat(segments, dim=1).cpu().to(torch.uint16)


class LatentsProducer:
    """bfloat16 [T, C, H, W], scaled; [T, 2C, H, W] where it is mean and log-variance."""

    def __init__(self, column: LatentsColumn, codec: LatentCodec, bench: Bench) -> None:
        self.codec, self.seed, self.moments, self.bench = (
            codec,
            column.sample_seed,
            column.moments,
            bench,
        )
        parts = {
            "encoders": {codec.name: codec.fingerprint},
            "decoder": bench.config.decoder,
            "sample_seed": self.seed,
            "moments": self.moments,
            "dtype": "bfloat16",
        }
        self.card = ColumnCard.of(codec.name, parts, column.model_dump(mode="json"))

    def needs_frames(self, entry: ShardEntry) -> bool:
        return True

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        return lambda batch: by_shape(batch, self._frames, self._compute)

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """Decodes the latents back: "psnr" against the clip, in dB."""
        measured = {
            "bad_values": float((~tensor.isfinite()).sum()),
            "std": float(tensor.float().std()),
        }
        if clip.frames is not None and not measured["bad_values"]:
            latents = posterior_mean(
                tensor.float()[None].to(self.bench.device), self.codec.channels
            )
            shown = self.codec.decode(latents)[0].cpu()
            error = (shown.float() - torch.from_numpy(clip.frames).float()).square().mean()
            measured["psnr"] = float(10 * torch.log10(255**2 / error.clamp(min=1e-10)))
        return measured

    def collapse(self, counts: np.ndarray) -> str:
        return ""

    def _frames(self, clip: Clip) -> np.ndarray | ClipProblem:
        if clip.frames is None:
            return clip.problem
        length, height, width = clip.frames.shape[:3]
        if (length - 1) % self.codec.time:
            return ClipProblem("frame_count", f"{length} frames are not 1 + {self.codec.time}k")
        if height % self.codec.space or width % self.codec.space:
            return ClipProblem(
                "frame_size", f"{height}x{width} does not divide into cells of {self.codec.space}"
            )
        return clip.frames

    def _compute(self, videos: list[np.ndarray], keys: list[str]) -> Tensor:
        with self.bench.stages("latents"):
            if self.moments:
                return self.codec.encode_moments(self.bench.stack(videos)).bfloat16().cpu()
            length, height, width = videos[0].shape[:3]
            noise = None
            if self.seed is not None:
                shape = (
                    1 + (length - 1) // self.codec.time,
                    self.codec.channels,
                    height // self.codec.space,
                    width // self.codec.space,
                )
                noise = torch.stack([clip_noise(self.seed, key, shape) for key in keys]).to(
                    self.bench.device
                )
            return self.codec.encode(self.bench.stack(videos), noise).bfloat16().cpu()


class TextProducer:
    """bfloat16 [L, D]: the rows of each caption."""

    def __init__(self, column: TextColumn, encoder: TextEncoder, bench: Bench) -> None:
        self.encoder, self.bench, self.number = encoder, bench, column.caption
        self.cut_off = encoder.cut_off
        self.card = ColumnCard.of(
            encoder.name,
            {"encoders": {encoder.name: encoder.fingerprint}, "dtype": "bfloat16"},
            column.model_dump(mode="json"),
        )

    def needs_frames(self, entry: ShardEntry) -> bool:
        return False

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        captions = {
            clip.position: clip.meta.caption_number(self.number).strip()
            for clip in clips
            if clip.meta is not None
        }
        return ShardCaptions(captions, self._states, self.cut_off)

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        return {"bad_values": float((~tensor.isfinite()).sum()), "rows": float(tensor.shape[0])}

    def collapse(self, counts: np.ndarray) -> str:
        return ""

    def _states(self, captions: list[str]) -> list[Tensor]:
        with self.bench.stages("text"):
            states_BLD, lengths_B = self.encoder(captions)
            states_BLD = states_BLD.bfloat16().cpu()
            return [
                states[:length].clone()
                for states, length in zip(states_BLD, lengths_B.tolist(), strict=True)
            ]


class ShardCaptions:
    """Encodes each caption of a shard once, with the batch of the first clip that has it; later ones wait for that.

    Not once for all shards: a unit's bytes must not depend on what its task made before.
    """

    def __init__(
        self,
        captions: Mapping[int, str],
        encode: Callable[[list[str]], list[Tensor]],
        cut_off: Callable[[list[str]], list[str]],
    ) -> None:
        """`captions` by the clip's position in the shard; `cut_off`: what the encoder leaves out."""
        self._captions, self._encode, self._cut_off = captions, encode, cut_off
        self._truncated: set[str] = set()  # captions of which it leaves something out
        self._states: dict[str, Future[Tensor]] = {}
        self._new: dict[int, str] = {}  # position of the first clip that has it
        self._left: Counter[str] = Counter()  # clips that still want it
        self._lock = threading.Lock()
        for position, caption in captions.items():
            if caption:
                if caption not in self._states:
                    self._states[caption] = Future()
                    self._new[position] = caption
                self._left[caption] += 1

    def __call__(self, batch: Sequence[Clip]) -> list[Result]:
        new = [self._new[clip.position] for clip in batch if clip.position in self._new]
        if new:
            self._make(new)
        results = [self._result(clip) for clip in batch]
        with self._lock:
            for caption in (self._captions.get(clip.position) for clip in batch):
                if caption in self._states:
                    self._left[caption] -= 1
                    if not self._left[caption]:
                        del self._states[caption]
        return results

    @property
    def truncated(self) -> int:
        """Clips whose caption is longer than the encoder takes; after the last batch."""
        return sum(caption in self._truncated for caption in self._captions.values())

    def _make(self, captions: list[str]) -> None:
        try:
            for caption, end in zip(captions, self._cut_off(captions), strict=True):
                if end:
                    self._truncated.add(caption)
            states = self._encode(captions)
        except BaseException as error:
            for caption in captions:
                self._states[caption].set_exception(error)
            raise
        for caption, state in zip(captions, states, strict=True):
            self._states[caption].set_result(state)

    def _result(self, clip: Clip) -> Result:
        if clip.meta is None:
            return clip.problem
        states = self._states.get(self._captions[clip.position])
        return ClipProblem("empty_caption") if states is None else finite(states.result())


def clip_noise(seed: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise keyed by the clip, the same in every task and batch. Drawn on the CPU."""
    return torch.randn(shape, generator=keyed_random.generator(seed, "latents", key))


def producers(names: Sequence[str], bench: Bench) -> dict[str, Producer]:
    """What makes the columns `names` of the config; encoders are built here."""
    made: dict[str, Producer] = {}
    vision: dict[
        FeaturesColumn, FeaturesProducer
    ] = {}  # one for all columns that take the same features
    for name in names:
        match column := bench.config.columns[name]:
            case FeaturesColumn() | TokensColumn():
                features = FeaturesColumn(encoder=column.encoder, frame_stride=column.frame_stride)
                if features not in vision:
                    vision[features] = FeaturesProducer(
                        features, frozen.build(column.encoder, bench.device), bench
                    )
                made[name] = vision[features]
                if isinstance(column, TokensColumn):
                    made[name] = TokensProducer(column, vision[features], bench)
            case LatentsColumn():
                made[name] = LatentsProducer(
                    column, frozen.build(column.encoder, bench.device), bench
                )
            case TextColumn():
                made[name] = TextProducer(column, frozen.build(column.encoder, bench.device), bench)
    return made


def tokenizers(config: PrecomputeConfig) -> dict[str, str]:
    """{tokens column: name@fingerprint of the tokenizer that makes it now}."""
    found = {}
    for name, column in config.columns.items():
        if isinstance(column, TokensColumn):
            try:
                found[name] = registry.resolve(
                    config.zoo, column.tokenizer, kind="tokenizer"
                ).reference
            except ConfigError:
                found[name] = f"{column.tokenizer}, which is not in {config.zoo}"
    return found


# ------------------------------------------------------------------------------------------------ commands


def run(
    config: PrecomputeConfig,
    task: tuple[int, int] = (0, 1),
    progress: ProgressCallback | None = None,
) -> Summary:
    """Compute the columns of this task's shards; units that are finished stay as they are.

    Raises ConfigError where a folder holds another encoder's column, TooManyColumnRejects above `max_bad_fraction`.
    """
    return PrecomputeJob(config, read_manifest(config.data), task, producers, progress).run()


def status(config: PrecomputeConfig) -> list[ColumnStatus]:
    """What is done, running, failed and left of each column of the config; builds no encoder."""
    return precompute_status.column_status(config, read_manifest(config.data), tokenizers(config))


def retry(config: PrecomputeConfig, tasks: int) -> dict[str, str]:
    """{column: SLURM array expression of the tasks, of so many, that have work left}."""
    return precompute_status.retry_arrays(
        config, read_manifest(config.data), tasks, tokenizers(config)
    )


def finalize(config: PrecomputeConfig) -> Manifest:
    """Enter the config's columns into the manifest. Raises ShardError listing the shards that are missing."""
    return finalize_units(config.data, list(config.columns))


def estimate(config: PrecomputeConfig, clips: int = 16) -> Estimate:
    """Disk and hours of what is left, from a few clips; writes nothing."""
    return precompute_check.estimate_cost(config, read_manifest(config.data), producers, clips)


def verify(config: PrecomputeConfig, sample: float = 0.01) -> list[ColumnCheck]:
    """Read a share of the finished shards again, and make them again, in memory."""
    return precompute_check.verify_columns(config, read_manifest(config.data), producers, sample)
