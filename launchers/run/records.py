"""`job/job.json` of a run folder: what `landiff train` or `landiff submit` started. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from landiff.configs import ownership
from landiff.configs.base import ConfigError
from landiff.configs.documents import read_json
from landiff.configs.files import write_text
from landiff.configs.ownership import OWNER, Owner, State
from landiff.configs.secrets import redact
from landiff.launchers.slurm.script import JOB_FOLDER

RECORD = "job.json"
STOPPED = "stopped"  # the ids of jobs that a person stopped, or "here"
LAST_ERROR = "last_error"
# What earlier attempts left in the run folder, besides results
OLD_MARKERS = (
    "stop",
    "job/stopped",
    "job/state*",
    "job/given_up*",
    "job/last_error*",
    "job/config_error*",
    "job/current",
    "job/chain",
)


def read_record(run: Path) -> dict[str, Any]:
    """job.json of a run folder with the job that runs there now; empty where nothing was started."""
    path, current = run / JOB_FOLDER / RECORD, run / JOB_FOLDER / "current"
    if not path.exists():
        return {}
    advice = f"delete {path.parent} and submit the run again"
    record = read_json(path, advice=advice)
    job_ids = record.get("job_ids")
    if not isinstance(job_ids, list) or not all(isinstance(job, str) for job in job_ids):
        raise ConfigError(f"{path} has no list of job_ids; {advice}")
    if current.exists():
        job = current.read_text(
            encoding="utf-8"
        ).strip()  # by hand, perhaps: sbatch RUN/job/job.sbatch
        if job.isdigit() and job not in record["job_ids"]:
            record["job_ids"].append(job)
    return record


def write_record(run: Path, **values: Any) -> None:
    """Change keys of job.json; the others stay as they are."""
    record = {
        "job_ids": [],
        **read_record(run),
        **values,
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(run / JOB_FOLDER / RECORD, redact(json.dumps(record, indent=1)))


def remove_markers(run: Path, patterns: Iterable[str] = OLD_MARKERS) -> None:
    """Forget how earlier attempts ended."""
    for pattern in patterns:
        for path in run.glob(pattern):
            path.unlink(missing_ok=True)


def owners(run: Path) -> list[tuple[Owner, State]]:
    """Who holds the run folder, or of an array its tasks: (owner, what is known of it)."""
    locks = [path for path in sorted(run.glob(f"{OWNER}*")) if ".after-" not in path.name]
    found = [ownership.holder(path) for path in locks]
    return [owner for owner in found if owner is not None]


def running_owner(run: Path) -> Owner | None:
    """A process that works in the run folder, as far as can be told."""
    return next((owner for owner, state in owners(run) if state in ("running", "unknown")), None)
