"""Jobs in forks of this process that die inside what they do to the disk, and how they ended.

Operations are counted in twos: at an even number a process dies before the operation or half way through it, at
an odd one after it.
"""

from __future__ import annotations

import builtins
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


class Killer:
    """Counts operations of this process; dies before, within or after the planned one (0: never)."""

    def __init__(self, plan: int) -> None:
        self.plan, self.count = plan, 0

    def watch(self, module: ModuleType, *names: str) -> None:
        for name in names:
            setattr(module, name, self._watched(getattr(module, name)))

    def watch_writes(self) -> None:
        """Those of files that are opened for writing by a `Path`: half of the data gets there."""
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
        """Members of tars: a part of the header gets there."""

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
    """`work` in a fork whose killer `prepare` sets up; -> its process id. `record` gets the number of operations."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            prepare(killer)
            work()
            if record:
                record.write_text(str(killer.count))
            code = 0
        finally:
            os._exit(code)
    return pid


def killed(pid: int) -> bool:
    """Wait for a process: True when it was killed, False when it came to its end. Nothing else may happen to it."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, (
            f"the job died of signal {os.WTERMSIG(status)}"
        )
        return True
    assert os.WEXITSTATUS(status) == 0, "the job failed by itself"
    return False


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
