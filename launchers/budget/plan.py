"""The command `landiff plan`: the cost of a training config, or the layouts that fit a GPU."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from landiff.configs import ConfigError, load
from landiff.launchers.budget.budget_plan import GIB, BudgetPlan
from landiff.launchers.budget.models import make_plan
from landiff.launchers.budget.search import format_candidates, search
from landiff.launchers.budget.step_time import GPUS, fits, step_seconds
from landiff.launchers.stages import TRAINERS, AnyTrainConfig


def plan_command(args: argparse.Namespace) -> int:
    """Prints the cost of a config, or with --search a ranking of layouts. Returns the exit code."""
    steps_are_valid = args.steps is None or args.steps >= 1
    if args.gpus < 1 or not 0 < args.mfu <= 1 or not steps_are_valid:
        raise ConfigError(
            f"--gpus {args.gpus} --mfu {args.mfu:g} --steps {args.steps}: give at least one GPU, "
            "at least one step, and a fraction of the peak above 0 and at most 1"
        )
    config: AnyTrainConfig = load(TRAINERS[args.stage].config_class, args.config, args.overrides)
    if args.search:
        found = search(config, args.gpus, GPUS[args.gpu], args.mfu)
        if not found:
            raise ConfigError(
                f"no layout of {args.config} fits {args.gpus} x {args.gpu}; use more or larger GPUs"
            )
        print(format_candidates(found, args.top))
        return 0
    plan = make_plan(config, args.gpus)
    if args.json:
        document = asdict(plan)
        document["total_memory"] = plan.total_memory
        document["seconds_per_step"] = step_seconds(plan, GPUS[args.gpu], args.mfu)
        print(json.dumps(document, indent=1))
        return 0
    steps = args.steps or config.loop.steps
    print(format_budget(plan, args.gpu, args.mfu, steps, config.loop.save_every))
    return 0


def format_budget(plan: BudgetPlan, gpu_name: str, mfu: float, steps: int, save_every: int) -> str:
    """Human-readable text of a plan, with time and size of a training of `steps` steps."""
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
    lines.append(
        f"{steps:,} steps  {steps * seconds / 86400:.2f} days, "
        f"{steps * seconds * plan.gpus / 3600:,.0f} GPU hours, "
        f"{steps * plan.clips_per_step:,} clips, "
        f"a checkpoint every {save_every * seconds / 60:.0f} min"
    )
    return "\n".join(lines)
