"""Producers of embeddings and scores, from which trainers choose clips (`data.where`).

embedding-NAME  float16 [C]  mean vision features of the semantic frames, of length 1
score-NAME      float32 [1]  a number: a measure of the frames, the output of a head on the
                             embedding, or the similarity to an earlier clip
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.configs.files import sha256_file
from landiff.data_pipeline.format.column_checks import check_column_fingerprints
from landiff.data_pipeline.format.columns import FolderReader
from landiff.data_pipeline.format.schema import ShardEntry
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.ingest.config import FiltersConfig
from landiff.data_pipeline.ingest.filters import Filters, brightness, repeated_fraction
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, Result, finite
from landiff.data_pipeline.precompute.config import (
    DuplicateScore,
    EmbeddingColumn,
    MeasureScore,
    NetworkScore,
    ScoreColumn,
)
from landiff.data_pipeline.precompute.interface import BatchCache, Encode, Producer, ProducerContext
from landiff.data_pipeline.precompute.units import ColumnCard

ROWS_AT_ONCE = 1 << 16  # embeddings that are compared with a batch in one product
LAYER = re.compile(r"(?:.*\.)?(\d+)\.(weight|bias)")


class FeatureSource(Protocol):
    """The producer of vision features."""

    card: ColumnCard

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Features of a batch, float16 [T, C, h, w] each."""
        ...


class _FrameColumn:
    """What all producers of numbers from frames have in common."""

    card: ColumnCard

    def prepare(self, entry: ShardEntry) -> bool:
        """Frames are needed."""
        return True

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        """The encoder, which is the same for all shards."""
        return self.encode

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Compute the values of a batch."""
        raise NotImplementedError

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """Count non-finite values, and report the mean."""
        values = tensor.float()
        return {"bad_values": float((~values.isfinite()).sum()), "mean": float(values.mean())}

    def collapse(self, counts: np.ndarray) -> str:
        """There are no codes."""
        return ""


class EmbeddingProducer(_FrameColumn):
    """Mean of a clip's vision features over time and space, of length 1."""

    def __init__(self, column: EmbeddingColumn | ScoreColumn, features: FeatureSource) -> None:
        self.features = features
        parts = {**features.card.parts, "pooling": "mean of all cells, normalized"}
        parts["dtype"] = "float16"
        self.card = ColumnCard.of(
            features.card.encoder, parts, column.model_dump(mode="json", exclude_none=True)
        )

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Pool the features of a batch, float16 [C]."""
        return [pooled(result) for result in self.features.encode(batch, cache)]


def pooled(features: Result) -> Result:
    """Features [T, C, h, w] -> embedding, float16 [C]. Problems are returned."""
    if isinstance(features, ClipProblem):
        return features
    mean_C = features.float().mean((0, 2, 3))
    return finite((mean_C / mean_C.norm().clamp(min=1e-6)).half())


class MeasureProducer(_FrameColumn):
    """A measure of the frames that needs no network, or the area of recognized text."""

    def __init__(self, column: ScoreColumn, measure: MeasureScore, decoder: str) -> None:
        self._measure = _measure(measure)
        parts: dict[str, Any] = {"encoders": {}, "measure": measure.measure}
        parts |= {"decoder": decoder, "dtype": "float32"}
        self.card = ColumnCard.of(measure.measure, parts, column.model_dump(mode="json"))

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Measure the clips of a batch, float32 [1]."""
        results: list[Result] = []
        for clip in batch:
            if clip.frames is None:
                results.append(clip.required_problem())
            else:
                results.append(torch.tensor([self._measure(clip.frames)], dtype=torch.float32))
        return results


def _measure(config: MeasureScore) -> Callable[[np.ndarray], float]:
    """The function from frames to a number. Raises ConfigError if a package is missing."""
    match config.measure:
        case "brightness":
            return brightness
        case "static":
            return repeated_fraction
        case "text_area":
            return Filters(FiltersConfig(text_area_max=1.0)).text_area


class NetworkProducer(_FrameColumn):
    """The output of a head on the embedding: aesthetic score, NSFW, watermark for instance."""

    def __init__(
        self, column: ScoreColumn, head: NetworkScore, embedding: EmbeddingProducer
    ) -> None:
        self.embedding = embedding
        self.head = Head(head)
        encoders = dict(embedding.card.parts["encoders"])
        encoders[head.path.name] = sha256_file(head.path)[:16]
        parts = {**embedding.card.parts, "encoders": encoders, "dtype": "float32"}
        parts |= {"activation": head.activation, "output": head.output, "index": head.index}
        self.card = ColumnCard.of(head.path.name, parts, column.model_dump(mode="json"))

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Score the clips of a batch, float32 [1]."""
        results: list[Result] = []
        for result in self.embedding.encode(batch, cache):
            if isinstance(result, Tensor):
                result = finite(self.head(result.float()))
            results.append(result)
        return results


class Head:
    """Linear layers of a safetensors file, in the order of their numbers."""

    def __init__(self, config: NetworkScore) -> None:
        """Read the layers. Raises ConfigError for a file without or with other layers."""
        self.config = config
        self.layers: list[tuple[Tensor, Tensor | None]] = []
        try:
            tensors = load_file(config.path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"columns: head.path = {config.path} cannot be read: {error}"
            ) from None
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            match = LAYER.fullmatch(name)
            number, kind = (int(match[1]), match[2]) if match else (0, name)
            found.setdefault(number, {})[kind] = tensor.float()
        width: int | None = None
        for number in sorted(found):
            layer = found[number]
            weight = layer.pop("weight", None)
            bias = layer.pop("bias", None)
            if weight is None or weight.dim() != 2 or layer or width not in (None, weight.shape[1]):
                raise ConfigError(
                    f"columns: head.path = {config.path} holds no chain of linear layers "
                    f"0.weight, 0.bias, 2.weight ...: layer {number} does not fit; it has "
                    f"{', '.join(tensors)}"
                )
            self.layers.append((weight, bias))
            width = weight.shape[0]
        if width is None or config.index >= width:
            raise ConfigError(
                f"columns: head.index = {config.index}, but {config.path} has {width or 0} outputs"
            )

    def __call__(self, value_C: Tensor) -> Tensor:
        """The score of an embedding, float32 [1]. Raises ConfigError for another width."""
        expected = self.layers[0][0].shape[1]
        if len(value_C) != expected:
            raise ConfigError(
                f"columns: head.path = {self.config.path} takes embeddings of width {expected}, "
                f"the encoder makes {len(value_C)}; name the encoder that it was trained on"
            )
        for number, (weight, bias) in enumerate(self.layers):
            if number:
                value_C = _activation(self.config.activation)(value_C)
            value_C = torch.nn.functional.linear(value_C, weight, bias)
        if self.config.output == "sigmoid":
            value_C = value_C.sigmoid()
        elif self.config.output == "softmax":
            value_C = value_C.softmax(0)
        return value_C[self.config.index].reshape(1)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda value: value,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
    }
    return functions[name]


class DuplicateProducer(_FrameColumn):
    """The largest cosine similarity to an earlier clip, 0 if that is negative or there is none.

    The mean of all embeddings is subtracted first: it is what all clips have in common.
    Earlier clips are those of earlier shards, and of earlier positions in the same shard. A clip
    below a threshold has no near duplicate before it, whatever the threshold is.
    """

    def __init__(self, column: ScoreColumn, head: DuplicateScore, data: Path) -> None:
        """Raises ConfigError if the column of embeddings is not in the manifest."""
        manifest = read_manifest(data)
        name = head.embedding
        if name not in manifest.columns:
            raise ConfigError(
                f"columns: head.embedding = {name} is not in the manifest of {data}, which has "
                f"{', '.join(manifest.columns) or 'no columns'}; compute it with a run of `landiff "
                "precompute` of its own first"
            )
        check_column_fingerprints(manifest, [name])
        self._data = data
        self._name = name
        self._manifest = manifest
        self._rows: Tensor | None = None
        self._places: dict[str, int] = {}
        self._lock = threading.Lock()
        parts = {
            "encoders": dict(manifest.columns[name].config.get("encoders", {})),
            "embedding": manifest.columns[name].fingerprint,
            "shards": manifest.fingerprint,
            "score": "largest cosine similarity to an earlier clip, centered",
            "dtype": "float32",
        }
        self.card = ColumnCard.of(f"duplicates of {name}", parts, column.model_dump(mode="json"))

    def prepare(self, entry: ShardEntry) -> bool:
        """Embeddings are stored."""
        return False

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Compare each clip of a batch with all clips before it, float32 [1]."""
        rows_NC = self._embeddings()
        results: list[Result] = []
        for clip in batch:
            place = self._places.get(clip.key)
            if place is None:
                results.append(ClipProblem("no_embedding", f"rejected in column {self._name!r}"))
                continue
            nearest = 0.0
            for start in range(0, place, ROWS_AT_ONCE):
                part_NC = rows_NC[start : min(place, start + ROWS_AT_ONCE)].float()
                nearest = max(nearest, float((part_NC @ rows_NC[place].float()).max()))
            results.append(torch.tensor([nearest], dtype=torch.float32))
        return results

    def _embeddings(self) -> Tensor:
        """All embeddings in the order of the shards, centered, float16 [N, C]; read once."""
        with self._lock:
            if self._rows is None:
                column = self._manifest.columns[self._name]
                reader = FolderReader(
                    self._data, self._name, "embedding.safetensors", column.shards, keep=1
                )
                rows: list[Tensor] = []
                for shard, entry in enumerate(column.shards):
                    for slot in range(entry.samples):
                        self._places[reader.index(shard).keys[slot]] = len(rows)
                        rows.append(reader.read_tensor(shard, slot))
                reader.close()
                self._rows = centered(torch.stack(rows)) if rows else torch.zeros(0, 1)
            return self._rows


def centered(rows_NC: Tensor) -> Tensor:
    """Embeddings without their mean, of length 1, float16 [N, C]."""
    mean_C = rows_NC.mean(0, dtype=torch.float64).float()
    for start in range(0, len(rows_NC), ROWS_AT_ONCE):
        part_NC = rows_NC[start : start + ROWS_AT_ONCE].float() - mean_C
        rows_NC[start : start + ROWS_AT_ONCE] = torch.nn.functional.normalize(part_NC, dim=1).half()
    return rows_NC


def build_scores(
    column: ScoreColumn, context: ProducerContext, features: Callable[[Any, int], FeatureSource]
) -> Producer:
    """The producer of a column of scores. Raises ConfigError.

    `features` builds, or returns, the producer of vision features of (encoder, frame stride).
    """
    head = column.head
    if isinstance(head, MeasureScore):
        return MeasureProducer(column, head, context.config.decoder)
    if isinstance(head, DuplicateScore):
        return DuplicateProducer(column, head, context.config.data)
    embedding = EmbeddingProducer(column, features(head.encoder, head.frame_stride))
    return NetworkProducer(column, head, embedding)
