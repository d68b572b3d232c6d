"""Processes that `landiff` starts: their environment, and how they end with their parent.

`python -m landiff.launchers.local.children COMMAND...` starts a program that is not Python, such as
bash, so that it ends with its parent.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys

PARENT = "LANDIFF_PARENT"  # environment variable: process id of the parent


def environment() -> dict[str, str]:
    """Environment of a Python process that this one starts directly, not through another program.

    The process imports this copy of the project, whatever packages the working directory holds, and
    ends with this process.
    """
    # Imports of landiff.configs are local: they load pydantic, and `landiff --help` must be fast.
    from landiff.configs.paths import IMPORT_ROOT

    env = dict(os.environ)
    env.setdefault("PYTHONUNBUFFERED", "1")
    roots = [str(IMPORT_ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(roots)
    env["PYTHONSAFEPATH"] = "1"
    env[PARENT] = str(os.getpid())
    return env


def stop_signals() -> list[signal.Signals]:
    """Signals that ask a command to stop. Under nohup, SIGHUP is not one of them."""
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def share_cores(env: dict[str, str], processes: int) -> None:
    """Set the threads of one of `processes` that run side by side, unless the user chose.

    With more threads than cores, threads wait for others that do not run.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    env.setdefault("OMP_NUM_THREADS", str(threads))


def follow_parent() -> None:
    """End this process with the parent named in the environment, at once if that has ended.

    The variable is meant for one process only and is removed.
    """
    parent = os.environ.pop(PARENT, "")
    if parent.isdigit():
        from landiff.configs.processes import end_with_parent

        end_with_parent(int(parent))


def end_without_collection() -> None:
    """Let this process end without the interpreter's last garbage collections.

    They go through all objects of the imported packages: with torch and the models, more than a
    second of CPU. The system frees the memory of a process that ends.
    """
    # Handlers run in reverse order, so this one follows those of the packages imported later.
    atexit.register(gc.freeze)


def main(command: list[str]) -> None:
    """Replace this process with `command`."""
    follow_parent()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
