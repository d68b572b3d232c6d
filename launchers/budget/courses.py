"""The parts of a run with equal batch sizes, and the clip shapes in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from landiff.configs import ConfigError
from landiff.data_pipeline.format.buckets import bucket_names
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.loading.phases import batch_sizes
from landiff.launchers.budget.budget_plan import BudgetPlan
from landiff.launchers.budget.models import make_plan
from landiff.launchers.budget.step_time import Gpu, Speed
from landiff.launchers.stages import AnyTrainConfig
from landiff.model_zoo.frozen.clip_shape import ClipShape


@dataclass(frozen=True)
class ShapePlan:
    """Steps on clips of one shape. share: of all steps. name: "" for the shape of the model."""

    name: str
    share: float
    plan: BudgetPlan


@dataclass(frozen=True)
class Course:
    """Steps of a run with the same batch sizes."""

    first_step: int
    steps: int
    shapes: tuple[ShapePlan, ...]

    @property
    def plan(self) -> BudgetPlan:
        """The plan of the shape that needs the most memory."""
        return max((shape.plan for shape in self.shapes), key=lambda plan: plan.total_memory)

    @property
    def clips_per_step(self) -> float:
        """Clips of a step, on average over the shapes."""
        return sum(shape.share * shape.plan.clips_per_step for shape in self.shapes)

    def step_seconds(self, gpu: Gpu, speed: Speed) -> float:
        """Seconds of a step, on average over the shapes."""
        return sum(shape.share * speed.step_seconds(shape.plan, gpu) for shape in self.shapes)


def plan_courses(config: AnyTrainConfig, gpus: int, steps: int) -> list[Course]:
    """The parts of a training of `steps` steps with different batch sizes: ramps and phases.

    Raises ConfigError if ranks, model and batch do not divide in one of them.
    """
    levels = [level for level in batch_sizes(config.data_phases).levels if level.first_step < steps]
    ends = [level.first_step for level in levels[1:]] + [steps]
    courses = []
    for level, end in zip(levels, ends, strict=True):
        shapes = plan_shapes(config.at(level.first_step), gpus)
        courses.append(Course(level.first_step, end - level.first_step, shapes))
    return courses


def plan_shapes(config: AnyTrainConfig, gpus: int) -> tuple[ShapePlan, ...]:
    """A plan for each of `data.buckets`, or one without buckets."""
    names = config.data.buckets
    if names is None:
        return (ShapePlan("", 1.0, make_plan(config, gpus)),)
    factors = config.batch_factors
    shares = shares_of_steps(config, factors)
    plans = []
    for name in names:
        factor = factors.get(name, 1)
        sizes = {
            "global_batch_size": factor * config.data.global_batch_size,
            "micro_batch_size": factor * config.data.micro_batch_size,
            "buckets": None,
            "balance_tokens": False,
        }
        data = config.data.model_copy(update=sizes)
        sized = config.model_copy(update={"data": data})
        plan = make_plan(sized, gpus, ClipShape.parse(name))
        plans.append(ShapePlan(name, shares[name], plan))
    return tuple(plans)


def shares_of_steps(config: AnyTrainConfig, factors: Mapping[str, int]) -> dict[str, float]:
    """The share of all steps that each bucket has: as many as its clips in the data fill.

    Equal shares without data, or if they have no clip of these buckets.
    """
    names = config.data.buckets
    assert names is not None
    clips = dict.fromkeys(names, 0.0)
    if not config.data.remote:
        try:
            manifest = read_manifest(config.data.manifest)
        except (OSError, ConfigError):
            manifest = None
        if manifest is not None:
            for name, shard in zip(bucket_names(manifest), manifest.shards, strict=True):
                if name in clips:
                    clips[name] += shard.samples / factors.get(name, 1)
    total = sum(clips.values())
    if not total:
        return dict.fromkeys(names, 1 / len(names))
    return {name: count / total for name, count in clips.items()}
