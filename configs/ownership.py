"""One owner at a time: of a run folder, a shard task, a precompute unit, a zoo entry being written.

    with ownership.take(folder / OWNER, f"run folder {folder}"):
        ...

The lock is a small JSON file that names its owner: machine, process and its start time, user,
SLURM job. It is created by link(2), which is atomic on NFS as well, and its time is renewed every
`BEAT_S` seconds. A second process is refused with the owner's name, unless the owner is gone:

* it ran on this machine, and no process with this id and start time does now;
* it ran in a SLURM job that is not in the queue any more, or in an earlier attempt of this job;
* neither can be told, and the lock was not renewed for `LEASE_S` seconds on the clock of the file
  system.

When several processes take over a lock at once, one wins. Each links its record to
`<lock>.after-<token of the old owner>`, a name that only one of them can create. The winner
renames its record to the lock itself and then removes that name. A process that creates the name
after that finds that the lock has changed, and has lost.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import logging
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from landiff.configs.base import ConfigError
from landiff.configs.files import file_system_time, fsync_dir, temporary_name
from landiff.configs.processes import is_running, machine, start_time

log = logging.getLogger(__name__)

OWNER = ".owner"  # the lock of a folder
TOKEN = "LANDIFF_OWNER"  # environment variable: token of the owner that a process belongs to
LEASE_S = 60.0
BEAT_S = 15.0
TRIES = 20  # each lost to another process that took over at the same moment
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems that have none
SQUEUE_TIMEOUT_S = 30.0
State = Literal["running", "gone", "silent", "unknown"]


class OwnedError(ConfigError):
    """Another process owns what this one wanted to write."""


@dataclass(frozen=True)
class Owner:
    """Content of a lock: the process that holds it."""

    machine: str  # see landiff.configs.processes.machine
    pid: int
    started: str  # start time of the process, in ticks since boot
    user: str
    since: str  # UTC
    token: str  # differs between any two owners
    job: str = ""  # SLURM job id, of an array its task's own
    attempt: int = 0  # how often SLURM restarted that job before
    cluster: str = ""  # SLURM's name of the cluster

    @property
    def host(self) -> str:
        """Name of the machine."""
        return self.machine.partition("/")[0]

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        user, host = self.user or "an unknown user", self.host or "an unknown machine"
        return f"process {self.pid} of {user} on {host}{job}, since {self.since or 'unknown'}"


def this_process() -> Owner:
    """An owner's record for the calling process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this user
        user = str(os.getuid())
    environment = os.environ
    return Owner(
        machine=machine(),
        pid=os.getpid(),
        started=start_time(os.getpid()),
        user=user,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
        job=environment.get("SLURM_JOB_ID", ""),
        attempt=int(environment.get("SLURM_RESTART_COUNT") or 0),
        cluster=environment.get("SLURM_CLUSTER_NAME", ""),
    )


class Ownership:
    """A lock that is held. Use as a context manager, or call `release`."""

    def __init__(
        self, path: Path, owner: Owner, *, inherited: bool, on_lost: Callable[[str], None]
    ) -> None:
        """`inherited`: an ancestor holds the lock; it renews and releases it."""
        self.path = path
        self.owner = owner
        self.inherited = inherited
        self._on_lost = on_lost
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        if not inherited:
            self._thread = threading.Thread(
                target=self._renew_until_released, name="owner", daemon=True
            )
            self._thread.start()

    @property
    def token(self) -> str:
        """What a child process passes as `inherited` to share this ownership."""
        return self.owner.token

    def release(self) -> None:
        """Remove the lock if it still is this owner's."""
        if self.inherited or self._released.is_set():
            return
        self._released.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        current = _read(self.path)
        if current is not None and current.token == self.owner.token:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _renew_until_released(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                current = _read(self.path)
                if current is not None and current.token != self.owner.token:
                    self._on_lost(f"{self.path} was taken over by {current}")
                    return
                os.utime(self.path)
            except OSError as error:
                log.warning("%s could not be renewed: %s", self.path, error)


def take(
    path: Path,
    what: str,
    *,
    inherited: str = "",
    take_over: bool = False,
    on_lost: Callable[[str], None] | None = None,
) -> Ownership:
    """Own `what`, whose lock is the file `path`. Raises OwnedError at once where another does.

    `inherited`: token of an ancestor whose ownership is shared. `take_over`: do not wait for the
    lease of an owner of which it cannot be told whether it runs; one that runs is never taken
    over. `on_lost` is called in a thread when another process has taken the lock away; by default
    this process ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lost = on_lost or end_process
    me = this_process()
    for _ in range(TRIES):
        chain = _chain(path)
        if chain and inherited and chain[-1][1].token == inherited:
            return Ownership(path, chain[-1][1], inherited=True, on_lost=lost)
        if chain:
            _refuse_unless_gone(*chain[-1], what=what, take_over=take_over)
        if _append(path, chain, me):
            return Ownership(path, me, inherited=False, on_lost=lost)
    raise OwnedError(
        f"{what}: {TRIES} other processes took it over in a row; start one of them only"
    )


def holder(path: Path) -> tuple[Owner, State] | None:
    """Who owns the lock `path`, and what is known of that process; None where nobody does."""
    chain = _chain(path)
    if not chain:
        return None
    file, owner = chain[-1]
    return owner, _state(file, owner)


def remove_abandoned_locks(folder: Path) -> None:
    """Remove the locks in `folder` that processes left which are gone."""
    for path in folder.glob(f".*{OWNER}"):
        found = holder(path)
        if found is not None and found[1] in ("gone", "silent"):
            with contextlib.suppress(OwnedError):  # another process was faster
                take(path, str(path)).release()
    for path in folder.glob(f".*{OWNER}.after-*"):
        if not path.with_name(path.name.rpartition(".after-")[0]).exists():
            path.unlink(missing_ok=True)


def end_process(why: str) -> None:
    """Exit at once: two owners must not write one folder."""
    sys.stderr.write(f"landiff: {why}; this process ends\n")
    sys.stderr.flush()
    os._exit(1)


# -------------------------------------------------------------------- is the owner gone?


def _refuse_unless_gone(file: Path, owner: Owner, *, what: str, take_over: bool) -> None:
    state = _state(file, owner)
    if state in ("gone", "silent"):
        log.warning("taking over %s from %s, which is gone", what, owner)
    elif state == "running":
        raise OwnedError(
            f"{what} is in use by {owner}; wait for it, stop it, or choose another folder"
        )
    elif not take_over:
        raise OwnedError(
            f"{what} is in use by {owner}, which renewed its lock less than {LEASE_S:g} s ago; "
            f"if that process is gone, try again in {LEASE_S:g} s, or pass --take-over to a command that has it"
        )
    else:
        log.warning("taking over %s from %s", what, owner)


def _state(file: Path, owner: Owner) -> State:
    """State of an owner: running or gone where that can be told, else unknown until the lease ends.

    After that it is silent.
    """
    if owner.machine == machine():
        return "running" if is_running(owner.pid, owner.started) else "gone"
    if owner.job:
        here = os.environ.get("SLURM_JOB_ID", "")
        if here == owner.job and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > owner.attempt:
            return "gone"
        queued = _is_queued(owner) if here != owner.job else None
        if queued is not None:
            return "running" if queued else "gone"
    return "silent" if _age_s(file) > LEASE_S else "unknown"


def _is_queued(owner: Owner) -> bool | None:
    """Whether the owner's job is in SLURM's queue; None where SLURM cannot be asked."""
    if owner.cluster:
        named = [
            line.partition("=")[2].strip()
            for line in (_ask("scontrol", "show", "config") or "").splitlines()
            if line.partition("=")[0].strip() == "ClusterName"
        ]
        if named != [owner.cluster]:
            return None
    queue = _ask(
        "squeue", "-h", "-a", "-o", "%A"
    )  # jobs that have not ended; -j fails for an id that SLURM forgot
    return None if queue is None else owner.job in queue.split()


def _ask(*words: str) -> str | None:
    """Standard output of a SLURM command; None where there is no SLURM or it does not answer."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _age_s(file: Path) -> float:
    """Seconds since the lock was renewed, on the clock of its file system."""
    now = file_system_time(file.parent)
    try:
        descriptor = os.open(file, os.O_RDONLY)  # opening it brings NFS's cached times up to date
    except FileNotFoundError:
        return 0.0  # released just now
    try:
        return now - os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------- lock files


def _chain(path: Path) -> list[tuple[Path, Owner]]:
    """The lock and the records of those that are taking it over, in order; the last is the owner."""
    found = []
    file, owner = path, _read(path)
    while owner is not None:
        found.append((file, owner))
        file = _successor(path, owner)
        owner = _read(file)
    return found


def _successor(path: Path, owner: Owner) -> Path:
    return path.with_name(f"{path.name}.after-{owner.token}")


def _read(path: Path) -> Owner | None:
    """The record in a lock; None where there is none. One that is not written yet names nobody."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        text = os.read(descriptor, 1 << 16)
        inode = os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return Owner(machine="", pid=0, started="", user="", since="", token=f"damaged-{inode}")


def _append(path: Path, chain: list[tuple[Path, Owner]], me: Owner) -> bool:
    """Become the owner behind `chain`. False where another process was faster."""
    temporary = temporary_name(path.with_name(f"{path.name}.{me.token}"))
    try:
        _write(temporary, me)
        name = _successor(path, chain[-1][1]) if chain else path
        if not _create(name, temporary, me):
            return False
        if not chain:
            fsync_dir(path.parent)
            return True
        if [owner.token for _, owner in _chain(path)] != [
            *(owner.token for _, owner in chain),
            me.token,
        ]:
            name.unlink(missing_ok=True)  # it had been taken over before we came
            return False
        os.replace(temporary, path)
        mine = _successor(path, me).name
        for leftover in path.parent.glob(f"{path.name}.after-*"):
            if leftover.name != mine:
                leftover.unlink(missing_ok=True)
        fsync_dir(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, owner: Owner) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(descriptor, json.dumps(asdict(owner)).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(name: Path, temporary: Path, me: Owner) -> bool:
    """Give the written file the new name `name`. False where that name exists."""
    try:
        os.link(temporary, name)
        return True
    except FileExistsError:
        return os.stat(temporary).st_nlink > 1  # NFS: linked, and the answer was lost
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return False
    with contextlib.suppress(FileNotFoundError):
        _write(name, me)
    return True
