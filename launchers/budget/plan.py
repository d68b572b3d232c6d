"""The command `landiff plan`: the cost of a training config, or the layouts that fit a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from landiff.configs import ConfigError, load
from landiff.data_pipeline.format.shards import read_manifest
from landiff.launchers.budget.budget_plan import GIB, BudgetPlan
from landiff.launchers.budget.calibration import measured_speed
from landiff.launchers.budget.courses import Course, plan_courses
from landiff.launchers.budget.search import format_candidates, search, way_out
from landiff.launchers.budget.step_time import (
    GPUS,
    Gpu,
    Speed,
    fits,
    model_flops_utilization,
    traffic_seconds,
)
from landiff.launchers.budget.total import (
    ORDER,
    PrecomputeCost,
    checkpoint_size,
    format_disk,
    format_total,
    precompute_cost,
    training_cost,
)
from landiff.launchers.project.presets import (
    PRESET_CONFIGS,
    preset_config,
    project_folder,
    require_preset,
)
from landiff.launchers.stages import TRAINERS, AnyTrainConfig


def plan_command(args: argparse.Namespace) -> int:
    """Prints the cost of a config, or with --search a ranking of layouts. Returns the exit code."""
    steps_are_valid = args.steps is None or args.steps >= 1
    if args.gpus < 1 or not 0 < args.mfu <= 1 or not steps_are_valid:
        raise ConfigError(
            f"--gpus {args.gpus} --mfu {args.mfu:g} --steps {args.steps}: give at least one GPU, "
            "at least one step, and a fraction of the peak above 0 and at most 1"
        )
    if args.price is not None and args.price < 0:
        raise ConfigError(f"--price {args.price:g} is below 0; give the price of a GPU hour")
    if args.stage == "all":
        return plan_all(args)
    name = args.config
    if args.preset is not None:
        require_preset(args.preset)
        stem = "diffusion-main" if args.stage == "diffusion" else args.stage
        name = preset_config(args.preset, stem)
    gpu = GPUS[args.gpu]
    config: AnyTrainConfig = load(TRAINERS[args.stage].config_class, name, args.overrides)
    speed = Speed(args.mfu)
    if args.calibrate is not None:
        speed = measured_speed(Path(args.calibrate), args.stage, gpu)
    if args.search:
        found = search(config, args.gpus, gpu, speed)
        if not found:
            raise ConfigError(
                f"no layout of {name} fits {args.gpus} x {args.gpu}; use more or larger GPUs"
            )
        print(format_candidates(found, args.top))
        return 0
    try:
        courses = plan_courses(config, args.gpus, args.steps or config.loop.steps)
    except ConfigError as error:
        raise ConfigError(f"{error}; {way_out(config, args.gpus, gpu, speed)}") from None
    # Of several batch sizes the one that needs the most memory, and of equal ones the last.
    plan = max((course.plan for course in reversed(courses)), key=lambda plan: plan.total_memory)
    if args.json:
        document = asdict(plan)
        document["total_memory"] = plan.total_memory
        document["seconds_per_step"] = speed.step_seconds(plan, gpu)
        document["checkpoint_bytes"] = checkpoint_size(config, plan).own
        document["shared_checkpoint_bytes"] = checkpoint_size(config, plan).shared
        print(json.dumps(document, indent=1))
        return 0
    print(format_budget(plan, courses, args.gpu, speed, config.loop.save_every, args.price))
    steps = sum(course.steps for course in courses)
    print(format_disk(checkpoint_size(config, plan), config.loop, steps))
    if not fits(plan, gpu):
        print(f"suggestion  {way_out(config, args.gpus, gpu, speed)}")
    return 0


def plan_all(args: argparse.Namespace) -> int:
    """Prints the cost of all trainings of a preset, and of the columns. Returns the exit code."""
    if args.preset is None or args.overrides or args.search or args.calibrate or args.json:
        raise ConfigError(
            "landiff plan all takes --preset, and neither --config, --search, --calibrate, --json "
            "nor overrides; plan one stage for these"
        )
    require_preset(args.preset)
    gpu = GPUS[args.gpu]
    speed = Speed(args.mfu)
    configs: dict[str, Any] = {}
    for stem, config_class in PRESET_CONFIGS.items():
        configs[stem] = load(config_class, preset_config(args.preset, stem))
    costs = {}
    for stem in [stem for stems in ORDER for stem in stems]:
        config = configs[stem]
        try:
            costs[stem] = training_cost(stem, config, args.gpus, gpu, speed)
        except ConfigError as error:
            hint = way_out(config, args.gpus, gpu, speed)
            raise ConfigError(f"{stem}: {error}; {hint}") from None
    print(f"{args.preset} on {args.gpus} x {args.gpu}, at an MFU of {args.mfu:.0%}")
    columns = columns_cost(configs, project_folder(args.preset), args.clips, gpu)
    print(format_total(costs, columns, gpu, args.price))
    return 0


def columns_cost(
    configs: dict[str, Any], folder: Path, clips: int | None, gpu: Gpu
) -> PrecomputeCost | None:
    """The cost of the columns of `clips` clips, by default those of the data. None without data.

    folder: that in which relative paths are resolved.
    """
    if clips is None:
        try:
            clips = read_manifest(folder / configs["shards"].data).num_samples
        except (OSError, ConfigError):
            return None
    return precompute_cost(configs, clips, gpu)


def format_budget(
    plan: BudgetPlan,
    courses: Sequence[Course],
    gpu_name: str,
    speed: Speed,
    save_every: int,
    price: float | None = None,
) -> str:
    """Human-readable text of a plan, with time and size of a training.

    plan: that of the course that needs the most memory.
    """
    gpu = GPUS[gpu_name]
    seconds = speed.step_seconds(plan, gpu)
    mfu = model_flops_utilization(plan, gpu, seconds)
    counts = [f"{name} {number:,}" for name, number in plan.parameters.items()]
    lines = [f"{plan.trainer} on {plan.gpus} x {gpu_name}: {plan.layout}"]
    lines += [f"  {note}" for note in plan.notes]
    lines.append(f"parameters  {', '.join(counts)}")
    lines.append("memory of the fullest GPU")
    for name, size in plan.memory.items():
        if size:
            lines.append(f"  {name:<16}{size / GIB:>9.2f} GiB")
    verdict = "fits" if fits(plan, gpu) else "does NOT fit"
    total = plan.total_memory / GIB
    lines.append(
        f"  {'all':<16}{total:>9.2f} GiB of {gpu.memory_gib:g}: {verdict} (a tenth is kept free)"
    )
    lines.append(
        f"each step   {plan.model_flops:.3e} model FLOPs, {plan.hardware_flops:.3e} with "
        f"recomputation; {plan.clips_per_step:,} clips, {plan.tokens_per_step:,} tokens"
    )
    lines.append(
        f"about       {seconds:.2f} s a step at an MFU of {mfu:.1%} of {gpu.peak_tflops:g} "
        f"TFLOP/s: {plan.clips_per_step / seconds:.1f} clips/s, "
        f"{plan.tokens_per_step / seconds:,.0f} tokens/s"
    )
    waiting = traffic_seconds(plan, gpu)
    if waiting:
        lines.append(f"  of which {waiting:.2f} s wait for traffic between GPUs")
    if mfu < 0.99 * speed.mfu and speed.utilization is None:
        lines.append(f"  the network allows no MFU of {speed.mfu:.0%} with this layout")
    steps = sum(course.steps for course in courses)
    clips = round(sum(course.steps * course.clips_per_step for course in courses))
    times = [course.step_seconds(gpu, speed) for course in courses]
    total_s = sum(course.steps * time for course, time in zip(courses, times, strict=True))
    if len(courses) > 1:
        for course, time in zip(courses, times, strict=True):
            lines.append(
                f"  from step {course.first_step:,}: {course.clips_per_step:,.0f} clips a step, "
                f"{time:.2f} s"
            )
    for shape in courses[-1].shapes:
        if shape.name:
            lines.append(
                f"  bucket {shape.name}: {shape.share:.0%} of the steps, "
                f"{shape.plan.clips_per_step:,} clips, "
                f"{speed.step_seconds(shape.plan, gpu):.2f} s, "
                f"{shape.plan.total_memory / GIB:.2f} GiB"
            )
    lines.append(
        f"{steps:,} steps  {total_s / 86400:.2f} days, "
        f"{total_s * plan.gpus / 3600:,.0f} GPU hours, "
        f"{clips:,} clips, "
        f"a checkpoint every {save_every * seconds / 60:.0f} min"
    )
    if price is not None:
        hours = total_s * plan.gpus / 3600
        lines.append(f"cost        {hours * price:,.0f} at {price:g} a GPU hour")
    return "\n".join(lines)
