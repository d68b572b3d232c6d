"""What a pipeline will cost, before anything starts: GPU hours, days and disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landiff.configs import ConfigError
from landiff.configs.durations import size
from landiff.data_pipeline.format.shards import ShardError, read_manifest
from landiff.launchers.budget.plan import plan_courses
from landiff.launchers.budget.step_time import GPUS, step_seconds

GPU = "h100"
MFU = 0.4
STATE_BYTES = 16  # of a parameter in a checkpoint: float32 weight, Adam's moments, moving average
ORDER = (("tokenizer",), ("lm",), ("diffusion-main", "diffusion-control"))
"""Trainers; the tokenizer is first, the other two lists run at the same time."""


@dataclass(frozen=True)
class TrainingCost:
    """What one training costs."""

    stem: str
    steps: int
    gpus: int
    seconds: float
    checkpoint_bytes: float

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return self.seconds * self.gpus / 3600


def outlook(configs: Mapping[str, Any], gpus: Mapping[str, int], workdir: Path) -> list[str]:
    """Lines with the cost of each training, of the data, and the total.

    configs: of the stages that run, by stem of the preset. gpus: of each trainer. Any: configs of
    their classes.
    """
    costs = {}
    for stem in gpus:
        if stem in configs:
            try:
                costs[stem] = training_cost(stem, configs[stem], gpus[stem])
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
        f"{size(checkpoints)} of checkpoints (for {GPU.upper()} at {MFU:.0%} of its peak; "
        "`landiff plan` has other GPUs, `landiff precompute estimate` the time of the columns)"
    )
    return lines


def training_cost(stem: str, config: Any, gpus: int) -> TrainingCost:
    """The cost of one training. Raises ConfigError if ranks and model do not divide."""
    courses = plan_courses(config, gpus, config.loop.steps)
    seconds = 0.0
    for course in courses:
        seconds += course.steps * step_seconds(course.plan, GPUS[GPU], MFU)
    parameters = max(courses[0].plan.parameters.values())
    kept = min(config.loop.keep_last, -(-config.loop.steps // config.loop.save_every))
    if config.loop.keep_every:
        kept += config.loop.steps // config.loop.keep_every
    return TrainingCost(stem, config.loop.steps, gpus, seconds, kept * parameters * STATE_BYTES)


def total_days(costs: Mapping[str, TrainingCost]) -> float:
    """Days from the start of the first training to the end of the last."""

    def days(stems: Sequence[str]) -> float:
        return sum(costs[stem].seconds for stem in stems if stem in costs) / 86400

    first, lm, diffusion = ORDER
    return days(first) + max(days(lm), days(diffusion))


def data_lines(configs: Mapping[str, Any], workdir: Path) -> list[str]:
    """Lines on the clips and their disk space, as far as they are known."""
    shards = configs.get("shards")
    if shards is None:
        return []
    shapes = ", ".join(shape.name for shape in shards.shapes)
    try:
        manifest = read_manifest(workdir / shards.data)
    except (ShardError, OSError):
        return [f"  clips             {shapes} from {shards.source}; their number is not known yet"]
    count = sum(shard.bytes for shard in manifest.shards)
    for column in manifest.columns.values():
        count += sum(shard.bytes for shard in column.shards)
    return [f"  clips             {manifest.num_samples:,} of {shapes}, {size(count)} so far"]
