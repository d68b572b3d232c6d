"""Jobs of the whole pipeline, as a graph: `landiff submit pipeline`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from landiff.configs import ConfigError
from landiff.configs.problems import Problem, require_none
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.project.check import (
    check_preset,
    load_preset,
    stage_name,
    with_all_columns,
)
from landiff.launchers.project.names import check_names, columns_read
from landiff.launchers.project.presets import require_preset
from landiff.launchers.project.rules import check_chain
from landiff.launchers.project.selection import check_skipped, names_to_skip, skipped_stages
from landiff.launchers.project.space import check_preset_space
from landiff.launchers.slurm.stage_jobs import SubmitContext, SubmitPlan, plan_process, plan_stage
from landiff.training.config import TrainConfig


def plan_pipeline(
    preset: str,
    prompts: Sequence[str],
    context: SubmitContext,
    overrides: Sequence[str],
    first: str | None = None,
    skip: Sequence[str] = (),
) -> tuple[list[SubmitPlan], list[Problem]]:
    """(jobs, problems): all stages in an order in which they can be submitted.

    The problems are those of stages that do not fit each other; jobs have those of their own.

    An override has the form `STAGE.KEY=VALUE`, e.g. `lm.loop.steps=100`, with the name of the job
    of the stage. `first` and `skip` are the values of --from and --skip. Prints the stages that
    need not run. Raises ConfigError with all mistakes of the preset if a config has a wrong value.
    """
    from landiff.launchers.pipeline import pipeline_stages

    require_preset(preset)
    stages = pipeline_stages(preset, 1, prompts)
    names = {stage.name: stage.name.replace(" ", "-") for stage in stages}
    own_overrides = group_overrides(overrides, names.values())
    own_by_stem = {**own_overrides, "precompute": own_overrides["columns"]}
    configs, wrong = load_preset(preset, own_by_stem)
    if wrong:  # no job can be planned, so all mistakes are reported here
        report = check_preset(preset, context.workdir, first, skip, own_by_stem)
        require_none(report.problems)
    reasons = skipped_stages(configs, context.workdir, first, skip)
    for name, reason in reasons.items():
        print(f"# {name} is skipped: {reason}")
    skipped = names_to_skip(reasons)
    plans: list[SubmitPlan] = []
    last_jobs: dict[str, tuple[str, ...]] = {}  # stage -> jobs that the next stages wait for
    column_jobs: dict[str, str] = {}  # column -> job that enters it into the manifest
    for stage in stages:
        name = names[stage.name]
        previous: list[str] = []
        for earlier in stage.after:
            previous += last_jobs[earlier]
        if stage.name in skipped:
            last_jobs[stage.name] = tuple(previous)
            continue
        inputs_exist = context.inputs_exist and not previous
        stage_context = replace(context, inputs_exist=inputs_exist, job_per_column=True)
        new = plan_stage(stage.command, stage_context, name, own_overrides[name])
        new = finalize_each_column(new, context)
        for plan in new:
            if not plan.after:
                after = dependencies(plan, previous, last_jobs.get("shards", ()), column_jobs)
                plan = replace(plan, after=after)
            plans.append(plan)
        for plan in new:
            if plan.stage == "precompute" and plan.after:
                column_jobs.update(dict.fromkeys(columns_of(plan), plan.name))
        last_jobs[stage.name] = final_jobs(new)
    if not plans:
        raise ConfigError("all stages are skipped, so nothing is left to submit")
    joined = with_all_columns(configs)
    left = [stem for stem in configs if stage_name(stem) not in reasons]
    problems = check_chain(joined)
    if context.inputs_exist:
        problems += check_skipped(configs, context.workdir, reasons)
        problems += check_preset_space(configs, left)
    if context.launch().inputs_exist:
        problems += check_names(joined, left)
    return plans, problems


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
    read = columns_read(plan.config, column_jobs)
    found += [column_jobs[column] for column in read if column in column_jobs]
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
