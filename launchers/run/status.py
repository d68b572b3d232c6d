"""`landiff status`: the state of runs, from their run folders and from SLURM. Torch-free."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from landiff.configs import ConfigError
from landiff.launchers.progress import duration
from landiff.launchers.run.job_folder import GIVEN_UP, JOB_FOLDER, RECORD, STOPPED
from landiff.launchers.run.records import (
    owners,
    read_attempt_states,
    read_given_up,
    read_last_errors,
    read_record,
)
from landiff.launchers.slurm.client import QueuedJob, Slurm, SlurmError
from landiff.training.checkpoint.errors import first_error, read_message
from landiff.training.checkpoint.run_folder import (
    CHECKPOINTS,
    DONE,
    EVENTS,
    HEARTBEAT,
    METRICS,
    committed_steps,
    finished_step,
    parse_metrics,
)
from landiff.training.observe.events import EventSummary, read_events, summarize_events

TAIL_BYTES = 64 << 10  # read from the end of a metrics.jsonl of any length
RECENT_LINES = 20  # logged steps that the rate is computed from
HEADER = (
    "run",
    "stage",
    "state",
    "step",
    "rate",
    "left",
    "restarts",
    "job",
    "events",
    "last error",
)
SHOWN_ERROR = 200  # characters of an error in the table


@dataclass
class RunStatus:
    """One line of `landiff status`."""

    run: str
    stage: str
    state: str
    """done, running, pending, stopped, failed, cancelled, interrupted, not running, unknown, or
    "running, when last seen"."""
    jobs: str = ""
    """For example "12 RUNNING on node[1-2]"."""
    step: int | None = None
    steps: int | None = None
    checkpoint: int | None = None
    loss: float | None = None
    steps_per_s: float | None = None
    seconds_left: float | None = None
    restarts: int = 0
    last_beat_s: float | None = None
    """Age of the oldest heartbeat of the ranks, while they run."""
    events: EventSummary = field(default_factory=EventSummary)
    """Skipped steps, spikes, rollbacks and alarms."""
    error: str = ""


def find_runs(root: Path) -> list[Path]:
    """Run folders below `root`: of runs that were submitted or trained."""
    found = {path.parent.parent for path in root.glob(f"*/{JOB_FOLDER}/{RECORD}")}
    found |= {path.parent for path in root.glob("*/config.yaml")}
    return sorted(found)


def statuses(runs: Sequence[Path], slurm: Slurm) -> tuple[list[RunStatus], str]:
    """Status of each run, and why SLURM does not answer; empty if it does or is not needed."""
    records = {run: read_record(run) for run in runs}
    ids: list[str] = []
    for record in records.values():
        ids += record.get("job_ids", [])
    queued: list[QueuedJob] = []
    problem = ""
    if ids:
        try:
            queued = slurm.queue(ids)
            known = {job.array_id for job in queued}
            queued += slurm.accounting([job for job in ids if job not in known])
        except SlurmError as error:
            problem = str(error)
    found = [status_of(run, records[run], queued, slurm_away=bool(problem)) for run in runs]
    return found, problem


def status_of(
    run: Path, record: dict[str, Any], queued: Sequence[QueuedJob], *, slurm_away: bool
) -> RunStatus:
    """Status of one run. `queued`: jobs that SLURM knows, of this run and of others."""
    jobs = [job for job in queued if job.array_id in record.get("job_ids", [])]
    status = RunStatus(
        run=str(run),
        stage=record.get("stage", "trainer"),
        state=state_of(run, record, jobs, slurm_away=slurm_away),
        jobs=describe_jobs(jobs),
        steps=record.get("steps"),
        restarts=sum(state.restarts for state in read_attempt_states(run)),
    )
    read_progress(run, status)
    if status.state != "running":
        status.steps_per_s = None
        status.seconds_left = None
        status.last_beat_s = None
    if status.state not in ("done", "running") or status.restarts:
        status.error = last_error(run)
    return status


def describe_jobs(jobs: Sequence[QueuedJob]) -> str:
    """Text such as `12 RUNNING on node[1-2]`. Tasks of an array are counted by state."""
    tasks = [job for job in jobs if job.id != job.array_id]
    if len(tasks) > 1:
        states = [job.state for job in tasks]
        counts = [f"{states.count(state)} {state}" for state in sorted(set(states))]
        return f"{tasks[0].array_id} array: {', '.join(counts)}"
    return "; ".join(describe_job(job) for job in jobs)


def describe_job(job: QueuedJob) -> str:
    """Text such as `12 RUNNING on node1`, or `12 PENDING (Priority)`."""
    text = f"{job.id} {job.state}"
    if job.nodes:
        text += f" on {job.nodes}"
    if job.state == "PENDING" and job.reason != "None":
        text += f" ({job.reason})"
    return text


# -------------------------------------------------------------------- progress


def read_progress(run: Path, status: RunStatus) -> None:
    """Set events, checkpoint, step, loss, rate, time left and heartbeat of `status`."""
    status.events = summarize_events(read_events(run / EVENTS))
    checkpoints = committed_steps(run / CHECKPOINTS)
    if checkpoints:
        status.checkpoint = checkpoints[-1]
    if status.steps is not None:
        status.step = finished_step(run)
    lines = last_metrics(run / METRICS)
    if not lines:
        return
    last = lines[-1]
    first = lines[max(0, len(lines) - RECENT_LINES)]
    status.step = int(last["step"])
    status.loss = last.get("train/loss")
    if last["time"] > first["time"] and last["step"] > first["step"]:
        status.steps_per_s = (last["step"] - first["step"]) / (last["time"] - first["time"])
        if "throughput/seconds_left" in last:  # the batch size changes within the run
            age_s = time.time() - last["time"]
            status.seconds_left = max(0.0, last["throughput/seconds_left"] - age_s)
        elif status.steps:
            status.seconds_left = (status.steps - last["step"]) / status.steps_per_s
    beats = [time.time() - path.stat().st_mtime for path in (run / HEARTBEAT).glob("rank_*")]
    status.last_beat_s = max(beats, default=None)


def last_metrics(path: Path) -> list[dict[str, float]]:
    """The last complete lines of a metrics.jsonl, of one attempt.

    A restart resumes from a checkpoint, so the steps of another attempt do not rise.
    """
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines: list[dict[str, float]] = []
    for line in map(parse_metrics, text.splitlines(keepends=True)):
        if line is None:
            continue
        if lines and line["step"] <= lines[-1]["step"]:
            lines = []
        lines.append(line)
    return lines


# -------------------------------------------------------------------- state


def state_of(
    run: Path, record: dict[str, Any], jobs: Sequence[QueuedJob], *, slurm_away: bool
) -> str:
    """State of a run, as in `RunStatus.state`. `jobs`: those of the run that SLURM knows."""
    folder = run / JOB_FOLDER
    states = {job.state for job in jobs}
    if states & {"RUNNING", "COMPLETING"}:
        return "running"
    known = {job.array_id for job in jobs}  # SLURM's state of these jobs is the better one
    owned = {state for owner, state in owners(run) if owner.job not in known}
    if owned & {"running", "unknown"}:
        return "running"
    if has_finished(run, record):
        return "done"
    if states & {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD"}:
        return "pending"
    if list(folder.glob(f"{GIVEN_UP}*")):
        return "failed"
    if (folder / STOPPED).exists():
        return "stopped"
    if "CANCELLED" in states:
        return "cancelled"
    if states & {"FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}:
        return "failed"
    if owned:  # by processes that do not exist any more
        return "interrupted"
    if slurm_away:
        running = any(state.running for state in read_attempt_states(run))
        return "running, when last seen" if running else "unknown"
    if last_error(run):
        return "failed"
    return "not running"


def has_finished(run: Path, record: dict[str, Any]) -> bool:
    """Whether the run, or all tasks of its array, finished."""
    if record.get("array"):
        return all((run / f"done.{task}").exists() for task in range(record["array"]))
    if not (run / DONE).exists():
        return False
    return record.get("steps") is None or (finished_step(run) or 0) >= record["steps"]


def last_error(run: Path) -> str:
    """Error of the rank that failed first, and why the job is not restarted.

    Of this attempt or an earlier one. Empty if nothing failed.
    """
    recorded = read_last_errors(run)
    cause = recorded[0].text if recorded else ""
    path = first_error(run)
    if path is not None and not cause:
        cause = f"{path.stem}: {read_message(path)}"
    reason = read_given_up(run)
    if cause and reason:
        return f"{cause}; given up: {reason}"
    return cause or reason


# -------------------------------------------------------------------- output


def format_status_table(found: Sequence[RunStatus]) -> str:
    """Human-readable table."""
    rows = [HEADER, *map(table_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def table_row(status: RunStatus) -> tuple[str, ...]:
    """The cells of a run, in the order of the table's header."""
    step = rate = left = error = ""
    if status.steps and status.step is None:
        step = f"-/{status.steps}"
    elif status.steps:
        step = f"{status.step}/{status.steps}"
    if status.steps_per_s:
        rate = f"{status.steps_per_s:.2f}/s"
    if status.seconds_left is not None:
        left = duration(status.seconds_left)
    if status.error:
        error = status.error.splitlines()[0][:SHOWN_ERROR]
    restarts = str(status.restarts or "")
    return (
        status.run,
        status.stage,
        status.state,
        step,
        rate,
        left,
        restarts,
        status.jobs,
        str(status.events),
        error,
    )


def show_status(run: str | None, as_json: bool, slurm: Slurm | None = None) -> int:
    """Print the status of one run, or of all below `runs/`, as a table or as JSON. Returns 0."""
    runs = [Path(run)] if run else find_runs(Path("runs"))
    if run and not runs[0].is_dir():
        raise ConfigError(f"{run} is not a folder; landiff status --all lists the runs below runs/")
    found, problem = statuses(runs, slurm or Slurm(retry_waits_s=(1.0,)))
    if as_json:
        document = {"slurm": problem or "ok", "runs": [asdict(status) for status in found]}
        print(json.dumps(document, indent=1))
        return 0
    if found:
        print(format_status_table(found))
    else:
        print("no runs below runs/")
    if problem:
        print(
            f"(SLURM does not answer, so this is from the run folders alone: {problem})",
            file=sys.stderr,
        )
    return 0
