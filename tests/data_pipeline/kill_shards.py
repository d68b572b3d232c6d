"""Kill the shards job inside its writes, fsyncs and renames, again and again, and compare what comes out.

    python -m tests.data_pipeline.kill_shards CONFIG REFERENCE WORK KILLS

The job runs in forks of this process, so that a kill costs a second. CONFIG: a YAML file; REFERENCE: the data
folder of an undisturbed run; WORK: a folder to use up. Prints the number of kills and of places.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from configs.loader import load
from data_pipeline.ingest import make_shards
from data_pipeline.ingest_config import ShardsConfig
from data_pipeline.shards import read_sidecar


class Killer:
    """Counts operations; dies before, within or after the planned one."""

    def __init__(self, plan: int, record: Path) -> None:
        self.plan = plan
        self.count = 0
        self.record = record

    def install(self) -> None:
        for name in ("fsync", "replace"):
            setattr(os, name, self.watched(getattr(os, name)))
        tarfile.TarFile.addfile = self.watched(tarfile.TarFile.addfile, half=self.half_of_a_member)

    def watched(self, function: Callable, half: Callable | None = None) -> Callable:
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

    @staticmethod
    def half_of_a_member(tar: tarfile.TarFile, info: tarfile.TarInfo, data: object) -> None:
        tar.fileobj.write(info.tobuf()[:300])
        tar.fileobj.flush()


def attempt(config: ShardsConfig, data: Path, plan: int, record: Path) -> bool:
    """Run the job with a kill planned (0: none). True when it came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            killer = Killer(plan, record)
            killer.install()
            make_shards(config, data)
            record.write_text(str(killer.count))
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the job failed by itself"
    return True


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_committed(data: Path) -> None:
    """Whatever has its final name and a sidecar is whole."""
    for tar in (data / "raw").glob("[0-9]*.tar"):
        sidecar = read_sidecar(tar)
        assert sidecar is None or sidecar.entry.sha256 == hashlib.sha256(tar.read_bytes()).hexdigest(), tar


def main(config_file: str, reference: str, work: str, kills: str) -> None:
    config, expected, data = load(ShardsConfig, Path(config_file)), contents(Path(reference)), Path(work) / "data"
    record = Path(work) / "operations"
    assert attempt(config, data, 0, record)
    assert contents(data) == expected
    places = list(range(2, int(record.read_text()) + 2))
    random.Random(0).shuffle(places)
    shutil.rmtree(data)
    done = 0
    for place in places[: int(kills)]:
        while attempt(config, data, place, record):  # little was left to do: compare, and start over
            assert contents(data) == expected, "what was killed and went on differs from what was not"
            shutil.rmtree(data)
        done += 1
        check_committed(data)
    assert attempt(config, data, 0, record)
    assert contents(data) == expected, "what was killed and went on differs from what was not"
    print(done, len(places))


if __name__ == "__main__":
    main(*sys.argv[1:])
