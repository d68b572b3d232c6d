"""A real SLURM of virtual nodes for the session; a machine without one fails.

`tests/slurm/install.sh` installs what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launchers.slurm import Slurm

HERE = Path(__file__).resolve().parent
SANDBOX = HERE / "slurm_sandbox"


@dataclass
class Sandbox:
    """A running SLURM: four nodes, which can crash and come back."""

    folder: Path
    slurm: Slurm

    def command(self, *words: str) -> None:
        action, *rest = words
        subprocess.run([str(SANDBOX), action, str(self.folder), *rest], check=True, capture_output=True, text=True, timeout=180)

    def crash(self, node: str) -> None:
        """Power failure of a node, or of `slurmctld`."""
        self.command("crash", node)

    def boot(self, node: str) -> None:
        self.command("boot", node)

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, e.g. JobState."""
        text = self.slurm.ask("scontrol", "show", "job", "-o", job)
        return next(word.partition("=")[2] for word in text.splitlines()[0].split() if word.startswith(f"{name}="))

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def wait(self, job: str, timeout_s: float = 90.0) -> str:
        """The final state of a job."""
        until(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), timeout_s, lambda: f"job {job} is {self.state(job)}")
        return self.state(job)


def until(condition: Callable[[], object], timeout_s: float = 60.0, otherwise: Callable[[], str] = lambda: "") -> None:
    """Wait for `condition`; a timeout is a failure."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {otherwise()}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    # unix sockets want short names, shorter than pytest's folders
    folder = Path(tempfile.mkdtemp(prefix="landiff-slurm-", dir="/tmp"))
    environment = {**os.environ, "SANDBOX_NODES": "4", "SANDBOX_NODE_TIMEOUT": "6", "SANDBOX_CPUS": "64"}
    done = subprocess.run([str(SANDBOX), "start", str(folder / "c")], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"no SLURM here: {done.stderr}\nrun tests/slurm/install.sh"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "c" / "slurm.conf"))
        yield Sandbox(folder / "c", Slurm())
    subprocess.run([str(SANDBOX), "stop", str(folder / "c")], check=True, timeout=120)
    shutil.rmtree(folder)
