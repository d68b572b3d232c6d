"""Packing of samples into one row for the language model, and a cache of a row for sampling.

The sequences of the samples are concatenated. Each has its own positions and its own attention.

Shape letters (docs/glossary.md): N tokens of the row, B samples in it, M text rows of all samples,
D width of a text state, S tokens that are new to a cache, A heads of this rank, d width of a head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.schema import RawSample
from landiff.data_pipeline.loading.loader import Sample
from landiff.model_zoo import keyed_random
from landiff.model_zoo.attention import attention
from landiff.model_zoo.device import to_device
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.model_zoo.token_layout import NUM_MICRO_CONDITIONS, TokenLayout, TrainingRow
from landiff.training.lm.config import CHUNKS, LMTrainConfig
from landiff.training.observe.flops import lm_flops


@dataclass(frozen=True)
class LMRow:
    """One micro-batch as a packed row.

    ids_N: IGNORE at condition positions.
    targets_N: the next token of each position, already shifted by one.
    weights_N: 1 where the target counts in the loss, else 0, float32.
    positions_N: from 0 in every sample.
    cu_seqlens: start of each sample, followed by N, int32 [B + 1]. With padding at the end of the
        row, the start of the padding comes before N: [B + 2].
    max_seqlen: length of the longest sample, or of the padding.
    text_at_M: positions of the text in the row.
    drop_text_M: where the null vector replaces the text, bool.
    frames_B: number of semantic frames, float32.
    motion_score_B: float32.
    grid_B2: rows and columns of feature cells, float32.
    frames_at_B, motion_at_B: positions of the micro-conditions in the row.
    bounds: `cu_seqlens` on the host.
    num_tokens: tokens without padding.
    flops: model FLOPs of the samples.
    """

    ids_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    positions_N: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    text_MD: Tensor
    text_at_M: Tensor
    drop_text_M: Tensor
    frames_B: Tensor
    motion_score_B: Tensor
    grid_B2: Tensor
    frames_at_B: Tensor
    motion_at_B: Tensor
    bounds: tuple[int, ...]
    num_tokens: int
    flops: float

    def to(self, device: torch.device) -> LMRow:
        """A copy of the row with all tensors on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = to_device(value, device)
        return replace(self, **moved)

    def part(self, places: Sequence[int], *, conditions: bool, multiple: int = 1) -> LMRow:
        """The positions `places` of the row, to append to those that a cache holds.

        conditions: whether they are the first part of all samples, with all their conditions.
        Otherwise they have none. The part is filled up to `multiple` with copies of its last
        position. It has neither targets nor samples.
        """
        count = len(places)
        filled = [*places, *[places[-1]] * (pad_to(count, multiple) - count)]
        at_S = torch.tensor(filled, device=self.ids_N.device)
        changes: dict[str, Any] = {
            "ids_N": self.ids_N[at_S],
            "targets_N": self.targets_N[at_S],
            "weights_N": torch.zeros_like(self.weights_N[at_S]),
            "positions_N": self.positions_N[at_S],
            "num_tokens": count,
        }
        place_of = {place: number for number, place in enumerate(places)}
        for name in CONDITION_PLACES:
            kept = getattr(self, name)[: None if conditions else 0]
            moved = [place_of[place] for place in kept.tolist()]
            changes[name] = torch.tensor(moved, dtype=torch.int64, device=at_S.device)
        if not conditions:
            for name in CONDITIONS:
                changes[name] = getattr(self, name)[:0]
        return replace(self, **changes)


class LazyRows(Sequence[LMRow]):
    """Rows of a step, each of which is made at its first access and kept.

    So the host packs and copies a row while the device computes the rows before it.
    """

    def __init__(self, count: int, make: Callable[[int], LMRow]) -> None:
        """`make(number)`: the row of a micro-batch, one of `count`."""
        self._rows: list[LMRow | None] = [None] * count
        self._make = make

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        """The row of micro-batch `number`. Slices are not supported."""
        row = self._rows[number]
        if row is None:
            row = self._make(number)
            self._rows[number] = row
        return row


CONDITION_PLACES = ("text_at_M", "frames_at_B", "motion_at_B")
CONDITIONS = ("text_MD", "drop_text_M", "frames_B", "motion_score_B", "grid_B2")


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a row, and the keys that their queries attend to.

    Queries are tokens `start` to `end`, keys `first_key` to `end`: from the beginning of the first
    sample. query_ends, key_ends: where queries and keys of each sample end, counted from the first.
    """

    start: int
    end: int
    first_key: int
    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]

    @staticmethod
    def of(bounds: Sequence[int], start: int, end: int) -> Span:
        """bounds: start of each sample of the row, followed by the length of the row."""
        first_key = start
        query_ends = []
        key_ends = []
        for sample_start, sample_end in itertools.pairwise(bounds):
            if sample_end <= start or sample_start >= end:
                continue
            first_key = min(first_key, sample_start)
            query_ends.append(min(sample_end, end) - start)
            key_ends.append(min(sample_end, end) - first_key)
        return Span(start, end, first_key, tuple(query_ends), tuple(key_ends))

    @property
    def longest(self) -> int:
        """Number of keys of the sample that has the most here."""
        ends = (0, *self.key_ends)
        return max(end - before for before, end in itertools.pairwise(ends))


def pad_to(size: int, *multiples: int) -> int:
    """The smallest number, not below `size`, that is a multiple of all `multiples`."""
    multiple = math.lcm(*multiples)
    return -(-size // multiple) * multiple


def text_is_dropped(seed: int, index: int, probability: float) -> bool:
    """Text dropout of a sample as a Bernoulli variable, keyed by seed and sample index.

    `index`: number of the sample in the run. The result does not depend on ranks or rows.
    """
    generator = keyed_random.generator(seed, "text-dropout", index)
    return bool(torch.rand((), generator=generator) < probability)


def motion_condition(motion_score: float) -> float:
    """The model's micro-condition for a motion score: the score itself.

    How the scores of the released model were measured is unknown (§4.4). Those of
    `landiff.data_pipeline.video.motion` are optical flow in frame heights per second, which for
    ordinary clips lies in the same range of 0 to 1.
    """
    return float(motion_score)


def grid_of(meta: RawSample) -> tuple[int, int]:
    """Rows and columns of feature cells of a clip."""
    return ClipShape(meta.num_frames, meta.height, meta.width).grid


def pack(
    samples: Sequence[Sample], config: LMTrainConfig, layout: TokenLayout, *, train: bool = True
) -> LMRow:
    """One row of all `samples`, with text dropout if `train`.

    The row is padded to the multiple that the parallel layout needs. The padding is a sequence of
    its own. Raises ConfigError with the sample's key for tokens of another tokenizer, text of
    another width, or a sample that is too long.
    """
    rows = [_training_row(sample, config, layout) for sample in samples]
    length = sum(len(row) for row in rows)
    padding = _padded_length(length, config) - length
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    ends = list(starts)
    if padding:
        ends.append(length + padding)
    text_offset = 1 + NUM_MICRO_CONDITIONS  # text comes after BOS, frames and motion score
    dropout = config.text_dropout if train else 0.0
    texts = []
    text_positions = []
    dropped = []
    num_frames = []
    motion_scores = []
    grids = []
    flops = 0.0
    for sample, row, start in zip(samples, rows, starts, strict=False):
        text = sample.tensors[config.text_column]
        drop = text_is_dropped(config.loop.seed, sample.index, dropout)
        texts.append(text)
        text_positions.append(torch.arange(len(text)) + start + text_offset)
        dropped.append(torch.full((len(text),), drop))
        num_frames.append(float(layout.num_frames(sample.tensors[config.tokens_column].numel())))
        motion_scores.append(motion_condition(sample.meta.motion_score))
        grids.append(grid_of(sample.meta))
        adapter = config.lora is not None
        flops += lm_flops(config.model, len(row), len(text), adapter=adapter).total
    starts_B = torch.tensor(starts[:-1])

    def joined(name: str, fill: int) -> Tensor:
        """An array of all samples, with the padding filled with `fill`."""
        parts = [torch.from_numpy(getattr(row, name)) for row in rows]
        return torch.cat([*parts, torch.full((padding,), fill, dtype=parts[0].dtype)])

    return LMRow(
        ids_N=joined("input_ids", layout.pad),
        targets_N=joined("targets", layout.pad),
        weights_N=joined("loss_weights", 0),
        positions_N=joined("positions", 0),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        max_seqlen=max(padding, *(len(row) for row in rows)),
        text_MD=torch.cat(texts),
        text_at_M=torch.cat(text_positions),
        drop_text_M=torch.cat(dropped),
        frames_B=torch.tensor(num_frames),
        motion_score_B=torch.tensor(motion_scores),
        grid_B2=torch.tensor(grids, dtype=torch.float32),
        frames_at_B=starts_B + 1,
        motion_at_B=starts_B + 2,
        bounds=tuple(ends),
        num_tokens=length,
        flops=flops,
    )


def _padded_length(length: int, config: LMTrainConfig) -> int:
    """Length of a row of `length` tokens with padding."""
    parallel = config.parallel
    parts = 1
    if parallel.context > 1:
        parts = CHUNKS * parallel.context
    if parallel.sequence:
        # Each context-parallel rank divides its part over the tensor-parallel ones.
        parts = math.lcm(parts, parallel.context * parallel.tensor)
    return pad_to(length, config.row_multiple, parts)


def _training_row(sample: Sample, config: LMTrainConfig, layout: TokenLayout) -> TrainingRow:
    """Inputs and targets of one sample. Raises ConfigError if it does not fit the model."""
    text = sample.tensors[config.text_column]
    if text.ndim != 2 or text.shape[1] != config.model.text_dim:
        raise ConfigError(
            f"sample {sample.key}: column {config.text_column} holds {tuple(text.shape)}, "
            f"the model takes rows of model.text_dim = {config.model.text_dim}"
        )
    if len(text) > config.model.max_text_tokens:
        raise ConfigError(
            f"sample {sample.key}: column {config.text_column} has {len(text)} rows, more than "
            f"model.max_text_tokens = {config.model.max_text_tokens}"
        )
    try:
        row = layout.training_row(sample.tensors[config.tokens_column].numpy(), len(text))
    except ValueError as error:
        raise ConfigError(f"sample {sample.key}, column {config.tokens_column}: {error}") from None
    if len(row) > config.model.max_positions:
        raise ConfigError(
            f"sample {sample.key} has {len(row)} positions ({len(text)} of text), "
            f"more than model.max_positions = {config.model.max_positions}"
        )
    return row


@dataclass(frozen=True)
class NewPositions:
    """The positions of one sample that a forward pass appends, as places in the whole row.

    start: first position of the sample.
    first, end: the new positions are first, first + 1, ..., end - 1. All before them are cached.
    """

    start: int
    first: int
    end: int

    def __len__(self) -> int:
        """Number of new positions."""
        return self.end - self.first


class RowCache:
    """Keys and values of all layers of this rank for a packed row of `length` positions.

    For sampling with the model that is trained: each layer appends keys and values of the new
    positions, which attend to all earlier ones of the same sample.

    parts: what the next forward pass appends, in the order of its positions. Positions of that pass
        beyond them are padding.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.parts: Sequence[NewPositions] = ()
        self._layers: dict[int, Tensor] = {}  # [2, N, A, d] by number

    def attend(self, layer: int, q_SAd: Tensor, k_SAd: Tensor, v_SAd: Tensor) -> Tensor:
        """Append keys and values of a layer, and attend causally within each sample, [S, A, d]."""
        if layer not in self._layers:
            shape = (2, self.length, *k_SAd.shape[1:])
            self._layers[layer] = k_SAd.new_empty(shape)
        keys_NAd, values_NAd = self._layers[layer].unbind(0)
        attended_SAd = torch.zeros_like(q_SAd)
        start = 0
        for part in self.parts:
            if not len(part):
                continue
            end = start + len(part)
            keys_NAd[part.first : part.end] = k_SAd[start:end]
            values_NAd[part.first : part.end] = v_SAd[start:end]
            attended_SAd[start:end] = attention(
                q_SAd[None, start:end],
                keys_NAd[None, part.start : part.end],
                values_NAd[None, part.start : part.end],
                causal=True,
            )[0]
            start = end
        return attended_SAd
