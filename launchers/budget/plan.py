"""The command `landiff plan`: the cost of a training config, or the layouts that fit a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from landiff.configs import ConfigError, load
from landiff.data_pipeline.loading.phases import batch_sizes
from landiff.launchers.budget.budget_plan import GIB, BudgetPlan, element_bytes
from landiff.launchers.budget.models import make_plan
from landiff.launchers.budget.search import format_candidates, search
from landiff.launchers.budget.step_time import GPUS, fits, step_seconds
from landiff.launchers.project.presets import preset_config, require_preset
from landiff.launchers.stages import TRAINERS, AnyTrainConfig
from landiff.training.config import LoopConfig
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig


def plan_command(args: argparse.Namespace) -> int:
    """Prints the cost of a config, or with --search a ranking of layouts. Returns the exit code."""
    steps_are_valid = args.steps is None or args.steps >= 1
    if args.gpus < 1 or not 0 < args.mfu <= 1 or not steps_are_valid:
        raise ConfigError(
            f"--gpus {args.gpus} --mfu {args.mfu:g} --steps {args.steps}: give at least one GPU, "
            "at least one step, and a fraction of the peak above 0 and at most 1"
        )
    name = args.config
    if args.preset is not None:
        require_preset(args.preset)
        stem = "diffusion-main" if args.stage == "diffusion" else args.stage
        name = preset_config(args.preset, stem)
    config: AnyTrainConfig = load(TRAINERS[args.stage].config_class, name, args.overrides)
    if args.search:
        found = search(config, args.gpus, GPUS[args.gpu], args.mfu)
        if not found:
            raise ConfigError(
                f"no layout of {name} fits {args.gpus} x {args.gpu}; use more or larger GPUs"
            )
        print(format_candidates(found, args.top))
        return 0
    courses = plan_courses(config, args.gpus, args.steps or config.loop.steps)
    # Of several batch sizes the one that needs the most memory, and of equal ones the last.
    plan = max((course.plan for course in reversed(courses)), key=lambda plan: plan.total_memory)
    if args.json:
        document = asdict(plan)
        document["total_memory"] = plan.total_memory
        document["seconds_per_step"] = step_seconds(plan, GPUS[args.gpu], args.mfu)
        document["checkpoint_bytes"] = checkpoint_bytes(config, plan)
        print(json.dumps(document, indent=1))
        return 0
    print(format_budget(plan, courses, args.gpu, args.mfu, config.loop.save_every))
    steps = sum(course.steps for course in courses)
    print(format_disk(checkpoint_bytes(config, plan), config.loop, steps))
    return 0


def checkpoint_bytes(config: AnyTrainConfig, plan: BudgetPlan) -> int:
    """Size of a checkpoint: all weights, and of the trained ones moments, averages and copies."""
    weights = plan.parameters["all"]
    trained = plan.parameters.get("trained", weights)
    each = 8  # Adam's moments
    element = 4
    if not isinstance(config, TokenizerTrainConfig):
        element = element_bytes(config.precision)
        if config.precision == "bf16" or isinstance(config, DiffusionTrainConfig):
            each += 4  # float32 weights
        elif config.parallel.distributed_optimizer:
            each += 4
    if isinstance(config, LMTrainConfig):
        trained *= config.parallel.pipeline if config.lora is not None else 1
    if config.ema is not None:
        each += 4
    return weights * element + trained * each


def format_disk(size: int, loop: LoopConfig, steps: int) -> str:
    """Text about the disk that the checkpoints of a run of `steps` steps take."""
    kept = min(loop.keep_last, -(-steps // loop.save_every))
    if loop.keep_every:
        kept += max(0, steps - loop.keep_last * loop.save_every) // loop.keep_every
    return (
        f"disk        {size / 1e9:,.1f} GB a checkpoint, {kept} kept at the end: "
        f"{kept * size / 1e9:,.0f} GB, and one more while it is written"
    )


@dataclass(frozen=True)
class Course:
    """Steps of a run with the same batch sizes."""

    first_step: int
    steps: int
    plan: BudgetPlan


def plan_courses(config: AnyTrainConfig, gpus: int, steps: int) -> list[Course]:
    """The parts of a training of `steps` steps with different batch sizes: ramps and phases.

    Raises ConfigError if ranks, model and batch do not divide in one of them.
    """
    levels = [level for level in batch_sizes(config.data_phases).levels if level.first_step < steps]
    ends = [level.first_step for level in levels[1:]] + [steps]
    courses = []
    for level, end in zip(levels, ends, strict=True):
        plan = make_plan(config.at(level.first_step), gpus)
        courses.append(Course(level.first_step, end - level.first_step, plan))
    return courses


def format_budget(
    plan: BudgetPlan, courses: Sequence[Course], gpu_name: str, mfu: float, save_every: int
) -> str:
    """Human-readable text of a plan, with time and size of a training.

    plan: that of the course that needs the most memory.
    """
    gpu = GPUS[gpu_name]
    seconds = step_seconds(plan, gpu, mfu)
    counts = [f"{name} {number:,}" for name, number in plan.parameters.items()]
    lines = [f"{plan.trainer} on {plan.gpus} x {gpu_name}: {plan.layout}"]
    lines += [f"  {note}" for note in plan.notes]
    lines.append(f"parameters  {', '.join(counts)}")
    lines.append("memory of the fullest GPU")
    for name, size in plan.memory.items():
        if size:
            lines.append(f"  {name:<12}{size / GIB:>9.2f} GiB")
    verdict = "fits" if fits(plan, gpu) else "does NOT fit"
    total = plan.total_memory / GIB
    lines.append(
        f"  {'all':<12}{total:>9.2f} GiB of {gpu.memory_gib:g}: {verdict} (a tenth is kept free)"
    )
    lines.append(
        f"each step   {plan.model_flops:.3e} model FLOPs, {plan.hardware_flops:.3e} with "
        f"recomputation; {plan.clips_per_step:,} clips, {plan.tokens_per_step:,} tokens"
    )
    lines.append(
        f"about       {seconds:.2f} s a step at {mfu:.0%} of {gpu.peak_tflops:g} TFLOP/s: "
        f"{plan.clips_per_step / seconds:.1f} clips/s, "
        f"{plan.tokens_per_step / seconds:,.0f} tokens/s"
    )
    steps = sum(course.steps for course in courses)
    clips = sum(course.steps * course.plan.clips_per_step for course in courses)
    times = [step_seconds(course.plan, gpu, mfu) for course in courses]
    total_s = sum(course.steps * time for course, time in zip(courses, times, strict=True))
    if len(courses) > 1:
        for course, time in zip(courses, times, strict=True):
            lines.append(
                f"  from step {course.first_step:,}: {course.plan.clips_per_step:,} clips a step, "
                f"{time:.2f} s"
            )
    lines.append(
        f"{steps:,} steps  {total_s / 86400:.2f} days, "
        f"{total_s * plan.gpus / 3600:,.0f} GPU hours, "
        f"{clips:,} clips, "
        f"a checkpoint every {save_every * seconds / 60:.0f} min"
    )
    return "\n".join(lines)
