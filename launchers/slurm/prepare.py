"""Run folder of a job before the job starts: what is done already, and the files that it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from landiff.configs import dump, ownership
from landiff.configs.files import PRIVATE, write_text
from landiff.configs.loader import write_config
from landiff.configs.ownership import OWNER
from landiff.launchers.run.job_folder import CLUSTER, CONFIG, LOGS, SCRIPT
from landiff.launchers.run.records import OLD_MARKERS, read_record, remove_markers, write_record
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.launchers.slurm.script import sbatch_text
from landiff.launchers.slurm.snapshot import write_snapshot
from landiff.launchers.slurm.stage_jobs import SubmitPlan
from landiff.training.checkpoint.run_folder import DONE, finished_step


def job_fingerprint(plan: SubmitPlan) -> str:
    """Fingerprint of what the job computes.

    Its folder and resources are not part of it, nor for how long a trainer trains.
    """
    config = None
    if plan.config is not None:
        config = plan.config.model_dump(mode="json")
        if plan.steps is not None:
            del config["loop"]
    tasks = plan.job.resources.array if plan.job.array else 1
    document = [plan.job.module, plan.job.arguments, config, tasks]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def is_done(plan: SubmitPlan) -> bool:
    """Whether the job, as it is configured now, has finished."""
    run = plan.job.run
    if plan.steps is not None:
        return (finished_step(run) or 0) >= plan.steps
    if read_record(run).get("fingerprint") != job_fingerprint(plan):
        return False
    return all(marker.exists() for marker in done_markers(plan))


def can_be_skipped(plan: SubmitPlan, skipped: Collection[str], skip_done: bool) -> bool:
    """Whether nothing is left to do for a job.

    A trainer that has its steps is always skipped. Other jobs are skipped if `skip_done` is set and
    the jobs that they read from are in `skipped` too.
    """
    if not is_done(plan):
        return False
    if plan.steps is not None:
        return True
    return skip_done and all(name in skipped for name in plan.after)


def done_message(plan: SubmitPlan) -> str:
    """What a user is told about a job that is skipped."""
    text = f"{plan.name}: done already"
    if plan.steps is None:
        return text
    fingerprint = job_fingerprint(plan)
    if read_record(plan.job.run).get("fingerprint", fingerprint) == fingerprint:
        return text
    return (
        f"{text}; its config was edited since. To train anew, give another run= than {plan.job.run}"
    )


def done_markers(plan: SubmitPlan) -> list[Path]:
    """Files that exist when the job, or each task of its array, has finished."""
    if plan.job.array:
        return [plan.job.run / f"done.{task}" for task in range(plan.job.resources.array)]
    return [plan.job.run / DONE]


def own_run_folder(plan: SubmitPlan, *, take_over: bool) -> ownership.Ownership:
    """Own the run folder of a job. Raises OwnedError if a process works in it."""
    return ownership.take(plan.job.run / OWNER, f"run folder {plan.job.run}", take_over=take_over)


def prepare_run(plan: SubmitPlan, cluster: ClusterConfig) -> Path:
    """Write everything that the job needs into its run folder. Returns the batch script."""
    folder = plan.job.folder
    script = sbatch_text(plan.job, cluster)
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    origin = write_snapshot(folder)
    if plan.config is not None:
        write_config(folder / CONFIG, plan.config)
    write_text(folder / CLUSTER, dump(cluster), PRIVATE)  # env may hold secrets
    write_text(folder / SCRIPT, script, PRIVATE)
    done = f"{DONE}*" if plan.steps is None else DONE
    remove_markers(plan.job.run, [done, *OLD_MARKERS])
    record_jobs(plan, [], code=origin)
    return folder / SCRIPT


def record_jobs(plan: SubmitPlan, job_ids: Sequence[str], **values: object) -> None:
    """Record in `job.json` what was submitted, and as which SLURM jobs."""
    resources = plan.job.resources
    write_record(
        plan.job.run,
        name=plan.name,
        stage=plan.stage,
        launcher="submit",
        job_ids=list(job_ids),
        command=plan.job.made_by,
        fingerprint=job_fingerprint(plan),
        trainer=plan.job.trainer,
        steps=plan.steps,
        array=resources.array if plan.job.array else None,
        ranks=resources.nodes * resources.tasks,
        workdir=str(plan.job.workdir),
        **values,
    )
