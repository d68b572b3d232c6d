"""Search for the parallel layouts of a config that fit a GPU: `landiff plan --search`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from landiff.configs import Config, ConfigError, validate
from landiff.launchers.budget.budget_plan import GIB, BudgetPlan
from landiff.launchers.budget.models import make_plan
from landiff.launchers.budget.step_time import Gpu, fits, step_seconds
from landiff.launchers.stages import AnyTrainConfig
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig

T = TypeVar("T", bound=Config)
Change = dict[str, object]  # dotted key -> value

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
PARALLEL_SIZES = (1, 2, 4, 8)  # of tensor and of pipeline parallelism


@dataclass(frozen=True)
class Candidate:
    """A change of the config that fits, with its cost."""

    seconds: float  # of one optimizer step
    plan: BudgetPlan
    change: Change


def search(config: AnyTrainConfig, gpus: int, gpu: Gpu, mfu: float) -> list[Candidate]:
    """The layouts that fit, fastest first. Of equally fast ones, the one with less memory first."""
    found = []
    for change in choices(config, gpus):
        try:
            plan = make_plan(changed(config, change), gpus)
        except ConfigError:
            continue  # ranks, model and batch do not divide
        if fits(plan, gpu):
            found.append(Candidate(step_seconds(plan, gpu, mfu), plan, change))
    found.sort(key=lambda candidate: (round(candidate.seconds, 3), candidate.plan.total_memory))
    return found


def choices(config: AnyTrainConfig, gpus: int) -> Iterator[Change]:
    """Changes to try: recomputation, micro-batch size, and the parallel layout of the trainer."""
    for recompute in (False, True):
        for size in MICRO_BATCH_SIZES:
            if size > config.data.global_batch_size:
                continue
            common: Change = {"recompute": recompute, "data.micro_batch_size": size}
            for layout in layouts(config, gpus):
                yield common | layout


def layouts(config: AnyTrainConfig, gpus: int) -> Iterator[Change]:
    """Parallel layouts to try; one empty change for torch DDP, which has no choice."""
    if isinstance(config, LMTrainConfig):
        for tensor in PARALLEL_SIZES:
            for pipeline in PARALLEL_SIZES:
                if tensor * pipeline <= gpus:
                    yield {
                        "parallel.tensor": tensor,
                        "parallel.pipeline": pipeline,
                        "parallel.sequence": tensor > 1,
                        "parallel.distributed_optimizer": True,
                    }
    elif isinstance(config, DiffusionTrainConfig):
        for stage in (1, 2, 3):
            yield {"zero.stage": stage}
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
        words = [f"{key}={yaml_text(value)}" for key, value in candidate.change.items()]
        memory = candidate.plan.total_memory / GIB
        lines.append(f"{candidate.seconds:>9.2f}  {memory:>7.1f}  {' '.join(words)}")
    return "\n".join(lines)


def yaml_text(value: object) -> str:
    """A number or boolean as it is written in an override."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
