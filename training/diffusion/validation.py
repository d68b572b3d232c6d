"""Metrics of the diffusion model on held-out clips.

Shape letters (docs/glossary.md): B batch, L text rows, D width of a text state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from landiff.data_pipeline.loading.samples import HeldOutBatch
from landiff.training.diffusion.step import Objective
from landiff.training.observe.charts import Charts

CHARTS: Charts = {"loss": {"loss": ["train/loss", "val(_ema)?/loss"]}}
TIMESTEP_FRACTION = 0.5  # of the schedule


def clip_sums(model: nn.Module, objective: Objective, batch: HeldOutBatch) -> dict[str, Tensor]:
    """Sum of the losses of the counted clips, and their number: float64 [2].

    Collective with ZeRO-3. All clips have the same timestep, their text, and no prefix.
    """
    config = objective.config
    inputs = objective.inputs([replace(sample, position=0) for sample in batch.samples])
    texts = [sample.tensors[config.text_column].float() for sample in batch.samples]
    timestep = int(TIMESTEP_FRACTION * config.schedule.num_timesteps)
    inputs = replace(
        inputs,
        text_BLD=torch.stack(texts).to(objective.device),
        timestep_B=torch.full_like(inputs.timestep_B, timestep),
        prefix_B=torch.zeros_like(inputs.prefix_B),
    )
    loss_B = objective.loss(model, inputs).per_sample.double()
    counted_B = torch.tensor(batch.counted, device=objective.device).double()
    return {"loss": torch.stack([(loss_B * counted_B).sum(), counted_B.sum()])}


def summarize_sums(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics by name, from the sums over all clips."""
    loss, count = sums["loss"].tolist()
    return {"loss": loss / count}
