"""Records in the job folder of a run: what started the run, its attempts, why it failed.

Written by `landiff train`, `landiff submit` and the batch script; read by `landiff status`, `logs`
and `stop`. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from landiff.configs import ownership
from landiff.configs.base import ConfigError
from landiff.configs.documents import read_json
from landiff.configs.files import write_text
from landiff.configs.ownership import OWNER, Owner, State
from landiff.configs.secrets import redact
from landiff.launchers.run.job_folder import (
    CURRENT,
    GIVEN_UP,
    JOB_FOLDER,
    LAST_ERROR,
    RECORD,
    STATE,
)
from landiff.training.checkpoint.run_folder import STOP

# Files of earlier attempts in the run folder that are not results
OLD_MARKERS = (
    STOP,
    "job/stopped",
    "job/state*",
    "job/given_up*",
    "job/last_error*",
    "job/config_error*",
    "job/current",
    "job/chain",
)


def read_record(run: Path) -> dict[str, Any]:
    """`job.json` of a run folder, with the id of the job that runs there now.

    Empty if nothing was started. Raises ConfigError for a damaged file.
    """
    path = run / JOB_FOLDER / RECORD
    if not path.exists():
        return {}
    advice = f"delete {path.parent} and submit the run again"
    record = read_json(path, advice=advice)
    job_ids = record.get("job_ids")
    if not isinstance(job_ids, list) or not all(isinstance(job, str) for job in job_ids):
        raise ConfigError(f"{path} has no list of job_ids; {advice}")
    current = run / JOB_FOLDER / CURRENT
    if current.exists():
        job = current.read_text(encoding="utf-8").strip()
        if job.isdigit() and job not in job_ids:  # a user called sbatch RUN/job/job.sbatch
            job_ids.append(job)
    return record


def write_record(run: Path, **values: Any) -> None:
    """Set keys of `job.json`; the others stay as they are."""
    record = {
        "job_ids": [],
        **read_record(run),
        **values,
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(run / JOB_FOLDER / RECORD, redact(json.dumps(record, indent=1)))


def remove_markers(run: Path, patterns: Iterable[str] = OLD_MARKERS) -> None:
    """Delete the files in which earlier attempts recorded how they ended."""
    for pattern in patterns:
        for path in run.glob(pattern):
            path.unlink(missing_ok=True)


def owners(run: Path) -> list[tuple[Owner, State]]:
    """The owners of a run folder, or of the tasks of its array, each with its state."""
    found = []
    for path in sorted(run.glob(f"{OWNER}*")):
        if ".after-" in path.name:  # of a process that takes over a lock
            continue
        holder = ownership.holder(path)
        if holder is not None:
            found.append(holder)
    return found


def running_owner(run: Path) -> Owner | None:
    """The owner of a run folder if it runs, or if that is unknown."""
    for owner, state in owners(run):
        if state in ("running", "unknown"):
            return owner
    return None


# -------------------------------------------------------------------- written by the batch script


@dataclass(frozen=True)
class AttemptState:
    """What the batch script of a job, or of one task of an array, keeps between attempts."""

    restarts: int
    running: bool
    """An attempt runs, or its node died."""


def read_attempt_states(run: Path) -> list[AttemptState]:
    """The state of the job, or of each task of its array. Empty before the first attempt."""
    found = []
    for path in sorted((run / JOB_FOLDER).glob(f"{STATE}*")):
        values = {}
        for word in path.read_text(encoding="utf-8").split():
            key, _, value = word.partition("=")
            values[key] = value
        # Scripts of earlier versions count crashes only.
        restarts = values.get("restarts", values.get("crashes", "0"))
        running = values.get("phase") == "running"
        found.append(AttemptState(int(restarts) if restarts.isdigit() else 0, running))
    return found


@dataclass(frozen=True)
class RecordedError:
    """Why a job failed. `rank`: the rank that failed first, of an array the task, if known."""

    rank: int | None
    text: str


def read_last_errors(run: Path) -> list[RecordedError]:
    """Why the job failed, or each task of its array."""
    found = []
    for text in _texts(run, LAST_ERROR):
        match = re.match(r"rank_(\d+): ", text)
        found.append(RecordedError(int(match[1]) if match else None, text))
    return found


def read_given_up(run: Path) -> str:
    """Why the job, or a task of its array, is not restarted. Empty if it may be."""
    return next(iter(_texts(run, GIVEN_UP)), "")


def _texts(run: Path, name: str) -> list[str]:
    """Contents of the files of this name, of all tasks. A full disk leaves empty files: skipped."""
    paths = sorted((run / JOB_FOLDER).glob(f"{name}*"))
    texts = [path.read_text(encoding="utf-8").strip() for path in paths]
    return [text for text in texts if text]
