"""From a `landiff` command line to the jobs that do its work: run folder, module, arguments, config."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from landiff.configs import Config, ConfigError
from landiff.configs.problems import Problem
from landiff.configs.secrets import redact
from landiff.launchers.arguments import build_parser, parse_command
from landiff.launchers.checks import check, check_pipeline, load_checked, load_with_problems
from landiff.launchers.local.start import default_processes
from landiff.launchers.slurm.cluster_config import TRAINERS, ClusterConfig
from landiff.launchers.slurm.script import BatchJob
from landiff.launchers.weights.request import check_request, request_of
from landiff.training.checks import Launch

CONFIG = "config.yaml"  # in the job folder


@dataclass(frozen=True)
class PlannedJob:
    """A job, its resolved config, and the names of the planned jobs it waits for."""

    stage: str
    job: BatchJob
    config: Config | None
    after: tuple[str, ...] = ()
    steps: int | None = None  # of a trainer
    problems: tuple[Problem, ...] = ()  # why it cannot run

    @property
    def name(self) -> str:
        return self.job.name


@dataclass(frozen=True)
class SubmitContext:
    """Where and for whom: what all jobs of one submission share."""

    cluster: ClusterConfig
    workdir: Path
    made_by: str
    python: str
    nodes: int | None = None
    here: bool = False
    inputs_exist: bool = True  # False: jobs that run before make them

    def launch(self, ranks: int = 1) -> Launch:
        """How a job is started. Paths inside a container are not known here."""
        return Launch(ranks, self.inputs_exist and self.cluster.container is None)


def jobs_of(
    argv: Sequence[str],
    place: SubmitContext,
    name: str | None = None,
    overrides: Sequence[str] = (),
) -> list[PlannedJob]:
    """The jobs of one stage, in order. `name` replaces the stage's own where one stage occurs twice.

    Raises ConfigError for what the stage itself would refuse.
    """
    args = parse_command(build_parser(), argv)
    args.overrides = [*args.overrides, *overrides]
    if args.command == "train":
        return [training_job(args, place, name)]
    if place.nodes not in (None, 1):
        raise ConfigError(
            f"--nodes {place.nodes}: {args.command} runs on one node; a precompute job is spread by stages.precompute.array"
        )
    if args.command == "shards":
        return shards_jobs(args, place, name)
    if args.command == "precompute":
        return precompute_jobs(args, place, name)
    if args.command == "convert":
        return [convert_stage_job(args, argv, place)]
    if args.command not in ("sample", "evaluate"):
        raise ConfigError(
            f"{args.command} is no stage of its own; submit one of {', '.join(('shards', 'precompute', *TRAINERS, 'convert', 'sample', 'evaluate'))}"
        )
    values = {"prompts": args.prompts} if getattr(args, "prompts", None) else None
    config, problems = load_checked(
        args.command,
        config_class(args.command),
        args.config,
        args.overrides,
        place.launch(),
        values,
    )
    job = single(args.command, place, name or args.command, (args.command,), config)
    return [replace(job, problems=tuple(problems))]


def is_override(text: str) -> bool:
    """`a.b=value`; a prompt may hold an equals sign behind a blank."""
    key, sign, _ = text.partition("=")
    return bool(sign) and key.replace(".", "").replace("_", "").replace("-", "").isalnum()


def config_class(stage: str) -> type[Config]:
    """The config of a stage; torch-free imports, one at a time."""
    from landiff.data_pipeline.precompute import config as precompute_config
    from landiff.launchers import config
    from landiff.training.diffusion.config import DiffusionTrainConfig
    from landiff.training.lm.config import LMTrainConfig
    from landiff.training.tokenizer.config import TokenizerTrainConfig

    return {
        "shards": config.ShardsJobConfig,
        "precompute": precompute_config.PrecomputeConfig,
        "tokenizer": TokenizerTrainConfig,
        "lm": LMTrainConfig,
        "diffusion": DiffusionTrainConfig,
        "sample": config.SampleConfig,
        "evaluate": config.EvaluateConfig,
    }[stage]


def training_job(args: argparse.Namespace, place: SubmitContext, name: str | None) -> PlannedJob:
    cls = config_class(args.stage)
    config, problems = load_with_problems(cls, args.config, args.overrides)
    resources = place.cluster.resources(args.stage, place.nodes)
    if place.cluster.scheduler == "local" and resources.tasks_per_node is None:
        processes = default_processes(config)
        resources = resources.model_copy(update={"tasks_per_node": processes})
    launch = place.launch(resources.nodes * resources.tasks)
    problems += check(args.stage, config, launch)
    run = place.workdir / config.run
    job = BatchJob(
        name=name or run.name,
        run=run,
        workdir=place.workdir,
        module=f"landiff.training.{args.stage}",
        arguments=(str(run / "job" / CONFIG),),
        resources=resources,
        trainer=True,
        made_by=place.made_by,
        python=place.python,
        here=place.here,
    )
    return PlannedJob(args.stage, job, config, steps=config.loop.steps, problems=tuple(problems))


def single(
    stage: str,
    place: SubmitContext,
    name: str,
    words: Sequence[str],
    config: Config | None,
    after: Sequence[str] = (),
) -> PlannedJob:
    """One process on one node, in the run folder runs/<name>."""
    run = place.workdir / "runs" / name
    arguments = (*words, "--config", str(run / "job" / CONFIG)) if config else tuple(words)
    job = BatchJob(
        name=name,
        run=run,
        workdir=place.workdir,
        module="landiff.launchers.cli",
        arguments=arguments,
        resources=place.cluster.resources(stage),
        trainer=False,
        made_by=place.made_by,
        python=place.python,
        here=place.here,
    )
    return PlannedJob(stage, job, config, tuple(after))


def shards_jobs(
    args: argparse.Namespace, place: SubmitContext, name: str | None
) -> list[PlannedJob]:
    """One process, or an array and one job that writes the manifest."""
    launch = place.launch()
    if args.action != "run":
        launch = replace(launch, inputs_exist=False)
    config, problems = load_checked(
        "shards", config_class("shards"), args.config, args.overrides, launch
    )
    stem = name or "shards"
    if args.action != "run" or not is_array(place, "shards"):
        job = single("shards", place, stem, ("shards", args.action), config)
        return [replace(job, problems=tuple(problems))]
    one = single("shards", place, f"{stem}-tasks", ("shards", "run"), config)
    one = replace(one, job=replace(one.job, array=True), problems=tuple(problems))
    return [one, single("shards", place, stem, ("shards", "finalize"), config, (one.name,))]


def is_array(place: SubmitContext, stage: str) -> bool:
    return (
        place.cluster.scheduler == "slurm"
        and not place.here
        and place.cluster.resources(stage).array > 1
    )


def precompute_jobs(
    args: argparse.Namespace, place: SubmitContext, name: str | None
) -> list[PlannedJob]:
    """An array for every column, side by side; then one job that merges what they made into the manifest."""
    launch = place.launch()
    if args.action == "finalize":
        launch = replace(launch, inputs_exist=False)
    config, problems = load_checked(
        "precompute", config_class("precompute"), args.config, args.overrides, launch
    )
    stem = name or "precompute"
    finalize = single("precompute", place, stem, ("precompute", "finalize"), config)
    if args.action == "finalize":
        return [finalize]
    planned = []
    for column in config.columns:
        part = config.model_copy(
            update={
                "columns": {column: config.columns[column]},
                "redo": tuple(c for c in config.redo if c == column),
            }
        )
        array = is_array(place, "precompute")
        # told, not taken from the array's size: some of its tasks may run again alone
        tasks = ("--tasks", str(place.cluster.resources("precompute").array)) if array else ()
        one = single(
            "precompute",
            place,
            f"{stem}-{column}",
            ("precompute", "run", "--no-finalize", *tasks),
            part,
        )
        planned.append(replace(one, job=replace(one.job, array=array)))
    planned[0] = replace(planned[0], problems=tuple(problems))  # those of all columns
    return [*planned, replace(finalize, after=tuple(p.name for p in planned))]


def convert_stage_job(
    args: argparse.Namespace, argv: Sequence[str], place: SubmitContext
) -> PlannedJob:
    """The command as it was typed, in a run folder named after what it makes."""
    job = single(
        "convert",
        place,
        f"export-{args.name}" if args.name else f"convert-to-{args.to}",
        argv,
        None,
    )
    return replace(job, problems=tuple(check_request(request_of(args), place.launch())))


def pipeline_jobs(
    preset: str, prompts: Sequence[str], place: SubmitContext, overrides: Sequence[str]
) -> list[PlannedJob]:
    """The whole walk. An override is `stage.key=value`, e.g. `lm.loop.steps=100`; stages are named as their jobs."""
    from landiff.launchers.pipeline import pipeline_stages

    stages = pipeline_stages(preset, 1, prompts)
    names = {stage.name: stage.name.replace(" ", "-") for stage in stages}
    mine: dict[str, list[str]] = {name: [] for name in names.values()}
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in mine or not is_override(rest):
            raise ConfigError(
                f"{override!r} is not of the form stage.key=value; the stages are {', '.join(mine)}"
            )
        mine[name].append(rest)
    planned: list[PlannedJob] = []
    last: dict[str, tuple[str, ...]] = {}  # stage -> its last jobs, which the next stages wait for
    entered: dict[str, str] = {}  # column -> the job after which the manifest has it
    for stage in stages:
        name = names[stage.name]
        where = replace(place, inputs_exist=place.inputs_exist and not stage.after)
        jobs = columns_apart(jobs_of([*stage.command], where, name, mine[name]), place)
        waits = [job for before in stage.after for job in last[before]]
        planned += [
            job if job.after else replace(job, after=needs(job, waits, last, entered))
            for job in jobs
        ]
        entered |= {
            column: job.name
            for job in jobs
            if job.stage == "precompute" and job.after
            for column in job.config.columns
        }
        last[stage.name] = tuple(
            job.name for job in jobs if not any(job.name in other.after for other in jobs)
        )
    configs = {job.name: job.config for job in planned}
    planned[-1] = replace(planned[-1], problems=(*planned[-1].problems, *check_pipeline(configs)))
    return planned


def columns_apart(jobs: Sequence[PlannedJob], place: SubmitContext) -> list[PlannedJob]:
    """Where several columns are made: each with a job that enters it into the manifest, so that its readers wait for it alone."""
    *arrays, _ = jobs
    if jobs[0].stage != "precompute" or len(arrays) < 2:
        return list(jobs)
    return [
        job
        for one in arrays
        for column in one.config.columns
        for job in (
            one,
            single(
                "precompute",
                place,
                f"enter-{column}",
                ("precompute", "finalize"),
                one.config,
                (one.name,),
            ),
        )
    ]


def needs(
    job: PlannedJob,
    waits: Sequence[str],
    last: Mapping[str, Sequence[str]],
    entered: Mapping[str, str],
) -> tuple[str, ...]:
    """What a job of the walk waits for: a column that needs no tokenizer for the raw shards, a trainer for what it reads."""
    if job.stage == "precompute" and not any(
        column.kind == "tokens" for column in job.config.columns.values()
    ):
        return tuple(last["shards"])
    if job.steps is None:
        return tuple(waits)
    read = [entered[column] for column in job.config.columns if column in entered]
    return tuple(dict.fromkeys([*(name for name in waits if name not in entered.values()), *read]))


def command_line(words: Sequence[str]) -> str:
    """The command as it was typed, without secrets, for records and scripts."""
    return redact("landiff " + shlex.join(words))
