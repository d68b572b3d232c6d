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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from landiff.launchers.slurm.client import Slurm

HERE = Path(__file__).resolve().parent
SANDBOX = HERE / "slurm_sandbox"
DISK_MIB = 160  # enough for the code and a few small checkpoints


@dataclass
class Sandbox:
    """A running SLURM of four nodes that can crash and come back.

    `disk` is a small disk that all nodes see.
    """

    folder: Path
    slurm: Slurm
    disk: Path

    def command(self, *words: str) -> None:
        action, *rest = words
        subprocess.run(
            [str(SANDBOX), action, str(self.folder), *rest],
            check=True,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def crash(self, node: str) -> None:
        """Power failure of a node, or of `slurmctld`."""
        self.command("crash", node)

    def boot(self, node: str) -> None:
        self.command("boot", node)

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, e.g. JobState."""
        text = self.slurm.ask("scontrol", "show", "job", "-o", job)
        words = text.splitlines()[0].split()
        return next(word for word in words if word.startswith(f"{name}=")).partition("=")[2]

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def wait(self, job: str, timeout_s: float = 240.0) -> str:
        """The final state of a job."""
        until(
            lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"),
            timeout_s,
            lambda: f"job {job} is {self.state(job)}",
        )
        return self.state(job)

    def nodes(self) -> dict[str, int]:
        """The first process of every node that is up."""
        found = {}
        for path in (self.folder / "run").glob("node*.pid"):
            pid = path.read_text().strip()
            children = Path(f"/proc/{pid}/task/{pid}/children")
            found[path.stem] = int(children.read_text().split()[0])
        return found

    def left_behind(self) -> list[str]:
        """Processes, listening ports and file locks on the nodes that are not slurmd's."""
        found = []
        for node, first in self.nodes().items():
            strangers = []
            for pid in pids_in_namespace(first):
                if pid != first and read(f"/proc/{pid}/comm").strip() != "slurmd":
                    strangers.append(pid)
                    found.append(f"{node}: process {read(f'/proc/{pid}/cmdline')[:300]}")
            port = 17803 + int(node.removeprefix("node"))
            found += [f"{node}: port {number}" for number in listening_ports(first) - {port}]
            for line in read("/proc/locks").splitlines():
                if int(line.split()[4]) in strangers:
                    found.append(f"{node}: lock {line}")
        return found

    def cancel_all(self) -> None:
        """What a test that failed left in the queue."""
        active = [job.id for job in self.slurm.queue() if job.active]
        for job in active:
            self.slurm.cancel(job)
        until(
            lambda: not any(job.active for job in self.slurm.queue()),
            120,
            lambda: f"jobs do not end: {self.slurm.queue()}",
        )


def pids_in_namespace(first: int) -> list[int]:
    """Ids of the processes that share the process namespace of `first`."""
    namespace = link(f"/proc/{first}/ns/pid")
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if link(f"/proc/{pid}/ns/pid") == namespace]


def listening_ports(pid: int) -> set[int]:
    """TCP ports that are listened on in the network namespace of a process."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in read(f"/proc/{pid}/net/{table}").splitlines()[1:]:
            _, address, _, state, *_ = line.split()
            if state == "0A":
                found.add(int(address.rpartition(":")[2], 16))
    return found


def read(path: str) -> str:
    """Text of a file of /proc; empty if the process has ended."""
    try:
        return Path(path).read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def link(path: str) -> str:
    """Target of a link in /proc; empty if the process has ended."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


@contextmanager
def full(disk: Path, leave: int = 0) -> Iterator[None]:
    """In the block no more than `leave` bytes are free."""
    filler = disk / "filler"
    try:
        with open(filler, "wb", buffering=0) as file, suppress(OSError):  # a full disk is the aim
            surplus = shutil.disk_usage(disk).free - leave
            while surplus > 0:
                file.write(b"\0" * min(surplus, 1 << 20))
                surplus = shutil.disk_usage(disk).free - leave
        yield
    finally:
        filler.unlink()


def until(
    condition: Callable[[], object],
    timeout_s: float = 120.0,
    otherwise: Callable[[], str] = lambda: "",
) -> None:
    """Wait for `condition`; a timeout is a failure."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {otherwise()}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    # unix sockets want short names, shorter than pytest's folders
    folder = Path(tempfile.mkdtemp(prefix="landiff-slurm-", dir="/tmp"))
    disk = folder / "disk"
    disk.mkdir()
    # before the nodes start: they see the mounts of that moment
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "landiff-test", str(disk)], check=True
    )
    environment = {
        **os.environ,
        "SANDBOX_NODES": "4",
        "SANDBOX_NODE_TIMEOUT": "6",
        "SANDBOX_CPUS": "64",
    }
    try:
        done = subprocess.run(
            [str(SANDBOX), "start", str(folder / "c")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"no SLURM here: {done.stderr}\nrun tests/slurm/install.sh"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "c" / "slurm.conf"))
            sandbox = Sandbox(folder / "c", Slurm(), disk)
            yield sandbox
            sandbox.cancel_all()
            until(
                lambda: not sandbox.left_behind(),
                60,
                lambda: f"left behind: {sandbox.left_behind()}",
            )
    finally:
        subprocess.run([str(SANDBOX), "stop", str(folder / "c")], check=True, timeout=120)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        shutil.rmtree(folder)
