"""`landiff logs`: the end of the logs of a run. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from landiff.configs import ConfigError
from landiff.launchers.run.job_folder import JOB_FOLDER, LOGS
from landiff.launchers.run.records import read_last_errors, read_record
from landiff.launchers.run.status import last_error
from landiff.training.checkpoint.errors import error_path, first_error

BYTES_PER_LINE = 400  # read from the end of a file for each line that is shown


def show_logs(run: Path, rank: int | None, lines: int, follow: bool) -> int:
    """Print the last `lines` of the log of a rank. Returns 0.

    Without `rank`: of the batch script, after error and log of the rank that failed first. With
    `follow`, print what is appended until the process is ended. Raises ConfigError without a log.
    """
    folder = run / JOB_FOLDER / LOGS
    if not folder.is_dir():
        raise ConfigError(
            f"{run} has no logs ({folder}); landiff status --all lists what was submitted"
        )
    if rank is not None:
        paths = logs_of(folder, rank)
        if not paths:
            names = ", ".join(sorted(path.name for path in folder.glob("*.log")))
            raise ConfigError(f"no log of rank {rank} in {folder}; there are {names}")
    elif read_record(run).get("launcher") == "train":  # without a batch script
        show_failed_rank(run, lines)
        paths = logs_of(folder, 0)
    else:
        show_failed_rank(run, lines)
        paths = sorted(folder.glob("batch*.log"))
    for path in paths:
        show(path, lines)
    if follow and paths:
        for text in growth(paths[-1]):
            print(text, end="", flush=True)
    return 0


def show_failed_rank(run: Path, lines: int) -> None:
    """Print error and log of the rank that failed first, if any failed."""
    rank = failed_rank(run)
    if rank is None:
        return
    print(f"==> first to fail: {last_error(run)} <==")
    for path in (error_path(run, rank), *logs_of(run / JOB_FOLDER / LOGS, rank)):
        if path.exists():
            show(path, lines)


def failed_rank(run: Path) -> int | None:
    """The rank that failed first in the last attempt that failed; of an array, the task.

    None if nothing failed, or if the rank is unknown.
    """
    for error in read_last_errors(run):
        if error.rank is not None:
            return error.rank
    path = first_error(run)
    return int(path.stem.removeprefix("rank_")) if path else None


def logs_of(folder: Path, rank: int) -> list[Path]:
    """The logs of a rank, or of the task of an array with this number."""
    paths = (folder / f"rank_{rank:04d}.log", folder / f"task.{rank}.log")
    return [path for path in paths if path.exists()]


def show(path: Path, lines: int) -> None:
    """Print the last lines of a file, below its name."""
    print(f"==> {path} <==\n{tail(path, lines)}", flush=True)


def tail(path: Path, lines: int) -> str:
    """The last `lines` of a file, or fewer if they are very long."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - BYTES_PER_LINE * lines))
        text = file.read().decode("utf-8", errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def growth(path: Path, every_s: float = 0.5) -> Iterator[str]:
    """What is appended to a file from now on. Does not end."""
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(0, 2)
        while True:
            text = file.read()
            if text:
                yield text
            else:
                time.sleep(every_s)
