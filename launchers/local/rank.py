"""One process of a job: `python -m landiff.launchers.local.rank [--own-log | --shared-log] RUN MODULE ARGUMENTS...`

The first process of a job owns the run folder (configs/ownership.py), unless the process that started the job
does. A rank that torchrun started ends with torchrun, and its helpers end with it.

Runs the module as `python -m` would, and leaves what the batch script has to know in the run folder, where no
layer of srun or torchrun can swallow it: an error file for what failed before the module could write its own,
and `job/config_error` for what the next attempt would meet again: a config error (exit code 2) or a
run that diverged (exit code 1).

What a person can fix (that, and a full disk) is said without a traceback. With `--shared-log` output goes to the
log of the rank and to the terminal, and such an error is not said here: all ranks meet it, and whoever started
them reads the error file and says it once.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from landiff.configs import ownership
from landiff.configs.base import ConfigError
from landiff.configs.files import write_text
from landiff.configs.ownership import OWNER, OwnedError
from landiff.configs.processes import end_with_parent
from landiff.configs.secrets import redact
from landiff.launchers.local.children import PARENT, follow_parent
from landiff.launchers.slurm.script import JOB_FOLDER, LOGS
from landiff.training.checkpoint.errors import (
    CheckpointError,
    NonFiniteError,
    error_path,
    write_error,
)

CONFIG_ERROR = "config_error"
REFUSED = "refused"  # the run folder is another job's: the batch script ends and leaves it alone


def main(arguments: list[str]) -> None:
    """Run the module as the owner of the run folder; its exceptions are recorded and raised again."""
    if os.environ.get(PARENT):
        follow_parent()
        os.register_at_fork(after_in_child=end_with_parent)  # helpers that save or load
    signal.signal(signal.SIGUSR1, end_gently)
    log = arguments[0] if arguments[0] in ("--own-log", "--shared-log") else ""
    folder, module, *rest = arguments[bool(log) :]
    run, task = Path(folder), os.environ.get("SLURM_ARRAY_TASK_ID")
    rank = int(os.environ.get("RANK") or task or 0)
    if log:
        log_to(run / JOB_FOLDER / LOGS / f"rank_{rank:04d}.log", shared=log == "--shared-log")
    try:
        owned = own_run_folder(run, task, first=task is not None or rank == 0)
    except OwnedError as error:
        print(f"{module}: {error}", file=sys.stderr, flush=True)
        mark_refused(run, task, str(error))
        sys.exit(2)
    with owned:
        run_module(run, rank, task, log, module, rest)


def own_run_folder(run: Path, task: str | None, *, first: bool) -> AbstractContextManager[object]:
    """Ownership of the run folder, or of a task of its array, for the `first` process. Raises OwnedError."""
    if not first:
        return nullcontext()
    path = run / (OWNER + (f".{task}" if task else ""))
    owned = ownership.take(path, f"run folder {run}", inherited=os.environ.get(ownership.TOKEN, ""))
    os.environ[ownership.TOKEN] = owned.token  # for the module, which would take it too
    return owned


def end_gently(number: int, frame: object) -> None:
    """Handle SIGUSR1, which `landiff stop` sends, as SIGTERM, until a trainer sets its own handler."""
    os.kill(os.getpid(), signal.SIGTERM)


def run_module(
    run: Path, rank: int, task: str | None, log: str, module: str, rest: list[str]
) -> None:
    """Run the module; record how it failed."""
    error_path(run, rank).unlink(missing_ok=True)
    sys.argv = [module, *rest]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except (ConfigError, CheckpointError, NonFiniteError) as error:
        write_error_once(run, rank, error)
        if log != "--shared-log":
            print(redact(f"{module}: {error}"), file=sys.stderr, flush=True)
        if isinstance(error, CheckpointError):
            sys.exit(1)
        # a run that diverged would diverge again in the same step
        mark_config_error(run, task, str(error))
        sys.exit(1 if isinstance(error, NonFiniteError) else 2)
    except SystemExit as error:
        if error.code == 2:  # `landiff` has told the person already
            mark_config_error(run, task, f"see the log of {module} {' '.join(rest)}")
        raise
    except BaseException as error:
        write_error_once(run, rank, error)
        raise


class Tee:
    """A text stream that writes to a file and to a terminal.

    Neither a full disk nor a terminal that is gone ends the run.
    """

    def __init__(self, file: TextIO, terminal: TextIO) -> None:
        self._file = file
        self._terminal: TextIO | None = terminal
        self._live = terminal.isatty()

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        self._show(lambda terminal: terminal.write(text))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()
        self._show(lambda terminal: terminal.flush())

    def isatty(self) -> bool:
        return self._live

    def __getattr__(self, name: str) -> object:
        """Everything else is the file's: what native code writes goes there too."""
        return getattr(self._file, name)

    def _show(self, action: Callable[[TextIO], object]) -> None:
        if self._terminal is None:
            return
        try:
            action(self._terminal)
        except (OSError, ValueError):
            self._terminal = None


def log_to(path: Path, *, shared: bool) -> None:
    """Standard output and error go to a file of this rank, after what earlier attempts wrote.

    `shared`: what Python writes is shown where it went before as well.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    terminals: list[TextIO] = []
    if shared:
        for number in (1, 2):
            terminals.append(
                os.fdopen(os.dup(number), "w", buffering=1, encoding="utf-8", errors="replace")
            )
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    if shared:
        sys.stdout, sys.stderr = Tee(sys.stdout, terminals[0]), Tee(sys.stderr, terminals[1])


def write_error_once(run: Path, rank: int, error: BaseException) -> None:
    """An error file, unless the trainer wrote one, which knows the step."""
    if not error_path(run, rank).exists():
        write_error(run, rank, 0, error)


def mark_config_error(run: Path, task: str | None, text: str) -> None:
    """For the batch script, where there is one."""
    if (run / JOB_FOLDER).is_dir():
        name = CONFIG_ERROR + (f".{task}" if task else "")
        write_text(run / JOB_FOLDER / name, redact(text) + "\n")


def mark_refused(run: Path, task: str | None, text: str) -> None:
    """For the batch script of this job alone: the run folder is another's."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID") or "here"
    if (run / JOB_FOLDER).is_dir():
        write_text(
            run / JOB_FOLDER / (f"{REFUSED}.{job}" + (f".{task}" if task else "")), text + "\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
