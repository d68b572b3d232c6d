"""Producers of features, tokens and latents. captions.py and texts.py have those of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.columns import FolderReader
from landiff.data_pipeline.format.schema import ShardEntry, Sidecar
from landiff.data_pipeline.precompute.captions import build_captions
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, Result, by_shape
from landiff.data_pipeline.precompute.config import (
    CaptionsColumn,
    EmbeddingColumn,
    FeaturesColumn,
    LatentsColumn,
    PrecomputeConfig,
    ScoreColumn,
    TextColumn,
    TokensColumn,
)
from landiff.data_pipeline.precompute.interface import BatchCache, Encode, Producer, ProducerContext
from landiff.data_pipeline.precompute.scores import EmbeddingProducer, build_scores
from landiff.data_pipeline.precompute.texts import TextProducer
from landiff.data_pipeline.precompute.units import ColumnCard, ColumnFolder
from landiff.model_zoo import frozen, health, keyed_random, registry
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.frozen.base import HasBlocks, LatentCodec, VisionFeatures, posterior_mean
from landiff.model_zoo.frozen.config import VisionConfig, semantic_frame_indices
from landiff.model_zoo.layers import require_compiler

if TYPE_CHECKING:
    from landiff.model_zoo.tokenizer import SemanticTokenizer


class FeaturesProducer:
    """Computes vision features of the semantic frames, float16 [T, C, h, w]."""

    def __init__(
        self, column: FeaturesColumn, encoder: VisionFeatures, context: ProducerContext
    ) -> None:
        self.stride = column.frame_stride
        self.encoder = encoder
        self.context = context
        parts = {
            "encoders": {encoder.name: encoder.fingerprint},
            "decoder": context.config.decoder,
            "frame_stride": self.stride,
            "dtype": "float16",
        }
        self.card = ColumnCard.of(encoder.name, parts, column.model_dump(mode="json"))

    def prepare(self, entry: ShardEntry) -> bool:
        """Features are always computed from frames."""
        return True

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        """Return the encoder, which is the same for all shards."""
        return self.encode

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Compute the features of a batch, on the CPU."""
        results: list[Result] = []
        for result in self.on_device(batch, cache):
            results.append(result.cpu() if isinstance(result, Tensor) else result)
        return results

    def on_device(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Compute the features of a batch once, although several columns may use them."""
        if self.card.fingerprint not in cache:
            cache[self.card.fingerprint] = by_shape(batch, self._frames, self._compute)
        return cache[self.card.fingerprint]

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """Count non-finite values and measure mean and standard deviation."""
        return {
            "bad_values": float((~tensor.isfinite()).sum()),
            "mean": float(tensor.float().mean()),
            "std": float(tensor.float().std()),
        }

    def collapse(self, counts: np.ndarray) -> str:
        """Features have no codes."""
        return ""

    def _frames(self, clip: Clip) -> np.ndarray | ClipProblem:
        """Select the semantic frames of a clip, uint8 [T, H, W, 3]."""
        if clip.frames is None:
            return clip.required_problem()
        length, height, width = clip.frames.shape[:3]
        if (length - 1) % self.stride:
            return ClipProblem("frame_count", f"{length} frames are not 1 + {self.stride}k")
        if height % self.encoder.cell or width % self.encoder.cell:
            return ClipProblem(
                "frame_size", f"{height}x{width} does not divide into cells of {self.encoder.cell}"
            )
        return clip.frames[semantic_frame_indices(length, 1 + (length - 1) // self.stride)]

    def _compute(self, frames: list[np.ndarray], keys: list[str]) -> Tensor:
        """Encode videos of one shape, float16 [B, T, C, h, w] on the device."""
        frames_BTHWC = self.context.stack(frames)
        with self.context.encoding("features"):
            return self.encoder(frames_BTHWC).half()


class TokensProducer:
    """Computes semantic tokens, uint16 [N], from features rounded to float16.

    Features are read from their column if it is finished for a shard, and computed otherwise.
    Both give the same tokens.
    """

    def __init__(
        self, column: TokensColumn, features: FeaturesProducer, context: ProducerContext
    ) -> None:
        entry = registry.resolve(context.config.zoo, column.tokenizer, kind="tokenizer")
        assert isinstance(entry.config, TokenizerConfig), type(entry.config)
        if entry.config.codebook_size > 1 << 16:
            raise ConfigError(
                f"columns: {entry.reference} has a codebook of {entry.config.codebook_size} codes; "
                f"tokens are uint16, so use a tokenizer with at most {1 << 16}"
            )
        self.tokenizer = cast("SemanticTokenizer", registry.load_model(entry, context.device))
        compile_if_chosen(self.tokenizer, context)
        self.sizes = entry.config
        self.grids = {(entry.config.grid_height, entry.config.grid_width)}
        self.grids.update(shape.grid for shape in entry.buckets)
        self.features = features
        self.context = context
        self.precision = column.precision
        parts = {
            **features.card.parts,
            "encoders": {entry.name: entry.fingerprint, **features.card.parts["encoders"]},
            "dtype": "uint16",
        }
        # columns computed before `precision` existed are float32 and keep their fingerprint
        if column.precision != "fp32":
            parts["precision"] = column.precision
        self.card = ColumnCard.of(entry.reference, parts, column.model_dump(mode="json"))
        # by shard: sidecar of its finished features, None if they have to be computed
        self._stored_features: dict[str, Sidecar | None] = {}

    def prepare(self, entry: ShardEntry) -> bool:
        """Use the stored features of a shard if they are finished, else its frames."""
        folder = ColumnFolder(self.context.config.data, "features")
        sidecar = folder.finished(entry, self.features.card.fingerprint)
        self._stored_features[entry.name] = sidecar
        return sidecar is None

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        """Return an encoder that uses the features chosen by `prepare`."""
        sidecar = self._stored_features.pop(entry.name)
        read_features: Encode = self.features.on_device
        if sidecar is not None:
            read_features = self._stored(sidecar)

        def encode(batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
            """Compute the tokens of a batch."""
            features: dict[int, Result] = {}
            for clip, result in zip(batch, read_features(batch, cache), strict=True):
                features[clip.position] = self._checked(result)
            return by_shape(batch, lambda clip: features[clip.position], self._compute)

        return encode

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """Count tokens that are not in the codebook."""
        return {"bad_values": float((tensor.int() >= self.sizes.codebook_size).sum())}

    def collapse(self, counts: np.ndarray) -> str:
        """Describe a histogram of codes that shows a collapsed codebook, "" for any other."""
        return health.collapse(counts)

    def _stored(self, sidecar: Sidecar) -> Encode:
        """Return a reader of one shard's stored features."""
        reader = FolderReader(
            self.context.config.data, "features", "features.safetensors", [sidecar.entry]
        )
        slots = {key: slot for slot, (key, _) in enumerate(sidecar.index)}

        def read(batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
            """Read the features of a batch."""
            results: list[Result] = []
            for clip in batch:
                if clip.key in slots:
                    results.append(reader.read_tensor(0, slots[clip.key]))
                else:
                    results.append(ClipProblem("no_features", "rejected in column 'features'"))
            return results

        return read

    def _checked(self, features: Result) -> Result:
        """Return features [T, C, h, w], or a ClipProblem if the tokenizer cannot encode them."""
        if isinstance(features, ClipProblem):
            return features
        sizes = self.sizes
        channels, height, width = features.shape[1:]
        if channels != sizes.feature_channels or (height, width) not in self.grids:
            grids = [[sizes.feature_channels, *grid] for grid in sorted(self.grids)]
            known = " or ".join(map(str, grids))
            return ClipProblem(
                "feature_size",
                f"features {[channels, height, width]}, the tokenizer is built for {known}",
            )
        return features

    def _compute(self, features: list[Tensor], keys: list[str]) -> Tensor:
        """Encode features of one shape, uint16 [B, N] on the CPU."""
        features_BTChw = self.context.stack(features)
        with self.context.encoding("tokens"):
            features_BTChw = features_BTChw.float()
            # longer clips are encoded segment by segment (docs/specification.md §4.2)
            segments = features_BTChw.split(self.sizes.segment_frames, dim=1)
            bf16 = self.precision == "bf16"
            with torch.autocast(self.context.device.type, torch.bfloat16, enabled=bf16):
                tokens = [self.tokenizer.encode(segment) for segment in segments]
            return torch.cat(tokens, dim=1).cpu().to(torch.uint16)


class LatentsProducer:
    """Computes scaled latents, bfloat16 [T, C, H, W].

    With `moments`, stores mean and log-variance, [T, 2C, H, W].
    """

    def __init__(self, column: LatentsColumn, codec: LatentCodec, context: ProducerContext) -> None:
        self.codec = codec
        self.seed = column.sample_seed
        self.moments = column.moments
        self.context = context
        parts = {
            "encoders": {codec.name: codec.fingerprint},
            "decoder": context.config.decoder,
            "sample_seed": self.seed,
            "moments": self.moments,
            "dtype": "bfloat16",
        }
        self.card = ColumnCard.of(codec.name, parts, column.model_dump(mode="json"))

    def prepare(self, entry: ShardEntry) -> bool:
        """Latents are always computed from frames."""
        return True

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        """Return the encoder, which is the same for all shards."""
        return self.encode

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Compute the latents of a batch."""
        return by_shape(batch, self._frames, self._compute)

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """Count non-finite values, measure the standard deviation and decode the latents.

        "psnr" compares the decoded video with the clip, in dB.
        """
        measured = {
            "bad_values": float((~tensor.isfinite()).sum()),
            "std": float(tensor.float().std()),
        }
        if clip.frames is not None and not measured["bad_values"]:
            stored = tensor.float()[None].to(self.context.device)
            latents = posterior_mean(stored, self.codec.channels)
            decoded = self.codec.decode(latents)[0].cpu()
            error = (decoded.float() - torch.from_numpy(clip.frames).float()).square().mean()
            measured["psnr"] = float(10 * torch.log10(255**2 / error.clamp(min=1e-10)))
        return measured

    def collapse(self, counts: np.ndarray) -> str:
        """Latents have no codes."""
        return ""

    def _frames(self, clip: Clip) -> np.ndarray | ClipProblem:
        """Return the frames of a clip that the codec can encode, uint8 [T, H, W, 3]."""
        if clip.frames is None:
            return clip.required_problem()
        length, height, width = clip.frames.shape[:3]
        if (length - 1) % self.codec.time:
            return ClipProblem("frame_count", f"{length} frames are not 1 + {self.codec.time}k")
        if height % self.codec.space or width % self.codec.space:
            return ClipProblem(
                "frame_size", f"{height}x{width} does not divide into cells of {self.codec.space}"
            )
        return clip.frames

    def _compute(self, videos: list[np.ndarray], keys: list[str]) -> Tensor:
        """Encode videos of one shape, bfloat16 on the CPU."""
        video_BTHWC = self.context.stack(videos)
        with self.context.encoding("latents"):
            if self.moments:
                return self.codec.encode_moments(video_BTHWC).bfloat16().cpu()
            noise = None
            if self.seed is not None:
                noise = self._noise(self.seed, keys, video_BTHWC)
            return self.codec.encode(video_BTHWC, noise).bfloat16().cpu()

    def _noise(self, seed: int, keys: list[str], video_BTHWC: Tensor) -> Tensor:
        """Draw the noise of each clip's posterior sample, [B, T, C, H, W] of latents."""
        length, height, width = video_BTHWC.shape[1:4]
        shape = (
            1 + (length - 1) // self.codec.time,
            self.codec.channels,
            height // self.codec.space,
            width // self.codec.space,
        )
        noise = torch.stack([clip_noise(seed, key, shape) for key in keys])
        return noise.to(self.context.device)


def clip_noise(seed: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise keyed by seed and clip, independent of task and batch.

    Drawn on the CPU, so that all devices give the same values.
    """
    return torch.randn(shape, generator=keyed_random.generator(seed, "latents", key))


def compile_if_chosen(encoder: object, context: ProducerContext) -> None:
    """Compile the blocks of an encoder that has any, with `compile_blocks` of the config."""
    if context.config.compile_blocks and isinstance(encoder, HasBlocks):
        require_compiler(context.device)
        encoder.compile_blocks()


def build_producers(names: Sequence[str], context: ProducerContext) -> dict[str, Producer]:
    """Build the encoders and producers of the columns `names` of the config."""
    built: dict[str, Producer] = {}
    vision: dict[FeaturesColumn, FeaturesProducer] = {}

    def features(encoder: VisionConfig, frame_stride: int) -> FeaturesProducer:
        """One producer for all columns that use the same features."""
        key = FeaturesColumn(encoder=encoder, frame_stride=frame_stride)
        if key not in vision:
            network = frozen.build(encoder, context.device)
            compile_if_chosen(network, context)
            vision[key] = FeaturesProducer(key, network, context)
        return vision[key]

    for name in names:
        column = context.config.columns[name]
        match column:
            case FeaturesColumn():
                built[name] = features(column.encoder, column.frame_stride)
            case TokensColumn():
                shared = features(column.encoder, column.frame_stride)
                built[name] = TokensProducer(column, shared, context)
            case EmbeddingColumn():
                shared = features(column.encoder, column.frame_stride)
                built[name] = EmbeddingProducer(column, shared)
            case ScoreColumn():
                built[name] = build_scores(column, context, features)
            case LatentsColumn():
                codec = frozen.build(column.encoder, context.device)
                built[name] = LatentsProducer(column, codec, context)
            case CaptionsColumn():
                built[name] = build_captions(column, context)
            case TextColumn():
                text_encoder = frozen.build(column.encoder, context.device)
                compile_if_chosen(text_encoder, context)
                built[name] = TextProducer(column, text_encoder, context)
    return built


def tokenizer_references(config: PrecomputeConfig) -> dict[str, str]:
    """Map each tokens column to the name@fingerprint that its tokenizer resolves to now."""
    references = {}
    for name, column in config.columns.items():
        if not isinstance(column, TokensColumn):
            continue
        try:
            entry = registry.resolve(config.zoo, column.tokenizer, kind="tokenizer")
        except ConfigError:
            references[name] = f"{column.tokenizer}, which is not in {config.zoo}"
        else:
            references[name] = entry.reference
    return references
