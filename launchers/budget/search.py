"""Search for the parallel layouts of a config that fit a GPU: `landiff plan --search`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from landiff.configs import Config, ConfigError, validate
from landiff.launchers.budget.budget_plan import GIB, NODE, BudgetPlan
from landiff.launchers.budget.models import make_plan
from landiff.launchers.budget.step_time import Gpu, Speed, fits
from landiff.launchers.stages import AnyTrainConfig
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.layout import copy_size
from landiff.training.lm.config import LMTrainConfig

T = TypeVar("T", bound=Config)
Change = dict[str, object]  # dotted key -> value

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
PARALLEL_SIZES = (1, 2, 4, 8)  # of tensor, pipeline, context and sequence parallelism
VIRTUAL_STAGES = 2  # chunks of layers of a pipeline stage
# Rarely above 1, and not shown if they are 1.
DIVIDING_KEYS = (
    "parallel.virtual_pipeline",
    "parallel.context",
    "sequence_parallel",
    "zero.hpz_partition_size",
)
NEAR = 1 / 8  # change of a batch size that is smaller than that of a micro-batch size
MOST_SLOWDOWN = 1.5  # of a suggested layout, compared with the fastest that fits


@dataclass(frozen=True)
class Candidate:
    """A change of the config that fits, with its cost."""

    seconds: float  # of one optimizer step
    plan: BudgetPlan
    change: Change


def search(config: AnyTrainConfig, gpus: int, gpu: Gpu, speed: Speed) -> list[Candidate]:
    """The layouts that fit, fastest first. Of equally fast ones, the one with less memory first.

    Ranks that divide a row or a clip are tried only if nothing else fits.
    """
    speed = reference_speed(config, gpus, gpu, speed)
    for sizes in ((1,), PARALLEL_SIZES[1:]):
        found = []
        for change in choices(config, gpus, sizes):
            try:
                plan = make_plan(changed(config, change), gpus)
            except ConfigError:
                continue  # ranks, model and batch do not divide
            if fits(plan, gpu):
                found.append(Candidate(speed.step_seconds(plan, gpu), plan, change))
        if found:
            break
    found.sort(key=lambda candidate: (round(candidate.seconds, 3), candidate.plan.total_memory))
    return found


def reference_speed(config: AnyTrainConfig, gpus: int, gpu: Gpu, speed: Speed) -> Speed:
    """The speed of all layouts, from the MFU of `config` itself, which the others need not have.

    If `config` does not divide over the GPUs, of its model with one copy on as many as needed.
    """
    for number in (gpus, copy_size(config)):
        try:
            return speed.fixed_by(make_plan(config, number), gpu)
        except ConfigError:
            continue
    return speed


def way_out(config: AnyTrainConfig, gpus: int, gpu: Gpu, speed: Speed) -> str:
    """The smallest change with which `config` runs on `gpus` GPUs, as a part of a message."""
    data = config.model_dump(mode="json")
    for batch in batch_sizes(config, gpus):
        change: Change = {"data.global_batch_size": batch}
        try:
            found = search(changed(config, change), gpus, gpu, speed)
        except ConfigError:
            continue  # another part of the config depends on the batch
        if found:
            words = []
            for key, value in differences(data, change | smallest(data, found).change).items():
                words.append(f"{key}={yaml_text(value)}")
            return f"the smallest change that does: {' '.join(words)}"
    return (
        f"no layout fits {gpus:,} GPUs of {gpu.memory_gib:g} GiB with data.global_batch_size = "
        f"{config.data.global_batch_size}; change the model or the number of GPUs"
    )


def batch_sizes(config: AnyTrainConfig, gpus: int) -> list[int]:
    """Global batch sizes to try: that of `config`, then the nearest that divide over the GPUs.

    First those that keep the micro-batches, if they are near.
    """
    size = config.data.global_batch_size
    tried = [size]
    for unit, most in ((gpus * config.data.micro_batch_size, NEAR * size), (gpus, math.inf)):
        below = size // unit * unit
        near = [batch for batch in (below, below + unit) if batch and abs(batch - size) <= most]
        tried += sorted(near, key=lambda batch: abs(batch - size))
    return list(dict.fromkeys(tried))


def smallest(data: Mapping[str, Any], found: Sequence[Candidate]) -> Candidate:
    """The candidate that changes the fewest keys of the config `data`."""
    # A change of one key may leave most of the GPUs idle, as a long pipeline with one micro-batch.
    fast = [each for each in found if each.seconds <= MOST_SLOWDOWN * found[0].seconds]
    return min(fast, key=lambda each: (len(differences(data, each.change)), each.seconds))


def differences(data: Mapping[str, Any], change: Change) -> Change:
    """The keys of a change with another value than in the config `data`."""
    found: Change = {}
    for key, value in change.items():
        node: Any = data
        for part in key.split("."):
            node = node[part]
        if node != value:
            found[key] = value
    return found


def choices(config: AnyTrainConfig, gpus: int, sizes: Sequence[int]) -> Iterator[Change]:
    """Changes to try: recomputation, micro-batch size, and the parallel layout of the trainer.

    sizes: numbers of ranks that divide a row or a clip.
    """
    for recompute in (False, True):
        for size in MICRO_BATCH_SIZES:
            if size > config.data.global_batch_size:
                continue
            common: Change = {"recompute": recompute, "data.micro_batch_size": size}
            for layout in layouts(config, gpus, sizes):
                yield common | layout


def layouts(config: AnyTrainConfig, gpus: int, sizes: Sequence[int]) -> Iterator[Change]:
    """Parallel layouts to try; one empty change for torch DDP, which has no choice."""
    if isinstance(config, LMTrainConfig):
        for tensor, pipeline, context in itertools.product(PARALLEL_SIZES, PARALLEL_SIZES, sizes):
            if tensor * pipeline * context > gpus:
                continue
            change: Change = {
                "parallel.tensor": tensor,
                "parallel.pipeline": pipeline,
                "parallel.virtual_pipeline": 1,
                "parallel.context": context,
                "parallel.sequence": tensor > 1,
                "parallel.distributed_optimizer": True,
            }
            yield change
            if pipeline > 1:
                yield {**change, "parallel.virtual_pipeline": VIRTUAL_STAGES}
    elif isinstance(config, DiffusionTrainConfig):
        for stage, size in itertools.product((1, 2, 3), sizes):
            zero: Change = {"zero.stage": stage, "sequence_parallel": size}
            yield {**zero, "zero.hpz_partition_size": 1}
            if stage == 3 and gpus > NODE:
                yield {**zero, "zero.hpz_partition_size": NODE}
    else:
        yield {}


def changed(config: T, change: Mapping[str, object]) -> T:
    """A copy of `config` with dotted keys set. Raises ConfigError."""
    data = config.model_dump(mode="json")
    for key, value in change.items():
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        node[last] = value
    return validate(type(config), data)


def format_candidates(found: Sequence[Candidate], top: int) -> str:
    """A table of the first `top` candidates."""
    lines = [f"{'s/step':>9}  {'GiB':>7}  change"]
    for candidate in found[:top]:
        words = []
        for key, value in candidate.change.items():
            if value != 1 or key not in DIVIDING_KEYS:
                words.append(f"{key}={yaml_text(value)}")
        memory = candidate.plan.total_memory / GIB
        lines.append(f"{candidate.seconds:>9.2f}  {memory:>7.1f}  {' '.join(words)}")
    return "\n".join(lines)


def yaml_text(value: object) -> str:
    """A number or boolean as it is written in an override."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
