"""`landiff submit`: a stage, or the whole walk, as jobs; `landiff stop`: save and end."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from landiff.configs import ConfigError, dump, load, ownership
from landiff.configs.files import PRIVATE, write_text
from landiff.configs.loader import write_config
from landiff.configs.ownership import OWNER, Owner
from landiff.configs.problems import Problem, problems_of, require_none
from landiff.configs.processes import machine
from landiff.configs.secrets import redact
from landiff.launchers.local.children import environment, stop_signals
from landiff.launchers.run.records import (
    LAST_ERROR,
    OLD_MARKERS,
    RECORD,
    STOPPED,
    read_record,
    remove_markers,
    running_owner,
    write_record,
)
from landiff.launchers.slurm.client import Slurm
from landiff.launchers.slurm.cluster_config import TRAINERS, ClusterConfig
from landiff.launchers.slurm.script import JOB_FOLDER, LOGS, SCRIPT, sbatch_text
from landiff.launchers.slurm.script_values import check_job_ids
from landiff.launchers.slurm.snapshot import write_snapshot
from landiff.launchers.slurm.stage_jobs import (
    CONFIG,
    PlannedJob,
    SubmitContext,
    command_line,
    jobs_of,
    pipeline_jobs,
)
from landiff.training.checkpoint.run_folder import finished_step

SUBMISSION = ".submission"  # lock of a job folder while its job is being queued


def submit(args: argparse.Namespace, argv: Sequence[str], slurm: Slurm | None = None) -> int:
    """Returns 0 when all jobs are queued (or, here, have done their work)."""
    cluster = load(ClusterConfig, cluster_name(args.cluster))
    check_job_ids(args.after or (), "--after")
    python = cluster.python or ("python3" if cluster.container else sys.executable)
    place = SubmitContext(
        cluster,
        Path.cwd(),
        command_line(argv),
        python,
        args.nodes,
        args.here,
        inputs_exist=not args.after,
    )
    if args.stage == "pipeline":
        planned = pipeline_jobs(args.preset, args.prompt or (), place, args.rest)
    else:
        words = ["train", args.stage] if args.stage in TRAINERS else [args.stage]
        planned = jobs_of([*words, *args.rest], place)
    problems = problems_of_plans(planned)
    if args.here and cluster.scheduler == "slurm" and not args.dry_run:
        problems += problems_of(lambda: check_allocation(planned, os.environ))
    if args.dry_run:
        print(dry_run(planned, cluster))
    require_none(problems)
    if args.dry_run:
        return 0
    skip = (
        args.stage == "pipeline"
    )  # a stage that is asked for by name looks by itself what is left to do
    if cluster.scheduler == "local" or args.here:
        return run_here(planned, cluster, skip, args.take_over)
    return queue(planned, cluster, slurm or Slurm(), args.after or (), skip, args.take_over)


def problems_of_plans(planned: Sequence[PlannedJob]) -> list[Problem]:
    """Why jobs cannot run, with the name of the job where there are several. What is done is not asked again."""
    problems: list[Problem] = []
    for plan in planned:
        if is_done(plan):
            continue
        for problem in plan.problems:
            prefix = f"{plan.name}: " if len(planned) > 1 else ""
            problems.append(Problem(prefix + problem.text))
    return problems


def check_allocation(planned: Sequence[PlannedJob], environment: Mapping[str, str]) -> None:
    """--here needs an allocation of enough nodes around it. Raises ConfigError."""
    nodes, most = (
        int(environment.get("SLURM_JOB_NUM_NODES", "0")),
        max(planned, key=lambda plan: plan.job.resources.nodes),
    )
    wanted = most.job.resources.nodes
    if nodes < wanted:
        here = f"this one has {nodes}" if nodes else "this shell is in none"
        raise ConfigError(
            f"--here runs {most.name} in an allocation of {wanted} node(s), and {here}; start with  salloc -N {wanted}, or leave --here out"
        )


def cluster_name(name: str) -> str:
    """`sandbox` is the packaged cluster/sandbox; a path stays one."""
    return name if name.endswith((".yaml", ".yml")) or "/" in name else f"cluster/{name}"


def dry_run(planned: Sequence[PlannedJob], cluster: ClusterConfig) -> str:
    """Resolved configs, the plan and the scripts, as text."""
    blocks = []
    shown = cluster.redacted()
    for plan in planned:
        if plan.config is not None:
            blocks.append(
                f"# ==== {plan.name}: resolved config, {plan.job.folder / CONFIG}\n{dump(plan.config)}"
            )
        blocks.append(
            f"# ==== {plan.name}: batch script, {plan.job.folder / SCRIPT}\n{sbatch_text(plan.job, shown)}"
        )
    blocks.append(
        "# ==== plan\n"
        + "\n".join(f"# {line}" for line in plan_lines(planned))
        + "\n# nothing was written, nothing submitted"
    )
    return redact("\n".join(blocks))


def plan_lines(planned: Sequence[PlannedJob]) -> list[str]:
    lines = []
    for plan in planned:
        want = plan.job.resources
        size = (
            f"array of {want.array}"
            if plan.job.array
            else f"{want.nodes} node(s) x {want.tasks if plan.job.trainer else 1} task(s)"
        )
        waits = f", after {', '.join(plan.after)}" if plan.after else ""
        lines.append(f"{plan.name}: {plan.stage}, {size}{waits}")
    return lines


# -------------------------------------------------------------------- the run folder


def job_fingerprint(plan: PlannedJob) -> str:
    """Of what the job does. Where and with what resources is not part of it, nor how long a trainer trains."""
    config = (
        plan.config.model_dump(mode="json", exclude={"loop"} if plan.steps is not None else None)
        if plan.config
        else None
    )
    document = [
        plan.job.module,
        plan.job.arguments,
        config,
        plan.job.resources.array if plan.job.array else 1,
    ]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def is_done(plan: PlannedJob) -> bool:
    """Is there nothing left to do for this job, as it is now configured?"""
    run = plan.job.run
    if plan.steps is not None:
        return (finished_step(run) or 0) >= plan.steps
    if read_record(run).get("fingerprint") != job_fingerprint(plan):
        return False
    return all(marker.exists() for marker in done_markers(plan))


def nothing_left(plan: PlannedJob, skipped: Collection[str], skip: bool) -> bool:
    """A trainer that has its steps is done for good; anything else only while what it reads was not made anew."""
    return is_done(plan) and (
        plan.steps is not None or (skip and all(name in skipped for name in plan.after))
    )


def said_of_done(plan: PlannedJob) -> str:
    """A trainer's checkpoints stay what they are when its config is edited."""
    edited = plan.steps is not None and read_record(plan.job.run).get(
        "fingerprint", job_fingerprint(plan)
    ) != job_fingerprint(plan)
    return f"{plan.name}: done already" + (
        f"; its config was edited since, to train anew give another run= than {plan.job.run}"
        if edited
        else ""
    )


def done_markers(plan: PlannedJob) -> list[Path]:
    if plan.job.array:
        return [plan.job.run / f"done.{task}" for task in range(plan.job.resources.array)]
    return [plan.job.run / "done"]


def prepare_run(plan: PlannedJob, cluster: ClusterConfig) -> Path:
    """Write everything the job needs into its run folder; returns the script."""
    folder = plan.job.folder
    script = sbatch_text(plan.job, cluster)
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    origin = write_snapshot(folder)
    if plan.config is not None:
        write_config(folder / CONFIG, plan.config)
    write_text(folder / "cluster.yaml", dump(cluster), PRIVATE)  # env may hold secrets
    write_text(folder / SCRIPT, script, PRIVATE)
    remove_markers(plan.job.run, ["done*" if plan.steps is None else "done", *OLD_MARKERS])
    record_jobs(plan, [], code=origin)
    return folder / SCRIPT


def record_jobs(plan: PlannedJob, job_ids: Sequence[str], **values: object) -> None:
    """Into job.json: what was submitted, under which ids."""
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


# -------------------------------------------------------------------- queue, or run here


def queue(
    planned: Sequence[PlannedJob],
    cluster: ClusterConfig,
    slurm: Slurm,
    after: Sequence[str] = (),
    skip: bool = True,
    take_over: bool = False,
) -> int:
    """Submit what is not done yet; with `skip` = False all but finished trainers.

    A job that is queued or runs already is left alone, and waited for by the next. Raises OwnedError where
    another submission is at work on one of these run folders, or a process that is no job of them trains there.
    """
    with ExitStack() as locks:
        for folder in sorted({plan.job.folder for plan in planned}):
            locks.enter_context(
                ownership.take(
                    folder / SUBMISSION, f"the submission of {folder.parent}", take_over=take_over
                )
            )
        return _queue(planned, cluster, slurm, after, skip, take_over)


def _queue(
    planned: Sequence[PlannedJob],
    cluster: ClusterConfig,
    slurm: Slurm,
    after: Sequence[str],
    skip: bool,
    take_over: bool,
) -> int:
    known = [job for plan in planned for job in read_record(plan.job.run).get("job_ids", [])]
    active = {job.id.split("_")[0] for job in slurm.queue(known) if job.active} if known else set()
    skipped, ids = set(), {}
    scripts = {}
    for plan in planned:  # all checks before the first submission
        running = [job for job in read_record(plan.job.run).get("job_ids", []) if job in active]
        if running:
            ids[plan.name] = running[-1]
        elif nothing_left(plan, skipped, skip):
            skipped.add(plan.name)
        else:
            own_submission(plan, take_over).release()  # no process works there
            scripts[plan.name] = prepare_run(plan, cluster)
            slurm.check(scripts[plan.name])
    if len(planned) == 1 and ids:
        raise ConfigError(
            f"{planned[0].job.run} has job {ids[planned[0].name]} in the queue already; landiff stop {planned[0].job.run} ends it"
        )
    for plan in planned:
        if plan.name in skipped:
            print(said_of_done(plan))
        elif plan.name not in scripts:
            print(f"{plan.name}: job {ids[plan.name]} is in the queue already")
        else:
            waits = [ids[name] for name in plan.after if name in ids] or list(after)
            jobs = submit_one(plan, cluster, slurm, scripts[plan.name], waits)
            ids[plan.name] = jobs[-1]
            print(
                f"{plan.name}: job {' -> '.join(jobs)}"
                + (f", after {', '.join(waits)}" if waits else "")
                + f"; {plan.job.run}"
            )
    return 0


def submit_one(
    plan: PlannedJob, cluster: ClusterConfig, slurm: Slurm, script: Path, after: Sequence[str]
) -> list[str]:
    """The ids of the job, or of the chain of jobs, one behind the other."""
    jobs = [slurm.submit(script, after)]
    for _ in range(
        cluster.chain_length - 1 if cluster.restart == "chain" and plan.job.trainer else 0
    ):
        jobs.append(slurm.submit(script, [jobs[-1]], kind="afterany"))
    if len(jobs) > 1:
        write_text(plan.job.folder / "chain", "\n".join(jobs) + "\n")
    record_jobs(plan, jobs)
    return jobs


def own_submission(plan: PlannedJob, take_over: bool) -> ownership.Ownership:
    """The run folder of a job. Raises OwnedError where a process works in it."""
    return ownership.take(plan.job.run / OWNER, f"run folder {plan.job.run}", take_over=take_over)


def run_here(
    planned: Sequence[PlannedJob],
    cluster: ClusterConfig,
    skip: bool = True,
    take_over: bool = False,
) -> int:
    """One after the other, in this terminal. A failed job costs those that depend on it and nothing else."""
    failed: dict[str, int] = {}
    skipped = set()
    for plan in planned:
        lost = [name for name in plan.after if name in failed]
        if lost:
            failed[plan.name] = 1
            print(f"{plan.name}: not run, {lost[0]} failed", file=sys.stderr)
            continue
        if nothing_left(plan, skipped, skip):
            skipped.add(plan.name)
            print(said_of_done(plan))
            continue
        with own_submission(plan, take_over) as owned:
            script = prepare_run(plan, cluster)
            print(f"{plan.name}: {plan.job.folder / LOGS}", flush=True)
            if cluster.scheduler == "slurm":
                owned.release()  # ranks on other nodes do not end with this process, so that the first of them is the owner
            code, interrupted = run_script(script, owned.token)
        if interrupted:
            print(f"{plan.name}: interrupted; the same command goes on from here", file=sys.stderr)
            return code
        if code:
            failed[plan.name] = code
            print(
                f"{plan.name}: ended with {code}; see landiff logs {plan.job.run}", file=sys.stderr
            )
    return next(iter(failed.values()), 0)


def run_script(script: Path, token: str) -> tuple[int, bool]:
    """The batch script in a process of its own, told of our signals -> (its exit code, was it Ctrl-C or SIGTERM that ended it?).

    Its words go to the terminal and to batch.log. `token`: of the owner of its run folder.
    """
    shell = [
        "bash",
        "-c",
        'exec > >(exec tee -a "$1") 2>&1; exec bash "$2"',
        "_",
        str(script.parent / LOGS / "batch.log"),
        str(script),
    ]
    child = subprocess.Popen(
        [sys.executable, "-m", "landiff.launchers.local.children", *shell],
        env={**environment(), ownership.TOKEN: token},
        start_new_session=True,
    )
    seen: set[int] = set()

    def forward(number: int, _frame: object) -> None:
        seen.add(number)
        child.send_signal(
            signal.SIGTERM if number == signal.SIGHUP else number
        )  # the script handles the others

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        code = child.wait()
        if code < 0:  # it could not say so
            write_text(
                script.parent / LAST_ERROR,
                f"the shell that runs {script} was ended by {signal.Signals(-code).name}\n",
            )
        return (code if code >= 0 else 128 - code), code != 0 and bool(seen - {signal.SIGUSR1})
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------- stop


def stop(run: Path, restart: bool, slurm: Slurm | None = None) -> str:
    """Ask a run to save and end (or, with `restart`, to save and start again). Returns what was done."""
    record = read_record(run)
    if not record and not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run} is no run folder (it has no {JOB_FOLDER}/{RECORD} and no config.yaml); landiff status --all lists them"
        )
    by_hand, jobs = record.get("launcher", "train") == "train", record.get("job_ids", [])
    if restart and by_hand:
        raise ConfigError(
            f"{run} was not submitted, so that nothing would start it again; leave --restart out"
        )
    owner = running_owner(run)
    if owner is not None and (
        by_hand or not jobs
    ):  # also inside an allocation, whose job is not the run's
        return stop_process(run, owner, restart, trainer=record.get("trainer", True))
    if jobs and not restart:  # for these jobs: one that is queued later is not meant
        write_text(run / JOB_FOLDER / STOPPED, "\n".join(jobs) + "\n")
    slurm = slurm or Slurm()
    said = []
    for job in slurm.queue(jobs) if jobs else []:
        if job.state == "RUNNING":
            slurm.signal(job.id)
            said.append(f"job {job.id} saves and {'starts again' if restart else 'ends'}")
        elif job.active and not restart:
            slurm.cancel(job.id)
            said.append(f"job {job.id} ({job.state.lower()}) is cancelled")
    return f"{run}: " + ("; ".join(said) or "nothing of it is running or in the queue")


def stop_process(run: Path, owner: Owner, restart: bool, trainer: bool) -> str:
    """Ask a run that is no SLURM job. From another machine a trainer is reached through the file that its ranks look at."""
    here = owner.machine == machine()
    if not here and (restart or not trainer):
        raise ConfigError(f"{run} runs on {owner.host}; call landiff stop there")
    if not restart:
        write_text(run / JOB_FOLDER / STOPPED, "here\n")
    if here:
        os.kill(owner.pid, signal.SIGUSR1)
    else:
        write_text(run / "stop", "")
    return f"{run}: asked {owner} to save and {'start again' if restart else 'end'}"
