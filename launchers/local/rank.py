"""One process of a job.

    python -m landiff.launchers.local.rank [--own-log | --shared-log] RUN MODULE ARGUMENTS...

The first process of a job owns the run folder (configs/ownership.py), unless the process that
started the job does. A rank that torchrun started ends with torchrun, and its helper processes end
with it.

The module runs as with `python -m`. What the batch script has to know is written to the run
folder, since srun and torchrun may lose exit codes: an error file for failures before the module
could write its own, and `job/config_error` for errors that a restart would meet again. These are
config errors (exit code 2) and runs that diverged (exit code 1).

Errors that a user can fix, and a full disk, are reported without a traceback. With `--shared-log`,
output goes to the log of the rank and to the terminal, and such an error is not printed here: it is
the same on all ranks, and the process that started them prints it once.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from landiff.configs import ownership
from landiff.configs.base import ConfigError
from landiff.configs.files import write_text
from landiff.configs.ownership import OWNER, OwnedError
from landiff.configs.processes import end_with_parent
from landiff.configs.secrets import redact
from landiff.launchers.local.children import PARENT, follow_parent
from landiff.launchers.run.job_folder import CONFIG_ERROR, JOB_FOLDER, LOGS, REFUSED
from landiff.training.checkpoint.errors import (
    CheckpointError,
    NonFiniteError,
    error_path,
    write_error,
)

OWN_LOG = "--own-log"
SHARED_LOG = "--shared-log"


@dataclass(frozen=True)
class Rank:
    """Where this process runs."""

    run: Path
    rank: int
    task: str | None
    """Number of the task of a SLURM array; None for other jobs."""

    @property
    def suffix(self) -> str:
        """Suffix of the files of this task in the run folder."""
        return f".{self.task}" if self.task else ""


def main(arguments: list[str]) -> None:
    """Run a module as the owner of the run folder. Its exceptions are recorded and raised again."""
    if os.environ.get(PARENT):
        follow_parent()
        os.register_at_fork(after_in_child=end_with_parent)  # helpers that save or load
    signal.signal(signal.SIGUSR1, handle_stop)
    log = arguments.pop(0) if arguments[0] in (OWN_LOG, SHARED_LOG) else ""
    folder, module, *rest = arguments
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    rank = Rank(Path(folder), int(os.environ.get("RANK") or task or 0), task)
    if log:
        path = rank.run / JOB_FOLDER / LOGS / f"rank_{rank.rank:04d}.log"
        log_to(path, shared=log == SHARED_LOG)
    try:
        owned = take_ownership(rank)
    except OwnedError as error:
        print(f"{module}: {error}", file=sys.stderr, flush=True)
        record_refusal(rank, str(error))
        sys.exit(2)
    with owned:
        run_module(rank, module, rest, print_errors=log != SHARED_LOG)


def take_ownership(rank: Rank) -> AbstractContextManager[object]:
    """Ownership of the run folder for rank 0, or of a task of its array. Raises OwnedError."""
    if rank.task is None and rank.rank != 0:
        return nullcontext()
    path = rank.run / f"{OWNER}{rank.suffix}"
    inherited = os.environ.get(ownership.TOKEN, "")
    owned = ownership.take(path, f"run folder {rank.run}", inherited=inherited)
    os.environ[ownership.TOKEN] = owned.token  # for the module, which takes ownership too
    return owned


def handle_stop(number: int, frame: FrameType | None) -> None:
    """Handle SIGUSR1 of `landiff stop` as SIGTERM, until a trainer sets its own handler."""
    os.kill(os.getpid(), signal.SIGTERM)


def run_module(rank: Rank, module: str, arguments: list[str], *, print_errors: bool) -> None:
    """Run a module and record how it fails."""
    error_path(rank.run, rank.rank).unlink(missing_ok=True)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except (ConfigError, CheckpointError, NonFiniteError) as error:
        write_error_once(rank, error)
        if print_errors:
            print(redact(f"{module}: {error}"), file=sys.stderr, flush=True)
        if isinstance(error, CheckpointError):
            sys.exit(1)
        # A run that diverged would diverge again in the same step.
        record_config_error(rank, str(error))
        sys.exit(1 if isinstance(error, NonFiniteError) else 2)
    except SystemExit as error:
        if error.code == 2:  # `landiff` has printed the error
            record_config_error(rank, f"see the log of {module} {' '.join(arguments)}")
        raise
    except BaseException as error:
        write_error_once(rank, error)
        raise


class Tee:
    """Text stream that writes to a file and to a terminal.

    Neither a full disk nor a terminal that is closed ends the run.
    """

    def __init__(self, file: TextIO, terminal: TextIO) -> None:
        self._file = file
        self._terminal: TextIO | None = terminal
        self._live = terminal.isatty()

    def write(self, text: str) -> int:
        """Write to both. Returns the number of characters."""
        with suppress(OSError):
            self._file.write(text)
        self._show(lambda terminal: terminal.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush both."""
        with suppress(OSError):
            self._file.flush()
        self._show(lambda terminal: terminal.flush())

    def isatty(self) -> bool:
        """Whether the terminal is interactive."""
        return self._live

    def __getattr__(self, name: str) -> object:
        """Other attributes of the file: native code writes to it as well."""
        return getattr(self._file, name)

    def _show(self, action: Callable[[TextIO], object]) -> None:
        if self._terminal is None:
            return
        try:
            action(self._terminal)
        except (OSError, ValueError):
            self._terminal = None


def log_to(path: Path, *, shared: bool) -> None:
    """Append standard output and standard error of this process to a file.

    `shared`: what Python writes is also shown in the terminal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    terminals: list[TextIO] = []
    if shared:
        for number in (1, 2):
            copy = os.dup(number)
            terminals.append(os.fdopen(copy, "w", buffering=1, encoding="utf-8", errors="replace"))
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    if shared:
        sys.stdout = Tee(sys.stdout, terminals[0])
        sys.stderr = Tee(sys.stderr, terminals[1])


def write_error_once(rank: Rank, error: BaseException) -> None:
    """Write an error file, unless the trainer wrote one, which knows the step."""
    if not error_path(rank.run, rank.rank).exists():
        write_error(rank.run, rank.rank, 0, error)


def record_config_error(rank: Rank, text: str) -> None:
    """Tell the batch script, if there is one, that a restart would meet the same error."""
    if (rank.run / JOB_FOLDER).is_dir():
        path = rank.run / JOB_FOLDER / f"{CONFIG_ERROR}{rank.suffix}"
        write_text(path, redact(text) + "\n")


def record_refusal(rank: Rank, text: str) -> None:
    """Tell the batch script of this job that another process owns the run folder."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID") or "here"
    if (rank.run / JOB_FOLDER).is_dir():
        write_text(rank.run / JOB_FOLDER / f"{REFUSED}.{job}{rank.suffix}", text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
