"""Samples -> one packed row: sequences laid end to end, each with its own positions and its own attention.

Letters: N tokens of the row, S samples in it, M text states of all of them, D width of a text state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.data_pipeline.loading.loader import Sample
from landiff.model_zoo.token_layout import NUM_MICRO_CONDITIONS, TokenLayout, TrainingRow
from landiff.training import rng
from landiff.training.lm.config import LMTrainConfig


@dataclass(frozen=True)
class LMRow:
    """One micro-batch. Condition positions of `ids_N` hold `IGNORE`; the shift by one is done in `targets_N`."""

    ids_N: Tensor
    targets_N: Tensor
    weights_N: Tensor  # float32: 1 where the target counts in the loss
    positions_N: Tensor  # from 0 in every sample
    cu_seqlens: Tensor  # int32 [S + 1], or one more where padding ends the row: where each sample starts, and N
    max_seqlen: int
    text_MD: Tensor
    text_at_M: Tensor  # places in the row
    drop_text_M: Tensor  # bool: the null vector stands there instead
    frames_S: Tensor  # float32, number of semantic frames
    motion_score_S: Tensor  # float32
    frames_at_S: Tensor
    motion_at_S: Tensor
    num_tokens: int  # without padding

    def to(self, device: torch.device) -> LMRow:
        """A copy of the row with all tensors on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


def pad_to(size: int, *multiples: int) -> int:
    """`size`, or the next number that all of `multiples` divide."""
    multiple = math.lcm(*multiples)
    return -(-size // multiple) * multiple


def text_is_dropped(seed: int, index: int, probability: float) -> bool:
    """Whether the sample at place `index` of the run trains without its text. Never depends on ranks or rows."""
    return bool(torch.rand((), generator=rng.generator(seed, "text-dropout", index)) < probability)


def motion_condition(motion_score: float) -> float:
    """The number the model is told about a clip's motion: the score of `landiff.data_pipeline.video.motion` as it is.

    How the released model's scores were measured is unknown (§4.4); ours are flow in frame heights per second,
    which for ordinary clips lie in the same range of 0 to 1.
    """
    return float(motion_score)


def pack(
    samples: Sequence[Sample], config: LMTrainConfig, layout: TokenLayout, *, train: bool = True
) -> LMRow:
    """One row of all `samples`, with text dropout if `train`, padded with a sequence of its own to a multiple of what the layout asks for.

    Raises ValueError with the sample's key for codes of another tokenizer, text of another width, or too long.
    """
    rows = [_training_row(sample, config, layout) for sample in samples]
    length = sum(map(len, rows))
    padding = (
        pad_to(
            length, config.row_multiple, config.parallel.tensor if config.parallel.sequence else 1
        )
        - length
    )
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    texts = [sample.tensors[config.text_column] for sample in samples]
    behind = 1 + NUM_MICRO_CONDITIONS  # BOS, frames, motion score
    at = [
        torch.arange(len(text)) + start + behind for text, start in zip(texts, starts, strict=False)
    ]
    dropout = config.text_dropout if train else 0.0
    dropped = [
        torch.full((len(text),), text_is_dropped(config.loop.seed, sample.index, dropout))
        for text, sample in zip(texts, samples, strict=True)
    ]
    begins = torch.tensor(starts[:-1])

    def joined(name: str, fill: int) -> Tensor:
        parts = [torch.from_numpy(getattr(row, name)) for row in rows]
        return torch.cat([*parts, torch.full((padding,), fill, dtype=parts[0].dtype)])

    return LMRow(
        ids_N=joined("input_ids", layout.pad),
        targets_N=joined("targets", layout.pad),
        weights_N=joined("loss_weights", 0),
        positions_N=joined("positions", 0),
        cu_seqlens=torch.tensor(starts + [length + padding] * (padding > 0), dtype=torch.int32),
        max_seqlen=max(padding, *map(len, rows)),
        text_MD=torch.cat(texts),
        text_at_M=torch.cat(at),
        drop_text_M=torch.cat(dropped),
        frames_S=torch.tensor(
            [float(layout.num_frames(s.tensors[config.tokens_column].numel())) for s in samples]
        ),
        motion_score_S=torch.tensor([motion_condition(s.meta.motion_score) for s in samples]),
        frames_at_S=begins + 1,
        motion_at_S=begins + 2,
        num_tokens=length,
    )


def _training_row(sample: Sample, config: LMTrainConfig, layout: TokenLayout) -> TrainingRow:
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
