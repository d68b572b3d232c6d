"""`landiff status` and `landiff logs`: what the run folders say, and SLURM where it answers. Torch-free."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from landiff.configs import ConfigError
from landiff.launchers.progress import duration
from landiff.launchers.run.records import owners, read_record
from landiff.launchers.slurm.client import QueuedJob, Slurm, SlurmError
from landiff.launchers.slurm.script import JOB_FOLDER, LOGS
from landiff.training.checkpoint.errors import error_path, first_error, read_message
from landiff.training.checkpoint.run_folder import committed_steps, finished_step, parse_metrics

TAIL_BYTES = 64 << 10  # the last lines of a metrics.jsonl of any length
RECENT = 20  # logged steps that the rate is taken over


@dataclass
class RunStatus:
    """One line of `landiff status`."""

    run: str
    stage: str
    state: (
        str  # done, running, pending, stopped, failed, cancelled, interrupted, not running, unknown
    )
    jobs: str = ""  # "12 RUNNING on node[1-2]"
    step: int | None = None
    steps: int | None = None
    checkpoint: int | None = None
    loss: float | None = None
    steps_per_s: float | None = None
    seconds_left: float | None = None
    restarts: int = 0
    last_beat_s: float | None = None  # age of the oldest heartbeat of the ranks, while it runs
    error: str = ""


def find_runs(root: Path) -> list[Path]:
    """Run folders below `root`: what was submitted or trained there."""
    found = {path.parent.parent for path in root.glob(f"*/{JOB_FOLDER}/job.json")} | {
        path.parent for path in root.glob("*/config.yaml")
    }
    return sorted(found)


def statuses(runs: Sequence[Path], slurm: Slurm) -> tuple[list[RunStatus], str]:
    """(one status per run, why SLURM could not be asked; empty where it could or need not be)."""
    records = {run: read_record(run) for run in runs}
    ids = [job for record in records.values() for job in record.get("job_ids", [])]
    queued: list[QueuedJob] = []
    away = ""
    if ids:
        try:
            queued = slurm.queue(ids)
            missing = [job for job in ids if job not in {q.id.split("_")[0] for q in queued}]
            queued += slurm.accounting(missing)
        except SlurmError as error:
            away = str(error)
    return [status_of(run, records[run], queued, bool(away)) for run in runs], away


def status_of(run: Path, record: dict, queued: Sequence[QueuedJob], away: bool) -> RunStatus:
    """What is known of one run."""
    mine = [job for job in queued if job.id.split("_")[0] in record.get("job_ids", [])]
    status = RunStatus(
        str(run),
        record.get("stage", "trainer"),
        "unknown",
        describe_jobs(mine),
        steps=record.get("steps"),
    )
    read_progress(run, status)
    if (
        record.get("launcher") != "train"
    ):  # which does not restart; logs of an earlier job may be there
        status.restarts = count_restarts(run)
    status.state = state_of(run, record, mine, away)
    if status.state != "running":
        status.steps_per_s = status.seconds_left = status.last_beat_s = None
    status.error = (
        "" if status.state in ("done", "running") and not status.restarts else last_error(run)
    )
    return status


def describe_jobs(jobs: Sequence[QueuedJob]) -> str:
    """`12 RUNNING on node[1-2]`; the tasks of an array counted by state."""
    tasks = [job for job in jobs if "_" in job.id]
    if len(tasks) > 1:
        states = sorted({job.state for job in tasks})
        return f"{tasks[0].id.split('_')[0]} array: " + ", ".join(
            f"{sum(t.state == state for t in tasks)} {state}" for state in states
        )
    return "; ".join(
        f"{job.id} {job.state}"
        + (f" on {job.nodes}" if job.nodes else "")
        + (f" ({job.reason})" if job.state == "PENDING" and job.reason != "None" else "")
        for job in jobs
    )


def read_progress(run: Path, status: RunStatus) -> None:
    """Step, loss, rate and time left, from the last lines of metrics.jsonl."""
    status.checkpoint = (committed_steps(run / "checkpoints") or [None])[-1]
    lines = last_metrics(run / "metrics.jsonl")
    status.step = finished_step(run) if status.steps is not None else None
    if not lines:
        return
    last, first = lines[-1], lines[max(0, len(lines) - RECENT)]
    status.step, status.loss = int(last["step"]), last.get("train/loss")
    if last["time"] > first["time"] and last["step"] > first["step"]:
        status.steps_per_s = (last["step"] - first["step"]) / (last["time"] - first["time"])
        if status.steps:
            status.seconds_left = (status.steps - last["step"]) / status.steps_per_s
    beats = [time.time() - path.stat().st_mtime for path in (run / "heartbeat").glob("rank_*")]
    status.last_beat_s = max(beats, default=None)


def last_metrics(path: Path) -> list[dict]:
    """The last whole lines, of one attempt: a restart goes back to its checkpoint."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines: list[dict] = []
    for line in map(parse_metrics, text.splitlines(keepends=True)):
        if line is None:
            continue
        if lines and line["step"] <= lines[-1]["step"]:
            lines = []
        lines.append(line)
    return lines


def count_restarts(run: Path) -> int:
    """Of the last submission; of all tasks of an array together."""
    restarts = 0
    for path in (run / JOB_FOLDER / LOGS).glob("batch*.log"):
        found = re.findall(
            r"^\S+ job \S+ restart (\d+) on",
            path.read_text(encoding="utf-8", errors="replace"),
            flags=re.MULTILINE,
        )
        restarts += int(found[-1]) if found else 0
    return restarts


def state_of(run: Path, record: dict, jobs: Sequence[QueuedJob], away: bool) -> str:
    """In one word."""
    folder = run / JOB_FOLDER
    states = {job.state for job in jobs}
    if "RUNNING" in states or "COMPLETING" in states:
        return "running"
    known = {job.id.split("_")[0] for job in jobs}  # of these SLURM has said all there is to say
    held = {state for owner, state in owners(run) if owner.job not in known}
    if held & {"running", "unknown"}:
        return "running"
    if is_marked_done(run, record):
        return "done"
    if states & {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD"}:
        return "pending"
    if list(folder.glob("given_up*")):
        return "failed"
    if (folder / "stopped").exists():
        return "stopped"
    if "CANCELLED" in states:
        return "cancelled"
    if states & {"FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}:
        return "failed"
    if held:  # by processes that are gone
        return "interrupted"
    if away and any("phase=running" in path.read_text() for path in folder.glob("state*")):
        return "running, when last seen"
    if away:
        return "unknown"
    return "failed" if last_error(run) else "not running"


def is_marked_done(run: Path, record: dict) -> bool:
    if record.get("array"):
        return all((run / f"done.{task}").exists() for task in range(record["array"]))
    if not (run / "done").exists():
        return False
    return record.get("steps") is None or (finished_step(run) or 0) >= record["steps"]


def last_error(run: Path) -> str:
    """What the first rank to fail had to say, in this attempt or an earlier one; and why the job gave up."""
    cause, why = (
        next(filter(None, map(text_of, sorted((run / JOB_FOLDER).glob(f"{name}*")))), "")
        for name in ("last_error", "given_up")
    )
    path = first_error(run)
    if path is not None and not cause:
        cause = f"{path.stem}: {read_message(path)}"
    return f"{cause}; given up: {why}" if cause and why else cause or why


def text_of(path: Path) -> str:
    """A full disk leaves an empty file."""
    return path.read_text(encoding="utf-8").strip()


def format_status_table(found: Sequence[RunStatus]) -> str:
    """For a person."""
    rows = [("run", "stage", "state", "step", "rate", "left", "restarts", "job", "last error")]
    for s in found:
        step = f"{s.step if s.step is not None else '-'}/{s.steps}" if s.steps else ""
        rows.append(
            (
                s.run,
                s.stage,
                s.state,
                step,
                f"{s.steps_per_s:.2f}/s" if s.steps_per_s else "",
                duration(s.seconds_left) if s.seconds_left is not None else "",
                str(s.restarts or ""),
                s.jobs,
                s.error.splitlines()[0][:200] if s.error else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def show_status(run: str | None, as_json: bool, slurm: Slurm | None = None) -> int:
    """Print the table, or JSON."""
    runs = [Path(run)] if run else find_runs(Path("runs"))
    if run and not runs[0].is_dir():
        raise ConfigError(f"{run} is no folder; landiff status --all lists the runs below runs/")
    found, away = statuses(runs, slurm or Slurm(retry_waits_s=(1.0,)))
    if as_json:
        print(json.dumps({"slurm": away or "ok", "runs": [asdict(s) for s in found]}, indent=1))
        return 0
    print(format_status_table(found) if found else "no runs below runs/")
    if away:
        print(
            f"(SLURM does not answer, so this is from the run folders alone: {away})",
            file=sys.stderr,
        )
    return 0


# -------------------------------------------------------------------- logs


def show_logs(run: Path, rank: int | None, lines: int, follow: bool) -> int:
    """Print the end of a log: a rank's, or the batch script's after the last words of the rank that failed first."""
    folder = run / JOB_FOLDER / LOGS
    if not folder.is_dir():
        raise ConfigError(
            f"{run} has no logs ({folder}); landiff status --all lists what was submitted"
        )
    if rank is not None:
        paths = logs_of(folder, rank)
        if not paths:
            raise ConfigError(
                f"no log of rank {rank} in {folder}; there are {', '.join(sorted(p.name for p in folder.glob('*.log')))}"
            )
    else:
        by_hand = read_record(run).get("launcher") == "train"  # without a batch script
        paths = logs_of(folder, 0) if by_hand else sorted(folder.glob("batch*.log"))
        failed = failing_rank(run)
        if failed is not None:
            print(f"==> first to fail: {last_error(run)} <==")
            for log in [
                path
                for path in (error_path(run, failed), *logs_of(folder, failed))
                if path.exists()
            ]:
                print(f"==> {log} <==\n{tail(log, lines)}")
    for path in paths:
        print(f"==> {path} <==\n{tail(path, lines)}", flush=True)
    if follow and paths:
        for text in growth(paths[-1]):
            print(text, end="", flush=True)
    return 0


def failing_rank(run: Path) -> int | None:
    """Of the last attempt that failed; of an array, the task. None where nothing failed, or nobody said so."""
    for path in sorted((run / JOB_FOLDER).glob("last_error*")):
        found = re.match(r"rank_(\d+): ", path.read_text(encoding="utf-8"))
        if found:
            return int(found[1])
    first = first_error(run)
    return int(first.stem.removeprefix("rank_")) if first else None


def logs_of(folder: Path, rank: int) -> list[Path]:
    """Of a rank, or of the task of an array with this number."""
    return [
        path
        for path in (folder / f"rank_{rank:04d}.log", folder / f"task.{rank}.log")
        if path.exists()
    ]


def tail(path: Path, lines: int) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * lines))
        return "\n".join(file.read().decode("utf-8", errors="replace").splitlines()[-lines:])


def growth(path: Path, every_s: float = 0.5) -> Iterator[str]:
    """What is appended from now on, for ever."""
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(0, 2)
        while True:
            text = file.read()
            if text:
                yield text
            else:
                time.sleep(every_s)
