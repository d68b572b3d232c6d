"""Submits planned jobs to SLURM."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from landiff.configs import ConfigError, ownership
from landiff.configs.files import write_text
from landiff.launchers.run.job_folder import CHAIN
from landiff.launchers.run.records import read_record
from landiff.launchers.slurm.client import Slurm
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.launchers.slurm.prepare import (
    can_be_skipped,
    done_message,
    own_run_folder,
    prepare_run,
    record_jobs,
)
from landiff.launchers.slurm.stage_jobs import SubmitPlan

SUBMISSION = ".submission"  # lock of a job folder while its job is submitted


def queue(
    plans: Sequence[SubmitPlan],
    cluster: ClusterConfig,
    slurm: Slurm,
    *,
    after: Sequence[str] = (),
    skip_done: bool = True,
    take_over: bool = False,
) -> int:
    """Submit the jobs that are not done yet. Returns 0.

    A job that is in the queue or runs is not submitted again; the jobs after it wait for it.
    Without `skip_done`, only finished trainers are skipped. `after`: ids of jobs that jobs without
    dependencies wait for.

    Raises OwnedError if another submission uses one of the run folders, or if a process works in
    one of them.
    """
    with ExitStack() as locks:
        for folder in sorted({plan.job.folder for plan in plans}):
            name = f"the submission of {folder.parent}"
            locks.enter_context(ownership.take(folder / SUBMISSION, name, take_over=take_over))
        ids = queued_ids(plans, slurm)
        if len(plans) == 1 and ids:
            run = plans[0].job.run
            raise ConfigError(
                f"{run} has job {ids[plans[0].name]} in the queue already; "
                f"landiff stop {run} ends it"
            )
        # All checks, before the first job is submitted
        skipped: set[str] = set()
        scripts: dict[str, Path] = {}
        for plan in plans:
            if plan.name in ids:
                continue
            if can_be_skipped(plan, skipped, skip_done):
                skipped.add(plan.name)
                continue
            own_run_folder(plan, take_over=take_over).release()  # no process works there
            scripts[plan.name] = prepare_run(plan, cluster)
            slurm.check(scripts[plan.name])
        for plan in plans:
            if plan.name in skipped:
                print(done_message(plan))
            elif plan.name not in scripts:
                print(f"{plan.name}: job {ids[plan.name]} is in the queue already")
            else:
                awaited = [ids[name] for name in plan.after if name in ids] or list(after)
                jobs = submit_one(plan, cluster, slurm, scripts[plan.name], awaited)
                ids[plan.name] = jobs[-1]
                text = f"{plan.name}: job {' -> '.join(jobs)}"
                if awaited:
                    text += f", after {', '.join(awaited)}"
                print(f"{text}; {plan.job.run}")
    return 0


def queued_ids(plans: Sequence[SubmitPlan], slurm: Slurm) -> dict[str, str]:
    """Ids of the jobs that are in the queue or run, by name of the plan."""
    known = {plan.name: read_record(plan.job.run).get("job_ids", []) for plan in plans}
    all_ids: list[str] = []
    for jobs in known.values():
        all_ids += jobs
    if not all_ids:
        return {}
    active = {job.array_id for job in slurm.queue(all_ids) if job.active}
    found = {}
    for name, jobs in known.items():
        for job in jobs:
            if job in active:
                found[name] = job  # the last of a chain
    return found


def submit_one(
    plan: SubmitPlan, cluster: ClusterConfig, slurm: Slurm, script: Path, after: Sequence[str]
) -> list[str]:
    """Submit one job, or a chain of jobs that wait for each other. Returns the ids."""
    jobs = [slurm.submit(script, after)]
    if cluster.restart == "chain" and plan.job.trainer:
        while len(jobs) < cluster.chain_length:
            jobs.append(slurm.submit(script, [jobs[-1]], kind="afterany"))
    if len(jobs) > 1:
        write_text(plan.job.folder / CHAIN, "\n".join(jobs) + "\n")
    record_jobs(plan, jobs)
    return jobs
