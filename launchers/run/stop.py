"""`landiff stop`: asks a run to save a checkpoint and to end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from landiff.configs import ConfigError
from landiff.configs.files import write_text
from landiff.configs.ownership import Owner
from landiff.configs.processes import machine
from landiff.launchers.run.job_folder import JOB_FOLDER, RECORD, STOPPED
from landiff.launchers.run.records import read_record, running_owner
from landiff.launchers.slurm.client import Slurm
from landiff.training.checkpoint.run_folder import CONFIG, STOP

NOTHING = "nothing of it is running or in the queue"


def stop(run: Path, restart: bool, slurm: Slurm | None = None) -> str:
    """Ask a run to save a checkpoint and to end, or with `restart` to start again.

    Returns what was done. Raises ConfigError if the run cannot be asked.
    """
    record = read_record(run)
    if not record and not (run / CONFIG).is_file():
        raise ConfigError(
            f"{run} is not a run folder: it has neither {JOB_FOLDER}/{RECORD} nor config.yaml; "
            "landiff status --all lists the run folders"
        )
    by_hand = record.get("launcher", "train") == "train"
    if restart and by_hand:
        raise ConfigError(
            f"{run} was not submitted, so nothing would start it again; leave --restart out"
        )
    jobs = record.get("job_ids", [])
    owner = running_owner(run)
    # A run that was not submitted may have been started inside of the allocation of another job.
    if owner is not None and (by_hand or not jobs):
        return stop_process(run, owner, restart=restart, trainer=record.get("trainer", True))
    if not jobs:
        return f"{run}: {NOTHING}"
    return stop_jobs(run, jobs, restart=restart, slurm=slurm or Slurm())


def stop_jobs(run: Path, jobs: list[str], *, restart: bool, slurm: Slurm) -> str:
    """Signal the jobs that run. Cancel those in the queue, unless the run is to start again."""
    if not restart:
        # With their ids, since a job that is submitted later is not meant.
        write_text(run / JOB_FOLDER / STOPPED, "\n".join(jobs) + "\n")
    done = []
    for job in slurm.queue(jobs):
        if job.state == "RUNNING":
            slurm.signal(job.id)
            done.append(f"job {job.id} saves and {'starts again' if restart else 'ends'}")
        elif job.active and not restart:
            slurm.cancel(job.id)
            done.append(f"job {job.id} ({job.state.lower()}) is cancelled")
    return f"{run}: {'; '.join(done) or NOTHING}"


def stop_process(run: Path, owner: Owner, *, restart: bool, trainer: bool) -> str:
    """Signal the process of a run that is not a SLURM job.

    On another machine only a trainer can be asked, through the file `stop` that its ranks read.
    """
    here = owner.machine == machine()
    if not here and (restart or not trainer):
        raise ConfigError(f"{run} runs on {owner.host}; run landiff stop there")
    if not restart:
        write_text(run / JOB_FOLDER / STOPPED, "here\n")
    if here:
        os.kill(owner.pid, signal.SIGUSR1)
    else:
        write_text(run / STOP, "")
    return f"{run}: asked {owner} to save and {'start again' if restart else 'end'}"
