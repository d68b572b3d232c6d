"""The cost of a pipeline before it starts: GPU hours, days and disk space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from landiff.configs import ConfigError
from landiff.configs.durations import size
from landiff.data_pipeline.format.shards import ShardError, read_manifest
from landiff.launchers.budget.step_time import GPUS, Speed
from landiff.launchers.budget.total import total_days, training_cost

GPU = "h100"
MFU = 0.4


def outlook(configs: Mapping[str, Any], gpus: Mapping[str, int], workdir: Path) -> list[str]:
    """Lines with the cost of each training, of the data, and the total.

    configs: of the stages that run, by stem of the preset. gpus: of each trainer. Any: configs of
    their classes.
    """
    costs = {}
    for stem in gpus:
        if stem in configs:
            try:
                costs[stem] = training_cost(stem, configs[stem], gpus[stem], GPUS[GPU], Speed(MFU))
            except ConfigError:
                continue  # reported by the checks
    lines = ["plan"]
    for cost in costs.values():
        lines.append(
            f"  {cost.stem:<18}{cost.steps:>9,} steps on {cost.gpus} GPUs: {cost.gpu_hours:,.1f} "
            f"GPU hours, {cost.seconds / 86400:.2f} days"
        )
    lines += data_lines(configs, workdir)
    hours = sum(cost.gpu_hours for cost in costs.values())
    checkpoints = sum(cost.checkpoint_bytes for cost in costs.values())
    lines.append(
        f"total: {hours:,.1f} GPU hours, {total_days(costs):.2f} days of training, "
        f"{size(checkpoints)} of checkpoints (for {GPU.upper()} at an MFU of {MFU:.0%}; "
        "`landiff plan` has other GPUs, `landiff precompute estimate` the time of the columns)"
    )
    return lines


def data_lines(configs: Mapping[str, Any], workdir: Path) -> list[str]:
    """Lines on the clips and their disk space, as far as they are known."""
    shards = configs.get("shards")
    if shards is None:
        return []
    shapes = ", ".join(shape.name for shape in shards.shapes)
    try:
        manifest = read_manifest(workdir / shards.data)
    except (ShardError, OSError):
        sources = ", ".join(shards.sources)
        return [f"  clips             {shapes} from {sources}; their number is not known yet"]
    count = sum(shard.bytes for shard in manifest.shards)
    for column in manifest.columns.values():
        count += sum(shard.bytes for shard in column.shards)
    return [f"  clips             {manifest.num_samples:,} of {shapes}, {size(count)} so far"]
