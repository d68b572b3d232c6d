"""Jobs of one stage: from a `landiff` command line to run folder, module, arguments and config."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from landiff.configs import Config, ConfigError
from landiff.configs.problems import Problem
from landiff.configs.secrets import redact
from landiff.configs.wrong_values import without_consequences
from landiff.data_pipeline.precompute.config import PrecomputeConfig, TextColumn, column_groups
from landiff.launchers.arguments import build_parser, parse_command
from landiff.launchers.checks import load_checked, load_with_problems
from landiff.launchers.config import SampleConfig, ShardsJobConfig
from landiff.launchers.local.gpus import default_processes
from landiff.launchers.results.commands import check_vbench, refuse_vbench_options
from landiff.launchers.results.prompts import sample_values
from landiff.launchers.run.job_folder import CONFIG, JOB_FOLDER
from landiff.launchers.slurm.cluster_config import STAGES, ClusterConfig
from landiff.launchers.slurm.script import BatchJob
from landiff.launchers.stages import EVALUATIONS, TRAINERS
from landiff.launchers.weights.pipeline_folder import check_pipeline
from landiff.launchers.weights.request import check_request, names_config, request_of
from landiff.training.checks import Launch
from landiff.training.config import TrainConfig


@dataclass(frozen=True)
class SubmitPlan:
    """A job with its resolved config and the names of the jobs it waits for."""

    stage: str
    job: BatchJob
    config: Config | None
    after: tuple[str, ...] = ()
    steps: int | None = None
    """Steps of a trainer; None for other stages."""
    problems: tuple[Problem, ...] = ()
    """Why the job cannot run."""

    @property
    def name(self) -> str:
        """The name of the job."""
        return self.job.name


@dataclass(frozen=True, kw_only=True)
class SubmitContext:
    """What all jobs of one submission share."""

    cluster: ClusterConfig
    workdir: Path
    made_by: str
    python: str
    nodes: int | None = None
    here: bool = False
    inputs_exist: bool = True
    """False if jobs that run earlier create the inputs."""
    job_per_column: bool = False
    """A precompute job for each column, so that later jobs need not wait for the others. Clips are
    then decoded once for each column and not once for all."""

    def launch(self, ranks: int = 1) -> Launch:
        """How a job is started. Paths inside of a container are not known here."""
        return Launch(ranks, self.inputs_exist and self.cluster.container is None)


def plan_stage(
    argv: Sequence[str],
    context: SubmitContext,
    name: str | None = None,
    overrides: Sequence[str] = (),
) -> list[SubmitPlan]:
    """The jobs of one stage, in order.

    `argv`: the command line of the stage, without `landiff`. `name`: name of the job, instead of
    the stage's own. Raises ConfigError for a command line that the stage would reject.
    """
    args = parse_command(build_parser(), argv)
    args.overrides = [*args.overrides, *overrides]
    if args.command == "train":
        return [plan_training(args, context, name)]
    if context.nodes not in (None, 1):
        raise ConfigError(
            f"--nodes {context.nodes}: {args.command} runs on one node; "
            "stages.precompute.array divides a precompute job into tasks"
        )
    if args.command == "shards":
        return plan_shard_jobs(args, context, name)
    if args.command == "precompute":
        return plan_precompute(args, context, name)
    if args.command == "convert":
        return [plan_convert(args, argv, context)]
    if args.command not in ("sample", "evaluate"):
        raise ConfigError(
            f"{args.command} is no stage of its own; submit one of {', '.join(STAGES)}"
        )
    if args.command == "evaluate":
        return [plan_evaluation(args, context, name)]
    launch = context.launch()
    config, problems = load_checked(
        "sample",
        SampleConfig,
        args.config,
        args.overrides,
        launch=launch,
        values=sample_values(args),
    )
    if config.split_guidance:
        problems.append(
            Problem("split_guidance = true is for `landiff sample --nproc 2`, not for jobs")
        )
    job = plan_process("sample", context, name or "sample", ("sample",), config)
    if is_array(context, "sample"):
        job = as_array(job)
    return [replace(job, problems=tuple(problems))]


def command_line(words: Sequence[str]) -> str:
    """The command as it was typed, without secrets, for records and scripts."""
    return redact("landiff " + shlex.join(words))


# -------------------------------------------------------------------- one function for each stage


def plan_training(args: argparse.Namespace, context: SubmitContext, name: str | None) -> SubmitPlan:
    """The job of a trainer, in the run folder of its config."""
    trainer = TRAINERS[args.stage]
    cls = trainer.config_class
    config, problems = load_with_problems(cls, args.config, args.overrides)
    assert isinstance(config, TrainConfig), cls
    resources = context.cluster.resources(args.stage, context.nodes)
    if context.cluster.scheduler == "local" and resources.tasks_per_node is None:
        processes = default_processes(config)
        resources = resources.model_copy(update={"tasks_per_node": processes})
    launch = context.launch(resources.nodes * resources.tasks)
    problems = without_consequences([*problems, *trainer.check(config, launch)])
    run = context.workdir / config.run
    job = BatchJob(
        name=name or run.name,
        run=run,
        workdir=context.workdir,
        module=trainer.module,
        arguments=(str(run / JOB_FOLDER / CONFIG),),
        resources=resources,
        trainer=True,
        made_by=context.made_by,
        python=context.python,
        here=context.here,
    )
    return SubmitPlan(args.stage, job, config, steps=config.loop.steps, problems=tuple(problems))


def plan_process(
    stage: str,
    context: SubmitContext,
    name: str,
    words: Sequence[str],
    config: Config | None,
) -> SubmitPlan:
    """A job of one process on one node, in the run folder `runs/NAME`.

    `words`: its `landiff` command, without `--config`.
    """
    run = context.workdir / "runs" / name
    arguments = tuple(words)
    if config is not None:
        arguments = (*words, "--config", str(run / JOB_FOLDER / CONFIG))
    job = BatchJob(
        name=name,
        run=run,
        workdir=context.workdir,
        module="landiff.launchers.cli",
        arguments=arguments,
        resources=context.cluster.resources(stage),
        trainer=False,
        made_by=context.made_by,
        python=context.python,
        here=context.here,
    )
    return SubmitPlan(stage, job, config)


def as_array(plan: SubmitPlan) -> SubmitPlan:
    """The same job as an array, whose tasks share its work."""
    return replace(plan, job=replace(plan.job, array=True))


def is_array(context: SubmitContext, stage: str) -> bool:
    """Whether the jobs of a stage are arrays."""
    if context.cluster.scheduler == "local" or context.here:
        return False
    return context.cluster.resources(stage).array > 1


def plan_shard_jobs(
    args: argparse.Namespace, context: SubmitContext, name: str | None
) -> list[SubmitPlan]:
    """One process; or an array, and a job that writes the manifest after it."""
    launch = context.launch()
    if args.action != "run":
        launch = replace(launch, inputs_exist=False)
    config, problems = load_checked(
        "shards", ShardsJobConfig, args.config, args.overrides, launch=launch
    )
    name = name or "shards"
    if args.action != "run" or not is_array(context, "shards"):
        job = plan_process("shards", context, name, ("shards", args.action), config)
        return [replace(job, problems=tuple(problems))]
    tasks = plan_process("shards", context, f"{name}-tasks", ("shards", "run"), config)
    tasks = replace(as_array(tasks), problems=tuple(problems))
    finalize = plan_process("shards", context, name, ("shards", "finalize"), config)
    return [tasks, replace(finalize, after=(tasks.name,))]


def plan_precompute(
    args: argparse.Namespace, context: SubmitContext, name: str | None
) -> list[SubmitPlan]:
    """A job or an array for each group of columns, and a job that enters them into the manifest.

    A group decodes each clip once for all of its columns.
    """
    launch = context.launch()
    if args.action == "finalize":
        launch = replace(launch, inputs_exist=False)
    config, problems = load_checked(
        "precompute", PrecomputeConfig, args.config, args.overrides, launch=launch
    )
    name = name or "precompute"
    finalize = plan_process("precompute", context, name, ("precompute", "finalize"), config)
    if args.action == "finalize":
        return [finalize]
    words = ["precompute", "run", "--no-finalize"]
    array = is_array(context, "precompute")
    if array:
        # Not taken from the size of the array, since some of its tasks may be repeated alone.
        words += ["--tasks", str(context.cluster.resources("precompute").array)]
    groups = column_groups(config)
    if context.job_per_column:
        groups = [[column] for column in config.columns]
    plans = []
    for group in groups:
        update = {
            "columns": {column: config.columns[column] for column in group},
            "redo": tuple(column for column in config.redo if column in group),
        }
        own_name = f"{name}-frames" if len(group) > 1 else f"{name}-{group[0]}"
        own = config.model_copy(update=update)
        plan = plan_process("precompute", context, own_name, words, own)
        plan = replace(plan, after=captions_jobs(name, group, config))
        plans.append(as_array(plan) if array else plan)
    plans[0] = replace(plans[0], problems=tuple(problems))  # those of all columns
    return [*plans, replace(finalize, after=tuple(plan.name for plan in plans))]


def captions_jobs(name: str, group: Sequence[str], config: PrecomputeConfig) -> tuple[str, ...]:
    """Names of the jobs that write the captions which text columns of `group` encode."""
    found = []
    for column in group:
        settings = config.columns[column]
        if isinstance(settings, TextColumn) and settings.captions in config.columns:
            found.append(f"{name}-{settings.captions}")
    return tuple(found)


def plan_evaluation(
    args: argparse.Namespace, context: SubmitContext, name: str | None
) -> SubmitPlan:
    """The job of an action of `landiff evaluate`. Paths of its options are made absolute."""
    refuse_vbench_options(args)
    stage, cls = EVALUATIONS[args.action]
    launch = context.launch()
    config, problems = load_checked(stage, cls, args.config, args.overrides, launch=launch)
    words = ["evaluate", args.action]
    default = "evaluate"
    if args.action != "conditions":
        default = f"evaluate-{args.action}"
    if args.action == "vbench":
        problems += check_vbench(args, inputs_exist=launch.inputs_exist)
        if args.vbench_python is not None:
            words += ["--vbench-python", str(context.workdir / args.vbench_python)]
        if args.dimensions is not None:
            words += ["--dimensions", args.dimensions]
        if args.augmented is not None:
            words += ["--augmented", str(context.workdir / args.augmented)]
        if args.nproc is not None:
            words += ["--nproc", str(args.nproc)]
        if args.task is not None:
            words += ["--task", args.task]
    job = plan_process("evaluate", context, name or default, words, config)
    return replace(job, problems=tuple(problems))


def plan_convert(
    args: argparse.Namespace, argv: Sequence[str], context: SubmitContext
) -> SubmitPlan:
    """The command as it was typed, in a run folder named after what it writes."""
    name = f"export-{args.name}" if args.name else f"convert-to-{args.to}"
    plan = plan_process("convert", context, name, argv, None)
    request = request_of(args)
    check = check_pipeline if names_config(request) else check_request
    return replace(plan, problems=tuple(check(request, context.launch())))
