"""Validation on held-out clips, in the same way for all trainers.

The clips, their order and all random numbers are fixed, so that metrics of different steps and runs
are comparable. An engine sums per clip in float64 (`Engine.validate`), the sums of all ranks are
added on the CPU, and the engine computes metrics from them (`Engine.summarize`). The metrics are
therefore bit-identical in one layout, and differ only by rounding between layouts.
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
    by_bucket: dict[str, dict[str, Tensor]] = {}
    clips: dict[str, int] = {}
    for batch in loader.held_out:
        sums = by_bucket.setdefault(batch.bucket, {})
        for name, value in engine.validate(batch).items():
            sums[name] = sums[name] + value if name in sums else value
        clips[batch.bucket] = clips.get(batch.bucket, 0) + sum(batch.counted)
        run.world.beat()
    for bucket, sums in by_bucket.items():
        by_bucket[bucket] = sum_over_ranks(sums, run)
    if len(by_bucket) == 1:
        (sums,) = by_bucket.values()
        metrics = engine.summarize(sums)
    else:
        counts = torch.tensor(list(clips.values()), dtype=torch.float64)
        metrics = _over_buckets(engine, by_bucket, sum_over_ranks({"clips": counts}, run)["clips"])
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _over_buckets(
    engine: Engine, by_bucket: Mapping[str, Mapping[str, Tensor]], clips: Tensor
) -> dict[str, float]:
    """Metrics over several buckets, and the loss of each: `loss_17x64x64`.

    clips: number of clips of each bucket. Where the shapes of sums depend on the bucket, the
        metrics that all buckets have are averaged over the clips. Otherwise the sums are added.
    """
    of_buckets = {bucket: engine.summarize(sums) for bucket, sums in by_bucket.items()}
    first, *others = by_bucket.values()
    shapes = {name: value.shape for name, value in first.items()}
    if all({name: value.shape for name, value in sums.items()} == shapes for sums in others):
        pooled = {name: sum(sums[name] for sums in others) + first[name] for name in first}
        metrics = engine.summarize(pooled)
    else:
        metrics = {}
        weights = (clips / clips.sum()).tolist()
        for name in next(iter(of_buckets.values())):
            if all(name in found for found in of_buckets.values()):
                values = [found[name] for found in of_buckets.values()]
                pairs = zip(values, weights, strict=True)
                metrics[name] = sum(value * weight for value, weight in pairs)
    for bucket, found in of_buckets.items():
        metrics[f"loss_{bucket}"] = found["loss"]
    return metrics


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
