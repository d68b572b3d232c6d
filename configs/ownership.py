"""Exclusive ownership of a run folder, a shard task, a precompute unit or a zoo entry.

    with ownership.take(folder / OWNER, f"run folder {folder}"):
        ...

The lock is a small JSON file that describes its owner: machine, process id and start time, user
and SLURM job. It is created with link(2), which is atomic on NFS too. The owner renews its
modification time every `BEAT_S` seconds. A second process gets an error that names the owner,
unless the owner has ended. It has ended if one of these is true:

* It ran on this machine, and there is no process with its id and start time.
* It ran in a SLURM job that is no longer in the queue, or in an earlier attempt of this job.
* Neither can be determined, and the lock was not renewed for `LEASE_S` seconds on the clock of the
  file system.

If several processes take over a lock at the same time, exactly one succeeds. Each links its record
to `<lock>.after-<token of the old owner>`, a name that only one of them can create. That process
renames its record to the lock and then deletes the name. A process that creates the name later
sees that the lock has changed, and fails.

`landiff.data_pipeline.format.locks` is a different kind of lock, for a few statements: its callers
wait for each other, and it uses flock, which the kernel releases. Ownership lasts for hours. It
must name its owner, work on file systems without flock, pass to child processes, and end with the
SLURM job even if the owner's machine is unreachable.
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
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from landiff.configs.base import ConfigError
from landiff.configs.files import file_system_time, fsync_dir, temporary_name
from landiff.configs.processes import is_running, machine, start_time

log = logging.getLogger(__name__)

OWNER = ".owner"  # file name of a folder's lock
TOKEN = (
    "LANDIFF_OWNER"  # environment variable with the token of the owner that a process belongs to
)
LEASE_S = 60.0
BEAT_S = 15.0
CLEANUP_TIMEOUT_S = 10.0  # for a process that removes an abandoned lock
CLEANUP_POLL_S = 0.02
TRIES = 20  # attempts to take a lock, each of which another process may win
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without hard links
SQUEUE_TIMEOUT_S = 30.0
State = Literal["running", "gone", "silent", "unknown"]


class OwnedError(ConfigError):
    """Another process owns the folder or file that this one was to write."""


@dataclass(frozen=True)
class Owner:
    """Content of a lock: the process that holds it."""

    machine: str  # see landiff.configs.processes.machine
    pid: int
    started: str  # start time of the process, in ticks since boot
    user: str
    since: str  # UTC
    token: str  # unique to this owner
    job: str = ""  # SLURM job id; for an array, that of the task
    attempt: int = 0  # number of restarts of the job by SLURM
    cluster: str = ""  # cluster name in SLURM
    is_cleanup: bool = False  # holds the abandoned lock only to remove it

    @property
    def host(self) -> str:
        """Host name of the machine."""
        return self.machine.partition("/")[0]

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        user = self.user or "an unknown user"
        host = self.host or "an unknown machine"
        return f"process {self.pid} of {user} on {host}{job}, since {self.since or 'unknown'}"


def this_process() -> Owner:
    """The record of the calling process."""
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
    """A lock that this process holds. Use it as a context manager, or call `release`."""

    def __init__(
        self, path: Path, owner: Owner, *, inherited: bool, on_lost: Callable[[str], None]
    ) -> None:
        """`inherited`: an ancestor process holds the lock, renews and releases it."""
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
        """Token that a child process passes as `inherited` to share this ownership."""
        return self.owner.token

    def release(self) -> None:
        """Remove the lock if it still belongs to this owner."""
        if self.inherited or self._released.is_set():
            return
        self._released.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        current = _read(self.path)
        if current is not None and current.token == self.owner.token:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Ownership:
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock."""
        self.release()

    def _renew_until_released(self) -> None:
        """Renew the lock every `BEAT_S` seconds; call `on_lost` if another process has taken it."""
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
    is_cleanup: bool = False,
    on_lost: Callable[[str], None] | None = None,
) -> Ownership:
    """Become the owner of `what`, whose lock is the file `path`.

    Args:
        path: The lock file.
        what: Description of the owned thing for error messages, e.g. "run folder runs/lm".
        inherited: Token of an ancestor process whose ownership is shared.
        take_over: Do not wait for the lease to end if it is unknown whether the owner runs. An
            owner that is known to run is never replaced.
        is_cleanup: The lock is abandoned and taken only to remove it. Other processes wait for
            that instead of being refused.
        on_lost: Called in a thread with the reason if another process takes the lock away. By
            default, this process ends.

    Raises:
        OwnedError: Another process is the owner. Raised without waiting, unless that process is
            about to remove the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lost = on_lost or end_process
    me = replace(this_process(), is_cleanup=is_cleanup)
    for _ in range(TRIES):
        chain = _wait_for_cleanup(path)
        if chain and inherited and chain[-1][1].token == inherited:
            return Ownership(path, chain[-1][1], inherited=True, on_lost=lost)
        if chain:
            file, owner = chain[-1]
            _refuse_unless_gone(file, owner, what=what, take_over=take_over)
        if _append(path, chain, me):
            return Ownership(path, me, inherited=False, on_lost=lost)
    raise OwnedError(
        f"{what}: {TRIES} other processes took it over in a row; start only one of them"
    )


def holder(path: Path) -> tuple[Owner, State] | None:
    """The owner of the lock `path` and the state of its process; None if there is no owner."""
    chain = _chain(path)
    if not chain:
        return None
    file, owner = chain[-1]
    return owner, _state(file, owner)


def remove_abandoned_locks(folder: Path) -> None:
    """Remove the locks in `folder` whose owners have ended."""
    for path in folder.glob(f".*{OWNER}"):
        found = holder(path)
        if found is not None and found[1] in ("gone", "silent"):
            with contextlib.suppress(OwnedError):  # another process was faster
                take(path, str(path), is_cleanup=True).release()
    for path in folder.glob(f".*{OWNER}.after-*"):
        if not path.with_name(path.name.rpartition(".after-")[0]).exists():
            path.unlink(missing_ok=True)


def _wait_for_cleanup(path: Path) -> list[tuple[Path, Owner]]:
    """The owners of the lock `path`, once no process holds it only to remove it."""
    deadline = time.monotonic() + CLEANUP_TIMEOUT_S
    while True:
        chain = _chain(path)
        if not chain or not chain[-1][1].is_cleanup or time.monotonic() > deadline:
            return chain
        file, owner = chain[-1]
        if _state(file, owner) != "running":
            return chain
        time.sleep(CLEANUP_POLL_S)


def end_process(why: str) -> None:
    """End this process immediately, so that two owners never write the same folder."""
    sys.stderr.write(f"landiff: {why}; this process ends\n")
    sys.stderr.flush()
    os._exit(1)


# -------------------------------------------------------------------- state of an owner


def _refuse_unless_gone(file: Path, owner: Owner, *, what: str, take_over: bool) -> None:
    """Raise OwnedError unless the owner has ended, or may be replaced with `take_over`."""
    state = _state(file, owner)
    if state in ("gone", "silent"):
        log.warning("taking over %s from %s, which has ended", what, owner)
    elif state == "running":
        raise OwnedError(
            f"{what} is in use by {owner}; wait for it, stop it, or choose another folder"
        )
    elif not take_over:
        raise OwnedError(
            f"{what} is in use by {owner}, which renewed its lock less than {LEASE_S:g} s ago; "
            f"if that process has ended, try again in {LEASE_S:g} s, or pass --take-over if the "
            "command has that option"
        )
    else:
        log.warning("taking over %s from %s", what, owner)


def _state(file: Path, owner: Owner) -> State:
    """State of an owner: "running" or "gone" if that can be determined.

    Otherwise "unknown" until the lease ends, and "silent" after that.
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
    """Whether the job of the owner is in the SLURM queue; None if SLURM does not answer."""
    if owner.cluster:
        names = []
        for line in (_ask("scontrol", "show", "config") or "").splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "ClusterName":
                names.append(value.strip())
        if names != [owner.cluster]:
            return None
    # All jobs that have not ended; with -j, squeue fails for an id that SLURM no longer knows.
    queue = _ask("squeue", "-h", "-a", "-o", "%A")
    return None if queue is None else owner.job in queue.split()


def _ask(*words: str) -> str | None:
    """Standard output of a SLURM command; None if there is no SLURM or it does not answer."""
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
        descriptor = os.open(file, os.O_RDONLY)  # on NFS, this updates cached times
    except FileNotFoundError:
        return 0.0  # it has just been released
    try:
        return now - os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------- lock files


def _chain(path: Path) -> list[tuple[Path, Owner]]:
    """The lock and the records of processes that take it over, in order. The last is the owner."""
    found = []
    file = path
    owner = _read(path)
    while owner is not None:
        found.append((file, owner))
        file = _successor(path, owner)
        owner = _read(file)
    return found


def _successor(path: Path, owner: Owner) -> Path:
    """The file that a process creates to take over the lock `path` from `owner`."""
    return path.with_name(f"{path.name}.after-{owner.token}")


def _read(path: Path) -> Owner | None:
    """The record in a lock; None without a lock. An incomplete one gives a record without names."""
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
    """Become the owner after `chain`. Returns False if another process was faster."""
    temporary = temporary_name(path.with_name(f"{path.name}.{me.token}"))
    try:
        _write(temporary, me)
        name = _successor(path, chain[-1][1]) if chain else path
        if not _create(name, temporary, me):
            return False
        if not chain:
            fsync_dir(path.parent)
            return True
        expected = [owner.token for _, owner in chain] + [me.token]
        if [owner.token for _, owner in _chain(path)] != expected:
            name.unlink(missing_ok=True)  # another process had already taken over
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
    """Write a record and fsync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(descriptor, json.dumps(asdict(owner)).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(name: Path, temporary: Path, me: Owner) -> bool:
    """Give the written file the additional name `name`. Returns False if that name exists."""
    try:
        os.link(temporary, name)
        return True
    except FileExistsError:
        return os.stat(temporary).st_nlink > 1  # on NFS, a repeated request fails after success
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
