"""Atomic writes: temporary name in the same folder, fsync, rename, fsync of the folder.

The name of a temporary file contains its writer (machine, process and its start time), so that the
temporaries of dead writers can be deleted.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from landiff.configs.disk_errors import naming
from landiff.configs.processes import is_running, start_time

ABANDONED_S = 24 * 3600.0  # age at which temporaries of other machines are removed
PRIVATE = 0o600  # permissions of files that may hold secrets
PUBLIC = 0o666  # permissions of other files, before the umask
REPLACED = "replaced"  # part of the name of a folder that is being replaced


def fsync_dir(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make the content of a file durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_name(path: Path) -> Path:
    """Temporary name of `path`, unique to this process, under which it is written."""
    pid = os.getpid()
    return path.with_name(f".{path.name}.{os.uname().nodename}.{pid}-{start_time(pid)}.tmp")


def remove_abandoned(folder: Path, of: str = "", *, foreign_after_s: float = ABANDONED_S) -> int:
    """Delete temporaries in `folder` whose writers are dead. Returns their number.

    `of` limits this to temporaries of the file or folder of that name. For `foreign_after_s` see
    `is_abandoned`; 0 is for callers that own the folder.
    """
    removed = 0
    for path in folder.glob(f".{glob.escape(of)}*.tmp"):
        if not is_abandoned(path, foreign_after_s):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed += 1
    return removed


def is_abandoned(path: Path, foreign_after_s: float = ABANDONED_S) -> bool:
    """Whether the writer of a temporary file or folder (see `temporary_name`) is dead.

    A writer on this machine is looked up by its process id and start time. A writer on another
    machine counts as dead if nothing was written for `foreign_after_s` seconds, on the file
    system's clock.
    """
    front, _, writer = path.name.removesuffix(".tmp").rpartition(".")
    pid, _, started = writer.partition("-")
    if front.endswith(f".{os.uname().nodename}") and pid.isdigit():
        return not is_running(int(pid), started)
    if not foreign_after_s:
        return True
    try:
        newest = max(file.stat().st_mtime for file in [path, *path.rglob("*")])
    except FileNotFoundError:  # its writer has just finished or removed it
        return False
    return file_system_time(path.parent) - newest > foreign_after_s


def file_system_time(folder: Path) -> float:
    """Seconds since 1970 on the clock of the file system of `folder`, which other machines share.

    Uses the clock of this machine if the folder cannot be written.
    """
    probe = temporary_name(folder / f"clock-{threading.get_ident()}")
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError:
        return time.time()
    try:
        os.utime(descriptor)
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path, mode: str = "wb", permissions: int = PUBLIC) -> Iterator:
    """Open a file that appears under its final name complete, or not at all.

    The file is created with `permissions`, less the umask. Errors of the body and of the disk are
    raised after the temporary file is deleted; an OSError names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # left by an earlier process, with its permissions

    def create(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_EXCL, permissions)

    with naming(path, temporary):
        try:
            encoding = None if "b" in mode else "utf-8"
            with open(temporary, mode, encoding=encoding, opener=create) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    fsync_dir(path.parent)


def write_text(path: Path, text: str, permissions: int = PUBLIC) -> None:
    """Write a text file with `atomic_file`."""
    with atomic_file(path, "w", permissions) as file:
        file.write(text)


def commit_dir(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name, after fsync of everything in it."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_dir(Path(folder))
    os.rename(temporary, final)
    fsync_dir(final.parent)


def replace_dir(temporary: Path, final: Path) -> None:
    """`commit_dir` that replaces an existing folder `final`.

    The old folder is renamed first and deleted last. If the commit fails, it gets its name back;
    after a kill, `restore_replaced` does that. Files that cannot be deleted stay under a temporary
    name.
    """
    old = _other_name(final, REPLACED)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by an earlier replacement
        os.rename(final, old)
    try:
        commit_dir(temporary, final)
    except OSError:
        if old.exists() and not final.exists():
            os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Undo replacements by `replace_dir` in `folder` that were killed before the commit."""
    for old in folder.glob(f".*.{REPLACED}.*.tmp"):
        final = folder / old.name[1:].partition(f".{REPLACED}.")[0]
        if not final.exists():
            os.rename(old, final)


def remove_dir(folder: Path) -> None:
    """Delete a committed folder; it is renamed first, so that a kill never leaves a part of it."""
    doomed = _other_name(folder, "deleted")
    shutil.rmtree(doomed, ignore_errors=True)  # left by an earlier deletion
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _other_name(folder: Path, why: str) -> Path:
    """A temporary name other than `temporary_name(folder)`, which its replacement may have."""
    return temporary_name(folder.with_name(f"{folder.name}.{why}"))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LFS_HEADER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether `path` is a placeholder of a file that git-lfs has not downloaded."""
    with open(path, "rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER
