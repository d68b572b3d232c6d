"""Jobs of the whole pipeline, as a graph: `landiff submit pipeline`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from landiff.configs import ConfigError
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.project.chain import check_chain
from landiff.launchers.project.presets import require_preset
from landiff.launchers.slurm.stage_jobs import SubmitContext, SubmitPlan, plan_process, plan_stage
from landiff.training.config import TrainConfig


def plan_pipeline(
    preset: str, prompts: Sequence[str], context: SubmitContext, overrides: Sequence[str]
) -> list[SubmitPlan]:
    """The jobs of all stages, in an order in which they can be submitted.

    An override has the form `STAGE.KEY=VALUE`, e.g. `lm.loop.steps=100`, with the name of the job
    of the stage.
    """
    from landiff.launchers.pipeline import pipeline_stages

    require_preset(preset)
    stages = pipeline_stages(preset, 1, prompts)
    names = {stage.name: stage.name.replace(" ", "-") for stage in stages}
    own_overrides = group_overrides(overrides, names.values())
    plans: list[SubmitPlan] = []
    last_jobs: dict[str, tuple[str, ...]] = {}  # stage -> jobs that the next stages wait for
    column_jobs: dict[str, str] = {}  # column -> job that enters it into the manifest
    for stage in stages:
        name = names[stage.name]
        inputs_exist = context.inputs_exist and not stage.after
        stage_context = replace(context, inputs_exist=inputs_exist)
        new = plan_stage(stage.command, stage_context, name, own_overrides[name])
        new = finalize_each_column(new, context)
        previous: list[str] = []
        for earlier in stage.after:
            previous += last_jobs[earlier]
        for plan in new:
            if not plan.after:
                after = dependencies(plan, previous, last_jobs.get("shards", ()), column_jobs)
                plan = replace(plan, after=after)
            plans.append(plan)
        for plan in new:
            if plan.stage == "precompute" and plan.after:
                column_jobs.update(dict.fromkeys(columns_of(plan), plan.name))
        last_jobs[stage.name] = final_jobs(new)
    problems = check_chain(configs_by_stage(plans))
    plans[-1] = replace(plans[-1], problems=(*plans[-1].problems, *problems))
    return plans


def configs_by_stage(plans: Sequence[SubmitPlan]) -> dict[str, Any]:
    """The configs of all jobs by stage; that of precompute has the columns of all of its jobs."""
    configs: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    for plan in plans:
        if isinstance(plan.config, PrecomputeConfig):
            columns.update(plan.config.columns)
            configs["precompute"] = plan.config.model_copy(update={"columns": dict(columns)})
        elif plan.config is not None:
            configs[plan.name] = plan.config
    return configs


def is_override(text: str) -> bool:
    """Whether `text` is `KEY=VALUE`. A prompt may hold an equals sign after a blank."""
    key, sign, _ = text.partition("=")
    return bool(sign) and key.replace(".", "").replace("_", "").replace("-", "").isalnum()


def group_overrides(overrides: Sequence[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Overrides `KEY=VALUE` of each stage, from `STAGE.KEY=VALUE`. Raises ConfigError."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in found or not is_override(rest):
            raise ConfigError(
                f"{override!r} is not of the form stage.key=value; "
                f"the stages are {', '.join(found)}"
            )
        found[name].append(rest)
    return found


def finalize_each_column(plans: Sequence[SubmitPlan], context: SubmitContext) -> list[SubmitPlan]:
    """Replace the last job of several precompute jobs by one for each column.

    Each enters its column into the manifest. Jobs that read the column wait for it alone.
    """
    *column_plans, _ = plans
    if plans[0].stage != "precompute" or len(column_plans) < 2:
        return list(plans)
    found = []
    for plan in column_plans:
        found.append(plan)
        for column in columns_of(plan):
            words = ("precompute", "finalize")
            enter = plan_process("precompute", context, f"enter-{column}", words, plan.config)
            found.append(replace(enter, after=(plan.name,)))
    return found


def dependencies(
    plan: SubmitPlan,
    previous: Sequence[str],
    shards_jobs: Sequence[str],
    column_jobs: Mapping[str, str],
) -> tuple[str, ...]:
    """Names of the jobs that `plan` waits for.

    `previous`: last jobs of the stages before it. A column waits for the raw shards alone, unless
    it needs the tokenizer. A trainer waits for the columns that it reads.
    """
    if plan.stage == "precompute" and not needs_tokenizer(plan):
        return tuple(shards_jobs)
    if not isinstance(plan.config, TrainConfig):
        return tuple(previous)
    found = [name for name in previous if name not in column_jobs.values()]
    found += [column_jobs[column] for column in plan.config.columns if column in column_jobs]
    return tuple(dict.fromkeys(found))


def needs_tokenizer(plan: SubmitPlan) -> bool:
    """Whether a precompute job writes semantic tokens."""
    assert isinstance(plan.config, PrecomputeConfig), plan
    return any(column.kind == "tokens" for column in plan.config.columns.values())


def columns_of(plan: SubmitPlan) -> list[str]:
    """Names of the columns of a precompute job."""
    assert isinstance(plan.config, PrecomputeConfig), plan
    return list(plan.config.columns)


def final_jobs(plans: Sequence[SubmitPlan]) -> tuple[str, ...]:
    """Names of the jobs that no other job of `plans` waits for."""
    awaited: set[str] = set()
    for plan in plans:
        awaited.update(plan.after)
    return tuple(plan.name for plan in plans if plan.name not in awaited)
