"""Processes of this machine: whether they still run, and how to end with the parent. Torch-free."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
STATE, START_TIME = 0, 19  # fields of /proc/PID/stat behind the name in parentheses, see proc(5)
ENDED = ("Z", "X")  # a zombie runs no more; its parent has not asked for its exit code yet


def machine() -> str:
    """Name of this machine, its boot and its process namespace.

    Process ids may be compared only where all three agree: several machines can have one name, and
    containers on one machine have process ids of their own.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{os.uname().nodename}/{boot}/{os.readlink('/proc/self/ns/pid')}"


def start_time(pid: int) -> str:
    """Start of process `pid` in clock ticks since boot; "" when there is none or it is hidden."""
    fields = _stat(pid)
    if not fields or fields[STATE] in ENDED:
        return ""
    return fields[START_TIME]


def is_running(pid: int, started: str = "") -> bool:
    """Whether process `pid` runs on this machine.

    With `started`, its start time, a later process with the same id does not count.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, whose /proc entry may be hidden
        return not started or start_time(pid) in ("", started)
    found = start_time(pid)
    return bool(found) and (not started or found == started)


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process as soon as the thread that started it is gone.

    `parent` is the process that this one was started by; when it is gone already, this process ends
    now. The setting stays over exec, but children do not inherit it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:  # it ended before the kernel was told
        sys.stderr.write(f"process {os.getpid()} ends: its parent {parent} is gone\n")
        os._exit(128 + signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    try:
        text = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
    return text.rpartition(")")[2].split()
