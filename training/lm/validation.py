"""Metrics of the language model on held-out clips.

Shape letters (docs/glossary.md): N tokens of a packed row, B samples in it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from landiff.data_pipeline.loading.samples import HeldOutBatch, Sample
from landiff.model_zoo.evaluate.conditions import KINDS, VALUES, Targets, target_places, token_sums
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.lm.batch import LMRow, pack
from landiff.training.lm.config import LMTrainConfig
from landiff.training.observe.charts import Charts

CHARTS: Charts = {
    "loss": {
        "loss": ["train/loss", "val(_ema)?/loss"],
        "codes of I and P frames": ["val(_ema)?/loss_(codes|iframe|pframe)"],
        "structural tokens": ["val(_ema)?/loss_structural"],
        "by frame": ["val/loss_frame_.*"],
        "by segment": ["val/loss_segment_.*"],
    },
    "use of captions": {
        "own caption and another clip's": ["val/loss_own_caption", "val/loss_other_caption"],
        "gain by the own caption": ["val(_ema)?/caption_gain"],
    },
    "accuracy": {"accuracy": ["val(_ema)?/accuracy.*"]},
    "samples": {
        "distance from data": ["val(_ema)?/sampled_.*_distance"],
        "codebook perplexity": ["val/(sampled|data)_perplexity"],
        "fraction of codes in use": ["val/(sampled|data)_used_fraction"],
    },
}


@dataclass(frozen=True)
class ValidationRow:
    """A packed row of held-out clips, and which target each of its positions predicts."""

    row: LMRow
    targets: Targets

    @property
    def ids_N(self) -> Tensor:
        """The ids of the row."""
        return self.row.ids_N

    def to(self, device: torch.device) -> ValidationRow:
        """A copy with all tensors on `device`."""
        targets = [value.to(device) for value in vars(self.targets).values()]
        return ValidationRow(self.row.to(device), Targets(*targets))


def own_row(batch: HeldOutBatch, config: LMTrainConfig, layout: TokenLayout) -> ValidationRow:
    """The clips of a batch with their own captions."""
    return _validation_row(batch, batch.samples, config, layout)


def other_row(batch: HeldOutBatch, config: LMTrainConfig, layout: TokenLayout) -> ValidationRow:
    """The clips of a batch with the captions of their partners."""
    column = config.text_column
    samples = []
    for sample, other in zip(batch.samples, batch.others, strict=True):
        text_LD = (other or sample).tensors[column]
        samples.append(replace(sample, tensors={**sample.tensors, column: text_LD}))
    return _validation_row(batch, samples, config, layout)


def _validation_row(
    batch: HeldOutBatch, samples: Sequence[Sample], config: LMTrainConfig, layout: TokenLayout
) -> ValidationRow:
    row = pack(samples, config, layout, train=False)
    length = len(row.ids_N)
    frame_N = np.full(length, -1, dtype=np.int64)
    is_code_N = np.zeros(length, dtype=bool)
    has_partner_N = np.zeros(length, dtype=bool)
    ends = row.cu_seqlens.tolist()[1:]
    for number, (sample, end) in enumerate(zip(samples, ends, strict=False)):
        if not batch.counted[number]:
            continue
        frames, codes = target_places(layout, sample.tensors[config.tokens_column].numel())
        # The last position predicts nothing, and each one before it the token that follows.
        body = slice(end - 1 - len(frames), end - 1)
        frame_N[body] = frames
        is_code_N[body] = codes
        has_partner_N[body] = batch.others[number] is not None
    arrays = [torch.from_numpy(array) for array in (frame_N, is_code_N, has_partner_N)]
    return ValidationRow(row, Targets(row.targets_N, *arrays))


def max_frames(layout: TokenLayout, max_positions: int) -> int:
    """An upper bound of the frames of a clip."""
    return max_positions // (layout.pframe_tokens + 2) + 1


def forward_step(
    rows: Iterator[ValidationRow], model: nn.Module, frames: int
) -> tuple[Tensor, Callable]:
    """Forward of the next row, and the function that computes its sums from the logits.

    As `landiff.training.lm.engine.forward_step`, for Megatron-core's schedule.
    """
    row = next(rows)

    def sums(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A loss and a number of targets that nobody uses, and the report: `token_sums`."""
        report = token_sums(logits_NV, row.targets, frames)
        unused = logits_NV.new_zeros(())
        return unused, unused.to(torch.int), report

    return model(row.row, logits=True), sums


def named_sums(reports: Sequence[Tensor], frames: int, device: torch.device) -> dict[str, Tensor]:
    """The reports of both rows by name: own captions and those of the partners.

    Zeros if there are no reports.
    """
    shape = (len(KINDS), frames, len(VALUES))
    if not reports:
        reports = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2)]
    own, other = reports
    return {"own_caption": own, "other_caption": other}


def summarize_sums(sums: Mapping[str, Tensor], layout: TokenLayout) -> dict[str, float]:
    """Metrics by name, from the sums over all clips. Losses are in nats per token."""
    codes, structural, own = sums["own_caption"]
    is_iframe = torch.arange(len(codes)) % layout.segment_frames == 0
    groups = {
        "": codes.sum(0) + structural.sum(0),
        "_codes": codes.sum(0),
        "_structural": structural.sum(0),
        "_iframe": codes[is_iframe].sum(0),
        "_pframe": codes[~is_iframe].sum(0),
    }
    metrics = {}
    for suffix, values in groups.items():
        loss, correct, count = values.tolist()
        if count:
            metrics[f"loss{suffix}"] = loss / count
            metrics[f"accuracy{suffix}"] = correct / count
    for name, parts in (("frame", codes.split(1)), ("segment", codes.split(layout.segment_frames))):
        for number, part in enumerate(parts):
            loss, _, count = part.sum(0).tolist()
            if count:
                metrics[f"loss_{name}_{number:02d}"] = loss / count
    own_loss, _, count = own.sum(0).tolist()
    other_loss, _, _ = sums["other_caption"][2].sum(0).tolist()
    if count:
        metrics["loss_own_caption"] = own_loss / count
        metrics["loss_other_caption"] = other_loss / count
        metrics["caption_gain"] = (other_loss - own_loss) / count
    return metrics
