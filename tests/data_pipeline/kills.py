"""Runs jobs in forks of this process that are killed at a chosen operation on the disk.

Each operation counts twice: at an even number a process is killed before the operation or half way
through it, at an odd number after it.
"""

from __future__ import annotations

import builtins
import os
import signal
import tarfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


class Killer:
    """Counts operations of this process, and kills it at number `plan` (0: never)."""

    def __init__(self, plan: int) -> None:
        self.plan = plan
        self.count = 0

    def watch(self, module: ModuleType, *names: str) -> None:
        """Count calls of these functions of a module."""
        for name in names:
            setattr(module, name, self._watched(getattr(module, name)))

    def watch_writes(self) -> None:
        """Count writes to files opened by a `Path`; a kill lets half of the data through."""
        plain_open = builtins.open

        def watched_open(file: object, mode: str = "r", *args: object, **named: object) -> object:
            opened = plain_open(file, mode, *args, **named)
            if "w" in mode and isinstance(file, Path):
                write, flush = opened.write, opened.flush

                def half(data: str | bytes) -> None:
                    write(data[: len(data) // 2])
                    flush()

                opened.write = self._watched(write, half)
            return opened

        builtins.open = watched_open

    def watch_tars(self) -> None:
        """Count members added to tars; a kill lets a part of the header through."""

        def half(tar: tarfile.TarFile, info: tarfile.TarInfo, data: object) -> None:
            tar.fileobj.write(info.tobuf()[:300])
            tar.fileobj.flush()

        tarfile.TarFile.addfile = self._watched(tarfile.TarFile.addfile, half)

    def _watched(self, function: Callable, half: Callable | None = None) -> Callable:
        def operation(*args: object, **named: object) -> object:
            self.count += 2
            if self.count == self.plan:
                if half:
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **named)
            if self.count + 1 == self.plan:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return operation


def forked(
    work: Callable[[], object],
    killer: Killer,
    prepare: Callable[[Killer], None],
    record: Path | None = None,
) -> int:
    """Start `work` in a fork with the killer that `prepare` sets up. Returns its process id.

    The number of operations is written to `record`.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            prepare(killer)
            work()
            if record:
                record.write_text(str(killer.count))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def killed(pid: int) -> bool:
    """Wait for a process. True if it was killed, False if it ended without an error."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, (
            f"the job died of signal {os.WTERMSIG(status)}"
        )
        return True
    assert os.WEXITSTATUS(status) == 0, "the job failed by itself"
    return False
