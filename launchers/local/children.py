"""Processes that `landiff` starts: what they import, and that they end with their parent.

`python -m landiff.launchers.local.children COMMAND...` starts a program that is not Python, such as bash, so
that it ends with its parent.
"""

from __future__ import annotations

import os
import signal
import sys

PARENT = "LANDIFF_PARENT"  # id of the process that starts the next one


def environment() -> dict[str, str]:
    """Environment of a Python process that this one starts itself (not through another program).

    It imports this very project, whatever packages the working folder holds, and ends with this
    process.
    """
    # loads pydantic, which `landiff --version` does without
    from landiff.configs.paths import IMPORT_ROOT

    env = dict(os.environ)
    env.setdefault("PYTHONUNBUFFERED", "1")
    roots = [str(IMPORT_ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(roots)
    env["PYTHONSAFEPATH"] = "1"
    env[PARENT] = str(os.getpid())
    return env


def stop_signals() -> list[signal.Signals]:
    """Signals that ask a command to stop; SIGHUP is not one of them under nohup."""
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def follow_parent() -> None:
    """End with the process that asked for it in the environment, also where that is gone already.

    The variable is for one process only and is removed.
    """
    parent = os.environ.pop(PARENT, "")
    if parent.isdigit():
        # brings pydantic along, which `landiff --help` does without
        from landiff.configs.processes import end_with_parent

        end_with_parent(int(parent))


def main(command: list[str]) -> None:
    """Become `command`."""
    follow_parent()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
