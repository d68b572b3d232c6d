"""The cost of all trainings of a preset, with the columns they read: `landiff plan all`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from landiff.configs.durations import size
from landiff.launchers.budget.budget_plan import (
    GIB,
    BudgetPlan,
    CheckpointSize,
    checkpoint_bytes,
    kept_checkpoints,
)
from landiff.launchers.budget.courses import plan_courses
from landiff.launchers.budget.precompute import ENCODER_MFU, clip_cost
from landiff.launchers.budget.step_time import Gpu, Speed, fits
from landiff.launchers.stages import AnyTrainConfig
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.training.config import LoopConfig

ORDER = (("tokenizer",), ("lm",), ("diffusion-main", "diffusion-control"))
"""Trainers; the tokenizer is first, the other two lists run at the same time."""


@dataclass(frozen=True)
class TrainingCost:
    """What one training costs.

    checkpoint_bytes: of all checkpoints that are kept. memory: bytes on the fullest GPU.
    """

    stem: str
    steps: int
    gpus: int
    seconds: float
    checkpoint_bytes: float
    memory: int = 0
    fits: bool = True

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return self.seconds * self.gpus / 3600


def training_cost(
    stem: str, config: AnyTrainConfig, gpus: int, gpu: Gpu, speed: Speed
) -> TrainingCost:
    """The cost of one training. Raises ConfigError if ranks and model do not divide."""
    steps = config.loop.steps
    courses = plan_courses(config, gpus, steps)
    fullest = max((course.plan for course in courses), key=lambda plan: plan.total_memory)
    return TrainingCost(
        stem,
        steps,
        gpus,
        sum(course.steps * course.step_seconds(gpu, speed) for course in courses),
        checkpoint_size(config, fullest).of(kept_checkpoints(config.loop, steps)),
        fullest.total_memory,
        fits(fullest, gpu),
    )


def total_days(costs: Mapping[str, TrainingCost]) -> float:
    """Days from the start of the first training to the end of the last."""

    def days(stems: Sequence[str]) -> float:
        return sum(costs[stem].seconds for stem in stems if stem in costs) / 86400

    first, lm, diffusion = ORDER
    return days(first) + max(days(lm), days(diffusion))


@dataclass(frozen=True)
class PrecomputeCost:
    """What the columns of all clips cost. bytes: of the columns alone, without the videos."""

    clips: int
    gpu_hours: float
    bytes: float


def precompute_cost(configs: Mapping[str, Any], clips: int, gpu: Gpu) -> PrecomputeCost:
    """The columns of `clips` clips of the tokenizer's shape. Any: configs of a preset by stem."""
    tokenizer = configs["tokenizer"].model
    frames = 4 * (tokenizer.segment_frames - 1) + 1
    shape = ClipShape(frames, 16 * tokenizer.grid_height, 16 * tokenizer.grid_width)
    cost = clip_cost(configs["features"], shape, tokenizer)
    cost += clip_cost(configs["precompute"], shape, tokenizer)
    seconds = clips * cost.flops / (gpu.peak_tflops * 1e12 * ENCODER_MFU)
    return PrecomputeCost(clips, seconds / 3600, clips * cost.bytes)


def format_total(
    costs: Mapping[str, TrainingCost],
    precompute: PrecomputeCost | None,
    gpu: Gpu,
    price: float | None,
) -> str:
    """A table of all stages with their sum.

    price: of a GPU hour, in any currency. None prints no costs.
    """
    title = f"{'stage':<18}{'steps':>10}{'GPUs':>7}{'GPU hours':>12}{'days':>9}{'GiB':>8}"
    title += f"{'checkpoints':>13}"
    if price is not None:
        title += f"{'cost':>14}"
    lines = [title]

    def add(name: str, cells: str, hours: float, days: float, memory: str, disk: float) -> None:
        line = f"{name:<18}{cells:>17}{hours:>12,.1f}{days:>9.2f}{memory:>8}{size(disk):>13}"
        if price is not None:
            line += f"{hours * price:>14,.0f}"
        lines.append(line)

    hours = 0.0
    disk = 0.0
    if precompute is not None:
        hours += precompute.gpu_hours
        disk += precompute.bytes
        add("precompute", f"{precompute.clips:,} clips", hours, hours / 24, "", precompute.bytes)
    for cost in costs.values():
        hours += cost.gpu_hours
        disk += cost.checkpoint_bytes
        memory = f"{cost.memory / GIB:.1f}"
        cells = f"{cost.steps:,}{cost.gpus:>7,}"
        add(
            cost.stem,
            cells,
            cost.gpu_hours,
            cost.seconds / 86400,
            memory,
            cost.checkpoint_bytes,
        )
        if not cost.fits:
            lines[-1] += f"  does NOT fit {gpu.memory_gib:g} GiB"
    add("all", "", hours, total_days(costs), "", disk)
    lines.append(
        "days of all: the language model and the diffusion model train at the same time; "
        "precompute: days of one GPU, on as many as there are"
    )
    if precompute is None:
        lines.append("precompute is not counted: give the number of clips, --clips")
    return "\n".join(lines)


def checkpoint_size(config: AnyTrainConfig, plan: BudgetPlan) -> CheckpointSize:
    """Size of a checkpoint of a planned training."""
    weights = plan.parameters["all"]
    return checkpoint_bytes(config, weights, plan.parameters.get("trained", weights))


def format_disk(size: CheckpointSize, loop: LoopConfig, steps: int) -> str:
    """Text about the disk that the checkpoints of a run of `steps` steps take."""
    kept = kept_checkpoints(loop, steps)
    shared = ""
    if size.shared:
        shared = f" and {size.shared / 1e9:,.1f} GB of frozen weights that all share"
    return (
        f"disk        {size.own / 1e9:,.1f} GB a checkpoint{shared}, {kept} kept at the end: "
        f"{size.of(kept) / 1e9:,.0f} GB, and one more while it is written"
    )
