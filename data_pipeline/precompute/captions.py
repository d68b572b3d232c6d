"""Producer of captions: written by a vision-language model, or read from a file by key.

A column of captions holds, for each clip, a JSON list of texts as UTF-8 bytes, uint8 [N].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.configs.files import sha256_file
from landiff.data_pipeline.format.columns import FolderReader
from landiff.data_pipeline.format.schema import RawSample, ShardEntry
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, Result
from landiff.data_pipeline.precompute.config import CaptionFileConfig, CaptionsColumn
from landiff.data_pipeline.precompute.interface import BatchCache, Encode, ProducerContext
from landiff.data_pipeline.precompute.units import ColumnCard, ColumnFolder
from landiff.model_zoo.frozen.config import VlmConfig

PART = "captions.safetensors"
MAX_LINE = 1 << 20  # characters of a line of JSONL


def pack_captions(captions: Sequence[str]) -> Tensor:
    """Captions as a tensor, uint8 [N]."""
    text = json.dumps(list(captions), ensure_ascii=False, separators=(",", ":"))
    return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())


def unpack_captions(tensor: Tensor) -> list[str]:
    """The captions in a tensor of a column. Raises ValueError for other content."""
    captions = json.loads(tensor.numpy().tobytes().decode())
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"{str(captions)[:80]} is not a list of captions")
    return captions


class Captioner(Protocol):
    """Writes captions of clips with their frames."""

    name: str
    fingerprint: str

    def __call__(
        self, videos: Sequence[np.ndarray], fields: Sequence[dict[str, Any]]
    ) -> list[list[str]]:
        """Captions of uint8 videos [T, H, W, 3]."""
        ...


class _CaptionsProducer:
    """What both producers of captions have in common."""

    card: ColumnCard

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """Count captions and their words. Bytes that are no captions are bad values."""
        try:
            captions = unpack_captions(tensor)
        except ValueError:
            return {"bad_values": float(tensor.numel())}
        words = sum(len(caption.split()) for caption in captions)
        return {"bad_values": 0.0, "captions": float(len(captions)), "words": float(words)}

    def collapse(self, counts: np.ndarray) -> str:
        """Captions have no codes."""
        return ""


class ModelCaptionsProducer(_CaptionsProducer):
    """Writes captions with a vision-language model."""

    def __init__(
        self, column: CaptionsColumn, captioner: Captioner, context: ProducerContext
    ) -> None:
        self.captioner = captioner
        self.context = context
        parts = {
            "encoders": {captioner.name: captioner.fingerprint},
            "decoder": context.config.decoder,
            "dtype": "uint8",
        }
        self.card = ColumnCard.of(captioner.name, parts, column.model_dump(mode="json"))

    def prepare(self, entry: ShardEntry) -> bool:
        """The model sees frames."""
        return True

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        """The captioner, which is the same for all shards."""
        return self.encode

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Write the captions of a batch. A clip with an empty one is rejected."""
        readable = [clip for clip in batch if clip.frames is not None and clip.meta is not None]
        videos = [clip.frames for clip in readable if clip.frames is not None]
        fields = [prompt_fields(clip.meta) for clip in readable if clip.meta is not None]
        with self.context.encoding("captions"):
            captions = self.captioner(videos, fields) if videos else []
        written = {clip.key: texts for clip, texts in zip(readable, captions, strict=True)}
        results: list[Result] = []
        for clip in batch:
            if clip.key not in written:
                results.append(clip.required_problem())
            elif not all(written[clip.key]):
                results.append(ClipProblem("empty_caption", "the model wrote nothing"))
            else:
                results.append(pack_captions(written[clip.key]))
        return results


def prompt_fields(meta: RawSample) -> dict[str, Any]:
    """Values for the fields of prompts."""
    return {"caption": meta.caption, "seconds": round(meta.num_frames / meta.fps, 1)}


class FileCaptionsProducer(_CaptionsProducer):
    """Takes captions from a file."""

    def __init__(self, column: CaptionsColumn, config: CaptionFileConfig) -> None:
        self.captions = read_captions(config)
        self.by = config.by
        parts = {
            "encoders": {config.path.name: sha256_file(config.path)[:16]},
            "key": config.key,
            "by": config.by,
            "captions": list(config.captions),
            "dtype": "uint8",
        }
        self.card = ColumnCard.of(config.path.name, parts, column.model_dump(mode="json"))

    def prepare(self, entry: ShardEntry) -> bool:
        """No frames are needed."""
        return False

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        """The look-up, which is the same for all shards."""
        return self.encode

    def encode(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Look up the captions of a batch. A clip without any is rejected."""
        results: list[Result] = []
        for clip in batch:
            if clip.meta is None:
                results.append(clip.required_problem())
                continue
            name = clip.key if self.by == "key" else clip.meta.source
            captions = self.captions.get(name)
            if captions:
                results.append(pack_captions(captions))
            else:
                results.append(ClipProblem("no_caption", f"the file has none for {name}"))
        return results


def read_captions(config: CaptionFileConfig) -> dict[str, list[str]]:
    """Captions by key. Raises ConfigError for a file that cannot be read or lacks a column."""
    rows = _parquet_rows(config) if config.path.suffix == ".parquet" else _json_rows(config.path)
    found: dict[str, list[str]] = {}
    try:
        for place, row in rows:
            key = _field(row, config.key, place, config)
            captions: list[str] = []
            for column in config.captions:
                value = _field(row, column, place, config)
                captions += [value] if isinstance(value, str) else list(value or ())
            texts = [" ".join(str(text).split()) for text in captions]
            if key in found:
                raise ConfigError(
                    f"columns: {config.path}, {place}: the key {key!r} occurs twice; remove one of "
                    "its rows"
                )
            found[str(key)] = [text for text in texts if text]
    except OSError as error:
        raise ConfigError(f"columns: {config.path} cannot be read: {error}") from None
    return found


def _field(row: Mapping[str, Any], name: str, place: str, config: CaptionFileConfig) -> Any:
    if name not in row:
        raise ConfigError(
            f"columns: {config.path}, {place} has no column {name!r}; it has {', '.join(row)}; set "
            "`key` and `captions` of the column"
        )
    return row[name]


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a JSONL file with their places."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line) if len(line) <= MAX_LINE else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ConfigError(
                    f"columns: {path}, line {number} is not a JSON object: {line[:80]!r}"
                )
            yield f"line {number}", row


def _lines(file: Iterable[str]) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise ConfigError(f"columns: the file of captions is not UTF-8: {error}") from None


def _parquet_rows(config: CaptionFileConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a parquet file with their places."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(
            f"columns: {config.path} needs the package pyarrow ({error}); pip install "
            "'landiff-pretrain[parquet]', or write the captions as JSONL"
        ) from None
    try:
        with parquet.ParquetFile(config.path) as file:
            wanted = [config.key, *config.captions]
            known = file.schema_arrow.names
            columns = [name for name in known if name in wanted]
            for name in wanted:
                _field(dict.fromkeys(known), name, "its schema", config)
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except ArrowException as error:
        raise ConfigError(f"columns: {config.path} is not a parquet file: {error}") from None


class StoredCaptions:
    """Reads a finished column of captions for the text columns that encode it."""

    def __init__(self, data: Path, name: str) -> None:
        """Raises ConfigError if no shard of the column was made yet."""
        self._data = data
        self._name = name
        self._folder = ColumnFolder(data, name)
        card = self._folder.card()
        if card is None:
            raise ConfigError(
                f"columns: there is no column {name!r} in {data}; write its captions first, with "
                "`landiff captions`, or add it to `columns`"
            )
        self.fingerprint = card.fingerprint

    def read(self, entry: ShardEntry) -> dict[str, list[str]]:
        """Captions of the clips of a shard by key, without the rejected ones.

        Raises ConfigError if they are not written yet.
        """
        sidecar = self._folder.finished(entry, self.fingerprint)
        if sidecar is None:
            raise ConfigError(
                f"columns: shard {entry.name} of column {self._name!r} is not finished; run "
                "`landiff captions` to its end first"
            )
        reader = FolderReader(self._data, self._name, PART, [sidecar.entry])
        captions = {}
        for slot, (key, _) in enumerate(sidecar.index):
            captions[key] = unpack_captions(reader.read_tensor(0, slot))
        reader.close()
        return captions


def build_captions(
    column: CaptionsColumn, context: ProducerContext
) -> ModelCaptionsProducer | FileCaptionsProducer:
    """The producer of a column of captions. Raises ConfigError."""
    if isinstance(column.encoder, CaptionFileConfig):
        return FileCaptionsProducer(column, column.encoder)
    assert isinstance(column.encoder, VlmConfig), column
    from landiff.model_zoo.frozen import vlm

    return ModelCaptionsProducer(column, vlm.build(column.encoder, context.device), context)
