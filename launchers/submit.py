"""`landiff submit`: a stage, or the whole walk, as jobs; `landiff stop`: save and end."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from configs import ConfigError, dump, load
from configs.documents import read_json
from configs.files import PRIVATE, write_text
from configs.loader import write_config
from configs.problems import Problem, problems_of, require_none
from configs.secrets import redact
from launchers.cluster_config import TRAINERS, ClusterConfig
from launchers.script_values import check_job_ids
from launchers.slurm import Slurm
from launchers.slurm_script import JOB_FOLDER, LOGS, SCRIPT, sbatch_text
from launchers.snapshot import write_snapshot
from launchers.stage_jobs import CONFIG, Place, Planned, command_line, jobs_of, pipeline_jobs
from training.run_folder import finished_step

RECORD, PID = "job.json", "pid"


def submit(args: argparse.Namespace, argv: Sequence[str], slurm: Slurm | None = None) -> int:
    """Returns 0 when all jobs are queued (or, here, have done their work)."""
    cluster = load(ClusterConfig, cluster_name(args.cluster))
    check_job_ids(args.after or (), "--after")
    python = cluster.python or ("python3" if cluster.container else sys.executable)
    place = Place(cluster, Path.cwd(), command_line(argv), python, args.nodes, args.here, inputs_exist=not args.after)
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
    skip = args.stage == "pipeline"  # a stage that is asked for by name looks by itself what is left to do
    if cluster.scheduler == "local" or args.here:
        return run_here(planned, cluster, skip)
    return queue(planned, cluster, slurm or Slurm(), args.after or (), skip)


def problems_of_plans(planned: Sequence[Planned]) -> list[Problem]:
    """Why jobs cannot run, with the name of the job where there are several. What is done is not asked again."""
    problems: list[Problem] = []
    for plan in planned:
        if is_done(plan):
            continue
        for problem in plan.problems:
            prefix = f"{plan.name}: " if len(planned) > 1 else ""
            problems.append(Problem(prefix + problem.text))
    return problems


def check_allocation(planned: Sequence[Planned], environment: Mapping[str, str]) -> None:
    """--here needs an allocation of enough nodes around it. Raises ConfigError."""
    nodes, most = int(environment.get("SLURM_JOB_NUM_NODES", "0")), max(planned, key=lambda plan: plan.job.resources.nodes)
    wanted = most.job.resources.nodes
    if nodes < wanted:
        here = f"this one has {nodes}" if nodes else "this shell is in none"
        raise ConfigError(f"--here runs {most.name} in an allocation of {wanted} node(s), and {here}; start with  salloc -N {wanted}, or leave --here out")


def cluster_name(name: str) -> str:
    """`sandbox` is the packaged cluster/sandbox; a path stays one."""
    return name if name.endswith((".yaml", ".yml")) or "/" in name else f"cluster/{name}"


def dry_run(planned: Sequence[Planned], cluster: ClusterConfig) -> str:
    """Resolved configs, the plan and the scripts, as text."""
    blocks = []
    shown = cluster.redacted()
    for plan in planned:
        if plan.config is not None:
            blocks.append(f"# ==== {plan.name}: resolved config, {plan.job.folder / CONFIG}\n{dump(plan.config)}")
        blocks.append(f"# ==== {plan.name}: batch script, {plan.job.folder / SCRIPT}\n{sbatch_text(plan.job, shown)}")
    blocks.append("# ==== plan\n" + "\n".join(f"# {line}" for line in plan_lines(planned)) + "\n# nothing was written, nothing submitted")
    return redact("\n".join(blocks))


def plan_lines(planned: Sequence[Planned]) -> list[str]:
    lines = []
    for plan in planned:
        want = plan.job.resources
        size = f"array of {want.array}" if plan.job.array else f"{want.nodes} node(s) x {want.tasks if plan.job.trainer else 1} task(s)"
        waits = f", after {', '.join(plan.after)}" if plan.after else ""
        lines.append(f"{plan.name}: {plan.stage}, {size}{waits}")
    return lines


# -------------------------------------------------------------------- the run folder


def fingerprint(plan: Planned) -> str:
    """Of what the job does. Where and with what resources is not part of it, nor how long a trainer trains."""
    config = plan.config.model_dump(mode="json", exclude={"loop"} if plan.steps is not None else None) if plan.config else None
    document = [plan.job.module, plan.job.arguments, config, plan.job.resources.array if plan.job.array else 1]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def read_record(run: Path) -> dict:
    """job.json of a run folder, with the job that runs there now; empty where nothing was submitted."""
    path, current = run / JOB_FOLDER / RECORD, run / JOB_FOLDER / "current"
    if not path.exists():
        return {}
    advice = f"delete {path.parent} and submit the run again"
    record = read_json(path, advice=advice)
    job_ids = record.get("job_ids")
    if not isinstance(job_ids, list) or not all(isinstance(job, str) for job in job_ids):
        raise ConfigError(f"{path} has no list of job_ids; {advice}")
    if current.exists():
        job = current.read_text(encoding="utf-8").strip()  # by hand, perhaps: sbatch RUN/job/job.sbatch
        if job.isdigit() and job not in record["job_ids"]:
            record["job_ids"].append(job)
    return record


def is_done(plan: Planned) -> bool:
    """Is there nothing left to do for this job, as it is now configured?"""
    run = plan.job.run
    if plan.steps is not None:
        return (finished_step(run) or 0) >= plan.steps
    if read_record(run).get("fingerprint") != fingerprint(plan):
        return False
    return all(marker.exists() for marker in done_markers(plan))


def nothing_left(plan: Planned, skipped: Collection[str], skip: bool) -> bool:
    """A trainer that has its steps is done for good; anything else only while what it reads was not made anew."""
    return is_done(plan) and (plan.steps is not None or (skip and all(name in skipped for name in plan.after)))


def said_of_done(plan: Planned) -> str:
    """A trainer's checkpoints stay what they are when its config is edited."""
    edited = plan.steps is not None and read_record(plan.job.run).get("fingerprint", fingerprint(plan)) != fingerprint(plan)
    return f"{plan.name}: done already" + (f"; its config was edited since, to train anew give another run= than {plan.job.run}" if edited else "")


def done_markers(plan: Planned) -> list[Path]:
    if plan.job.array:
        return [plan.job.run / f"done.{task}" for task in range(plan.job.resources.array)]
    return [plan.job.run / "done"]


def prepare(plan: Planned, cluster: ClusterConfig) -> Path:
    """Write everything the job needs into its run folder; returns the script."""
    folder = plan.job.folder
    script = sbatch_text(plan.job, cluster)
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    origin = write_snapshot(folder)
    if plan.config is not None:
        write_config(folder / CONFIG, plan.config)
    write_text(folder / "cluster.yaml", dump(cluster), PRIVATE)  # env may hold secrets
    write_text(folder / SCRIPT, script, PRIVATE)
    for pattern in ("done*" if plan.steps is None else "done", "stop", "job/stopped", "job/state*", "job/given_up*", "job/last_error*", "job/current", "job/chain"):
        for path in plan.job.run.glob(pattern):
            path.unlink()
    write_record(plan, [], origin)
    return folder / SCRIPT


def write_record(plan: Planned, job_ids: Sequence[str], origin: str | None = None) -> None:
    record = {
        "name": plan.name, "stage": plan.stage, "job_ids": list(job_ids), "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": plan.job.made_by, "fingerprint": fingerprint(plan), "trainer": plan.job.trainer, "steps": plan.steps,
        "array": plan.job.resources.array if plan.job.array else None, "ranks": plan.job.resources.nodes * plan.job.resources.tasks,
        "code": origin or read_record(plan.job.run).get("code", ""), "workdir": str(plan.job.workdir),
    }
    write_text(plan.job.folder / RECORD, json.dumps(record, indent=1))


# -------------------------------------------------------------------- queue, or run here


def queue(planned: Sequence[Planned], cluster: ClusterConfig, slurm: Slurm, after: Sequence[str] = (), skip: bool = True) -> int:
    """Submit what is not done yet; with `skip` = False all but finished trainers. A job that is queued or runs already is left alone, and waited for by the next."""
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
            scripts[plan.name] = prepare(plan, cluster)
            slurm.check(scripts[plan.name])
    if len(planned) == 1 and ids:
        raise ConfigError(f"{planned[0].job.run} has job {ids[planned[0].name]} in the queue already; landiff stop {planned[0].job.run} ends it")
    for plan in planned:
        if plan.name in skipped:
            print(said_of_done(plan))
        elif plan.name not in scripts:
            print(f"{plan.name}: job {ids[plan.name]} is in the queue already")
        else:
            waits = [ids[name] for name in plan.after if name in ids] or list(after)
            jobs = submit_one(plan, cluster, slurm, scripts[plan.name], waits)
            ids[plan.name] = jobs[-1]
            print(f"{plan.name}: job {' -> '.join(jobs)}" + (f", after {', '.join(waits)}" if waits else "") + f"; {plan.job.run}")
    return 0


def submit_one(plan: Planned, cluster: ClusterConfig, slurm: Slurm, script: Path, after: Sequence[str]) -> list[str]:
    """The ids of the job, or of the chain of jobs, one behind the other."""
    jobs = [slurm.submit(script, after)]
    for _ in range(cluster.chain_length - 1 if cluster.restart == "chain" and plan.job.trainer else 0):
        jobs.append(slurm.submit(script, [jobs[-1]], kind="afterany"))
    if len(jobs) > 1:
        write_text(plan.job.folder / "chain", "\n".join(jobs) + "\n")
    write_record(plan, jobs)
    return jobs


def run_here(planned: Sequence[Planned], cluster: ClusterConfig, skip: bool = True) -> int:
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
        script = prepare(plan, cluster)
        print(f"{plan.name}: {plan.job.folder / LOGS}", flush=True)
        code, interrupted = run_script(script)
        if interrupted:
            print(f"{plan.name}: interrupted; the same command goes on from here", file=sys.stderr)
            return code
        if code:
            failed[plan.name] = code
            print(f"{plan.name}: ended with {code}; see landiff logs {plan.job.run}", file=sys.stderr)
    return next(iter(failed.values()), 0)


def run_script(script: Path) -> tuple[int, bool]:
    """The batch script in a process of its own, told of our signals -> (its exit code, was it Ctrl-C or SIGTERM that ended it?).

    Its words go to the terminal and to batch.log.
    """
    child = subprocess.Popen(["bash", "-c", 'exec > >(exec tee -a "$1") 2>&1; exec bash "$2"', "_", str(script.parent / LOGS / "batch.log"), str(script)],
                             start_new_session=True)
    write_text(script.parent / PID, f"{child.pid} {socket.gethostname()}\n")

    seen: set[int] = set()

    def forward(number: int, _frame: object) -> None:
        seen.add(number)
        child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = child.wait()
        return code, code != 0 and bool(seen & {signal.SIGINT, signal.SIGTERM})
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        (script.parent / PID).unlink(missing_ok=True)


def running_here(run: Path) -> tuple[int, str]:
    """(process, host) of a run that was started without sbatch; (0, "") when there is none. What died here is none."""
    path = run / JOB_FOLDER / PID
    if not path.exists():
        return 0, ""
    number, _, host = path.read_text(encoding="utf-8").strip().partition(" ")
    alive = host != socket.gethostname() or Path("/proc", number).exists()
    return (int(number), host) if alive else (0, "")


# -------------------------------------------------------------------- stop


def stop(run: Path, restart: bool, slurm: Slurm | None = None) -> str:
    """Ask a run to save and end (or, with `restart`, to save and start again). Returns what was done."""
    record = read_record(run)
    if not record and (restart or not (run / "config.yaml").is_file()):
        raise ConfigError(f"{run} was not submitted (it has no {JOB_FOLDER}/{RECORD}); landiff status --all lists what was")
    if not record:  # landiff train: its ranks look at the file behind every step
        write_text(run / "stop", "")
        return f"{run}: asked its ranks to save and end"
    pid, host = running_here(run)
    if pid and host != socket.gethostname():
        raise ConfigError(f"{run} runs on {host}; call landiff stop there")
    if not restart:  # for these jobs: one that is queued later is not meant
        write_text(run / JOB_FOLDER / "stopped", "\n".join(["here"] if pid else record["job_ids"]) + "\n")
    if pid:
        os.kill(pid, signal.SIGUSR1)
        return f"{run}: asked process {pid} to save and {'start again' if restart else 'end'}"
    slurm = slurm or Slurm()
    said = []
    for job in slurm.queue(record["job_ids"]) if record["job_ids"] else []:
        if job.state == "RUNNING":
            slurm.signal(job.id)
            said.append(f"job {job.id} saves and {'starts again' if restart else 'ends'}")
        elif job.active and not restart:
            slurm.cancel(job.id)
            said.append(f"job {job.id} ({job.state.lower()}) is cancelled")
    return f"{run}: " + ("; ".join(said) or "nothing of it is in the queue")
