"""Processes on this machine: whether they run, and how to end with the parent. Torch-free."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
STATE = 0  # fields of /proc/PID/stat after the name in parentheses, see proc(5)
START_TIME = 19
ENDED = ("Z", "X")  # a zombie has ended, and its parent has not read its exit code yet


def machine() -> str:
    """Identity of this machine: host name, boot id and process namespace.

    Process ids are comparable only if all three agree: several machines can have the same name, and
    each container has its own process ids.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{os.uname().nodename}/{boot}/{os.readlink('/proc/self/ns/pid')}"


def start_time(pid: int) -> str:
    """Start time of process `pid` in clock ticks since boot; "" if it does not run or is hidden."""
    fields = _stat(pid)
    if not fields or fields[STATE] in ENDED:
        return ""
    return fields[START_TIME]


def is_running(pid: int, started: str = "") -> bool:
    """Whether process `pid` runs on this machine.

    With its start time in `started`, a later process with the same id does not count.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user, whose /proc entry may be hidden
        return not started or start_time(pid) in ("", started)
    found = start_time(pid)
    return bool(found) and (not started or found == started)


def end_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process as soon as the thread that started it ends.

    `parent` is the id of the process that started this one. If that has already ended, this process
    ends now. The setting survives exec and is not inherited by children.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:  # it ended before prctl
        sys.stderr.write(f"process {os.getpid()} ends: its parent {parent} has ended\n")
        os._exit(128 + signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name; empty if there are none."""
    try:
        text = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
    return text.rpartition(")")[2].split()
