"""Validation on held-out clips, in the same way for all trainers.

The clips, their order and all draws are fixed, so that numbers of two steps or two runs compare.
An engine sums per clip in float64 (`Engine.validate`), the sums of all ranks are added on the CPU,
and the engine turns them into metrics (`Engine.summarize`). The numbers are therefore equal on one
layout, and differ by rounding only between layouts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from landiff.training.engine import BatchSource, Engine
from landiff.training.run import Run


def validate(engine: Engine, loader: BatchSource, run: Run) -> dict[str, float]:
    """Metrics of all held-out clips by tag.

    "val/..." is of the weights that are trained, "val_ema/..." of their moving average if the run
    has one. Collective. Equal on all ranks.
    """
    metrics = _measure(engine, loader, run, "val")
    if run.has_ema:
        with engine.weights(ema=True):
            metrics |= _measure(engine, loader, run, "val_ema")
    return metrics


@torch.no_grad()
def _measure(engine: Engine, loader: BatchSource, run: Run, prefix: str) -> dict[str, float]:
    """Metrics of the weights that forward passes read now, tagged with `prefix`."""
    sums: dict[str, Tensor] = {}
    for batch in loader.held_out:
        for name, value in engine.validate(batch).items():
            sums[name] = sums[name] + value if name in sums else value
        run.heartbeat.beat(run.world.step)
    metrics = engine.summarize(sum_over_ranks(sums, run))
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def sum_over_ranks(sums: Mapping[str, Tensor], run: Run) -> dict[str, Tensor]:
    """The sums of all ranks, on the CPU. One all-reduce over the control group."""
    for name, value in sums.items():
        assert value.dtype == torch.float64, (name, value.dtype)
    shapes = [value.shape for value in sums.values()]
    flat = torch.cat([value.detach().cpu().flatten() for value in sums.values()])
    parts = run.world.sum(flat).split([shape.numel() for shape in shapes])
    summed = {}
    for name, shape, part in zip(sums, shapes, parts, strict=True):
        summed[name] = part.view(shape)
    return summed
