"""One process of a job: `python -m launchers.rank [--own-log | --shared-log] RUN MODULE ARGUMENTS...`

Runs the module as `python -m` would, and leaves what the batch script has to know in the run folder, where no
layer of srun or torchrun can swallow it: an error file for what failed before the module could write its own,
and `job/config_error` for what the next attempt would meet again: a config error (exit code 2) or a
run that diverged (exit code 1).

What a person can mend (that, and a full disk) is said without a traceback. With `--shared-log` it is not said
here: all ranks meet it, and whoever started them reads the error file and says it once.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from configs.base import ConfigError
from configs.files import write_text
from configs.secrets import redact
from launchers.slurm_script import JOB_FOLDER, LOGS
from training.errors import CheckpointError, NonFiniteError, error_path, write_error

CONFIG_ERROR = "config_error"


def main(arguments: list[str]) -> None:
    """Run the module; exceptions go on after they were written down."""
    log = arguments[0] if arguments[0] in ("--own-log", "--shared-log") else ""
    folder, module, *rest = arguments[bool(log):]
    run, task = Path(folder), os.environ.get("SLURM_ARRAY_TASK_ID")
    rank = int(os.environ.get("RANK") or task or 0)
    if log == "--own-log":
        log_to(run / JOB_FOLDER / LOGS / f"rank_{rank:04d}.log")
    started = error_path(run, rank)
    started.unlink(missing_ok=True)
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


def log_to(path: Path) -> None:
    """Standard output and error go to a file of this rank, after what earlier attempts wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def write_error_once(run: Path, rank: int, error: BaseException) -> None:
    """An error file, unless the trainer wrote one, which knows the step."""
    if not error_path(run, rank).exists():
        write_error(run, rank, 0, error)


def mark_config_error(run: Path, task: str | None, text: str) -> None:
    """For the batch script, where there is one."""
    if (run / JOB_FOLDER).is_dir():
        name = CONFIG_ERROR + (f".{task}" if task else "")
        write_text(run / JOB_FOLDER / name, redact(text) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
