"""`landiff submit`: runs a stage or the whole pipeline as jobs."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from landiff.configs import ConfigError, dump, load
from landiff.configs.problems import Problem, problems_of, require_none
from landiff.configs.secrets import redact
from landiff.launchers.project.presets import packaged_presets, require_preset
from landiff.launchers.run.job_folder import CONFIG, SCRIPT
from landiff.launchers.slurm.client import Slurm
from landiff.launchers.slurm.cluster_config import TRAINERS, ClusterConfig
from landiff.launchers.slurm.pipeline_jobs import plan_pipeline
from landiff.launchers.slurm.prepare import is_done
from landiff.launchers.slurm.queueing import queue
from landiff.launchers.slurm.run_here import run_here
from landiff.launchers.slurm.script import sbatch_text
from landiff.launchers.slurm.script_values import check_job_ids
from landiff.launchers.slurm.stage_jobs import SubmitContext, SubmitPlan, command_line, plan_stage


def submit(args: argparse.Namespace, argv: Sequence[str], slurm: Slurm | None = None) -> int:
    """Submit jobs, or run them here. Returns 0 if all are queued, or have succeeded here.

    The jobs of a project run in its folder, all others in the current one.
    Raises ConfigError with all problems of the jobs, before anything is written.
    """
    cluster = load(ClusterConfig, cluster_source(args.cluster))
    check_job_ids(args.after or (), "--after")
    if args.stage != "pipeline" or args.preset in packaged_presets():
        return submit_here(args, argv, cluster, slurm)
    require_preset(args.preset)
    folder = Path(args.preset).absolute()
    with contextlib.chdir(folder):  # as `landiff quickstart` does for a project
        code = submit_here(
            argparse.Namespace(**{**vars(args), "preset": str(folder)}), argv, cluster, slurm
        )
    if not args.dry_run and folder != Path.cwd():
        print(
            f"submit: the jobs run in {folder}; next  landiff -C {shlex.quote(args.preset)} status"
        )
    return code


def submit_here(
    args: argparse.Namespace, argv: Sequence[str], cluster: ClusterConfig, slurm: Slurm | None
) -> int:
    """`submit` in the current folder, in which the jobs resolve relative paths."""
    plans, problems = plan_jobs(args, argv, cluster)
    problems += problems_of_plans(plans)
    if args.here and cluster.scheduler == "slurm" and not args.dry_run:
        problems += problems_of(lambda: check_allocation(plans, os.environ))
    if args.dry_run:
        if args.stage == "pipeline" and not problems:
            print_outlook(plans)
        print(dry_run(plans, cluster))
    require_none(problems)
    if args.dry_run:
        return 0
    # A stage that is submitted by name finds out itself what is left to do.
    skip_done = args.stage == "pipeline"
    if cluster.scheduler == "local" or args.here:
        return run_here(plans, cluster, skip_done=skip_done, take_over=args.take_over)
    return queue(
        plans,
        cluster,
        slurm or Slurm(),
        after=args.after or (),
        skip_done=skip_done,
        take_over=args.take_over,
    )


def plan_jobs(
    args: argparse.Namespace, argv: Sequence[str], cluster: ClusterConfig
) -> tuple[list[SubmitPlan], list[Problem]]:
    """(jobs, problems): those of the stage or the pipeline that `args` names, in order.

    The problems are those that belong to no single job.
    """
    default_python = "python3" if cluster.container else sys.executable
    context = SubmitContext(
        cluster=cluster,
        workdir=Path.cwd(),
        made_by=command_line(argv),
        python=cluster.python or default_python,
        nodes=args.nodes,
        here=args.here,
        inputs_exist=not args.after,
    )
    if args.stage == "pipeline":
        prompts = args.prompt or ()
        return plan_pipeline(args.preset, prompts, context, args.rest, args.first, args.skip or ())
    words = [args.stage, *args.rest]
    if args.stage in TRAINERS:
        words.insert(0, "train")
    return plan_stage(words, context), []


def cluster_source(name: str) -> str:
    """The packaged config `cluster/NAME`, or the path that `name` is."""
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    return name if is_path else f"cluster/{name}"


def problems_of_plans(plans: Sequence[SubmitPlan]) -> list[Problem]:
    """Why jobs that are not done cannot run, with the name of the job if there are several."""
    problems: list[Problem] = []
    for plan in plans:
        if is_done(plan):
            continue
        for problem in plan.problems:
            if len(plans) > 1:
                problem = Problem(f"{plan.name}: {problem.text}")
            problems.append(problem)
    return problems


def check_allocation(plans: Sequence[SubmitPlan], environment: Mapping[str, str]) -> None:
    """Raise ConfigError unless this shell is in an allocation with enough nodes for `--here`."""
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "0"))
    largest = max(plans, key=lambda plan: plan.job.resources.nodes)
    needed = largest.job.resources.nodes
    if nodes < needed:
        found = f"this one has {nodes}" if nodes else "this shell is in none"
        raise ConfigError(
            f"--here runs {largest.name} in an allocation of {needed} node(s), and {found}; "
            f"start with  salloc -N {needed}, or leave --here out"
        )


# -------------------------------------------------------------------- --dry-run


def dry_run(plans: Sequence[SubmitPlan], cluster: ClusterConfig) -> str:
    """Resolved configs, batch scripts and the plan, as text without secrets."""
    blocks = []
    shown = cluster.redacted()
    for plan in plans:
        if plan.config is not None:
            path = plan.job.folder / CONFIG
            blocks.append(f"# ==== {plan.name}: resolved config, {path}\n{dump(plan.config)}")
        path = plan.job.folder / SCRIPT
        blocks.append(f"# ==== {plan.name}: batch script, {path}\n{sbatch_text(plan.job, shown)}")
    lines = [f"# {plan_line(plan)}" for plan in plans]
    lines = ["# ==== plan", *lines, "# nothing was written, nothing submitted"]
    blocks.append("\n".join(lines))
    return redact("\n".join(blocks))


def print_outlook(plans: Sequence[SubmitPlan]) -> None:
    """Prints GPU hours, days and disk of the jobs of a pipeline, before all else."""
    # Imported here, because it loads torch.
    from landiff.launchers.budget.total import ORDER
    from landiff.launchers.project.outlook import outlook

    configs = {plan.name: plan.config for plan in plans if plan.config is not None}
    trainers = [stem for stems in ORDER for stem in stems]
    gpus = {}
    for plan in plans:
        if plan.name in trainers and plan.config is not None:
            gpus[plan.name] = plan.job.resources.nodes * plan.job.tasks_per_node
    for line in outlook(configs, gpus, Path.cwd()):
        print(redact(f"# {line}"))


def plan_line(plan: SubmitPlan) -> str:
    """Name, stage, size and dependencies of a job."""
    resources = plan.job.resources
    size = f"{resources.nodes} node(s) x {plan.job.tasks_per_node} task(s)"
    if plan.job.array:
        size = f"array of {resources.array}"
    text = f"{plan.name}: {plan.stage}, {size}"
    if plan.after:
        text += f", after {', '.join(plan.after)}"
    return text
