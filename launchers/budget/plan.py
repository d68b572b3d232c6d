"""`landiff plan`: what a config costs before it costs anything, and which layouts fit a GPU. One CPU process."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from landiff.configs import Config, ConfigError, load, validate
from landiff.launchers.budget.models import GIB, BudgetPlan, make_plan
from landiff.launchers.slurm.stage_jobs import config_class


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it."""

    memory_gib: float
    peak_tflops: float  # dense bf16
    link_gb_s: float  # to its neighbours in the node, one direction


GPUS = {
    "a100": Gpu(80, 312, 300),
    "h100": Gpu(80, 989, 450),
    "h200": Gpu(141, 989, 450),
    "b200": Gpu(180, 2250, 900),
    "l40s": Gpu(48, 362, 32),
}
USABLE = 0.9  # of the memory: the allocator needs air
NETWORK_GB_S = 40.0  # of a GPU to other nodes, one direction; copies of the model in one node use theirs together
NODE = 8  # GPUs that share fast links
OVERLAPPED = (
    0.5  # share of gradient traffic that hides behind the backward, where the config lets it
)


def step_seconds(plan: BudgetPlan, gpu: Gpu, mfu: float) -> float:
    """Of one optimizer step: arithmetic at `mfu` of the peak, the pipeline's bubble, what links don't hide."""
    arithmetic = (
        plan.hardware_flops / (plan.gpus * gpu.peak_tflops * 1e12 * mfu) / (1 - plan.bubble)
    )
    tensor = (
        plan.layer_bytes
        * 2
        * (plan.tensor - 1)
        / plan.tensor
        / (gpu.link_gb_s * 1e9 if plan.tensor <= NODE else NETWORK_GB_S * 1e9)
    )
    near = max(1, NODE // plan.tensor)  # copies in one node
    link = gpu.link_gb_s if plan.copies <= near else min(gpu.link_gb_s, NETWORK_GB_S * near)
    return (
        arithmetic + tensor + (1 - OVERLAPPED * plan.overlap) * plan.gradient_bytes / (link * 1e9)
    )


def format_budget(plan: BudgetPlan, gpu_name: str, mfu: float, steps: int, save_every: int) -> str:
    """For a person."""
    gpu = GPUS[gpu_name]
    seconds = step_seconds(plan, gpu, mfu)
    total = plan.total_memory
    lines = [f"{plan.trainer} on {plan.gpus} x {gpu_name}: {plan.layout}"]
    lines += [f"  {note}" for note in plan.notes]
    lines += [
        "parameters  " + ", ".join(f"{name} {number:,}" for name, number in plan.parameters.items())
    ]
    lines += ["memory of the fullest GPU"]
    lines += [f"  {name:<12}{size / GIB:>9.2f} GiB" for name, size in plan.memory.items() if size]
    fits = "fits" if total <= USABLE * gpu.memory_gib * GIB else "does NOT fit"
    lines += [
        f"  {'all':<12}{total / GIB:>9.2f} GiB of {gpu.memory_gib:g}: {fits} (a tenth is kept free)"
    ]
    lines += [
        f"a step      {plan.model_flops:.3e} FLOPs of the model, {plan.hardware_flops:.3e} done; {plan.clips_per_step:,} clips, {plan.tokens_per_step:,} tokens",
        f"about       {seconds:.2f} s a step at {mfu:.0%} of {gpu.peak_tflops:g} TFLOP/s: {plan.clips_per_step / seconds:.1f} clips/s, {plan.tokens_per_step / seconds:,.0f} tokens/s",
        f"{steps:,} steps  {steps * seconds / 86400:.2f} days, {steps * seconds * plan.gpus / 3600:,.0f} GPU hours, {steps * plan.clips_per_step:,} clips, a checkpoint every {save_every * seconds / 60:.0f} min",
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------- search


def choices(config: Config, gpus: int) -> Iterator[dict[str, object]]:
    """Changes of layout worth a look, as dotted keys."""
    micro_sizes = [size for size in (1, 2, 4, 8, 16) if size <= config.data.global_batch_size]
    kind = type(config).__name__
    for recompute in (False, True):
        for micro in micro_sizes:
            common = {"recompute": recompute, "data.micro_batch_size": micro}
            if kind == "LMTrainConfig":
                for tensor in (1, 2, 4, 8):
                    for pipeline in (1, 2, 4, 8):
                        if tensor * pipeline <= gpus:
                            yield common | {
                                "parallel.tensor": tensor,
                                "parallel.pipeline": pipeline,
                                "parallel.sequence": tensor > 1,
                                "parallel.distributed_optimizer": True,
                            }
            elif kind == "DiffusionTrainConfig":
                for stage in (1, 2, 3):
                    yield common | {"zero.stage": stage}
            else:
                yield common


def changed(config: Config, change: dict[str, object]) -> Config:
    """`config` with dotted keys set. Raises ConfigError."""
    data = config.model_dump(mode="json")
    for key, value in change.items():
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        node[last] = value
    return validate(type(config), data)


def search(
    config: Config, gpus: int, gpu: Gpu, mfu: float
) -> list[tuple[float, BudgetPlan, dict[str, object]]]:
    """(seconds a step, plan, change) of the layouts that fit, fastest first; simpler ones before where equal."""
    found = []
    for change in choices(config, gpus):
        try:
            plan = make_plan(changed(config, change), gpus)
        except ConfigError:
            continue  # does not divide
        if plan.total_memory <= USABLE * gpu.memory_gib * GIB:
            found.append((step_seconds(plan, gpu, mfu), plan, change))
    return sorted(found, key=lambda item: (round(item[0], 3), item[1].total_memory))


def search_text(found: Sequence[tuple[float, BudgetPlan, dict[str, object]]], top: int) -> str:
    lines = [f"{'s/step':>9}  {'GiB':>7}  change"]
    for seconds, plan, change in found[:top]:
        keys = " ".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else value}"
            for key, value in change.items()
        )
        lines.append(f"{seconds:>9.2f}  {plan.total_memory / GIB:>7.1f}  {keys}")
    return "\n".join(lines)


def print_budget(args: argparse.Namespace) -> int:
    """Print the plan, or the ranking."""
    if args.gpus < 1 or not 0 < args.mfu <= 1 or (args.steps is not None and args.steps < 1):
        raise ConfigError(
            f"--gpus {args.gpus} --mfu {args.mfu:g} --steps {args.steps}: at least one GPU and step, and a share of the peak above 0, at most 1"
        )
    config = load(config_class(args.stage), args.config, args.overrides)
    if args.search:
        found = search(config, args.gpus, GPUS[args.gpu], args.mfu)
        if not found:
            raise ConfigError(
                f"no layout of {args.config} fits {args.gpus} x {args.gpu}; take more or larger GPUs"
            )
        print(search_text(found, args.top))
        return 0
    plan = make_plan(config, args.gpus)
    if args.json:
        print(
            json.dumps(
                asdict(plan)
                | {
                    "total_memory": plan.total_memory,
                    "seconds_per_step": step_seconds(plan, GPUS[args.gpu], args.mfu),
                },
                indent=1,
            )
        )
    else:
        print(
            format_budget(
                plan, args.gpu, args.mfu, args.steps or config.loop.steps, config.loop.save_every
            )
        )
    return 0
