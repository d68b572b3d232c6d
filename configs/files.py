"""Writing files that others read: temporary name beside the final one, fsync, rename, fsync of the folder."""

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
PRIVATE = 0o600  # permissions of files that may hold secrets: the owner alone reads them
PUBLIC = 0o666  # before the umask
REPLACED = "replaced"  # part of the name of a folder that is being replaced


def fsync_dir(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_name(path: Path) -> Path:
    """The name of `path` while this process writes it; no other process uses the same."""
    pid = os.getpid()
    return path.with_name(f".{path.name}.{os.uname().nodename}.{pid}-{start_time(pid)}.tmp")


def remove_abandoned(folder: Path, of: str = "", *, foreign_after_s: float = ABANDONED_S) -> int:
    """Delete temporaries in `folder` whose writers are gone. Returns how many.

    `of`: name of the file or folder whose temporaries are meant; "" means all. `foreign_after_s`:
    see `is_abandoned`; 0 where the caller owns the folder alone.
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
    """Whether the writer of a temporary file or folder (see `temporary_name`) is gone.

    On this machine its process is looked up. On another one it counts as gone when nothing was
    written for `foreign_after_s` seconds, on the file system's own clock.
    """
    front, _, writer = path.name.removesuffix(".tmp").rpartition(".")
    pid, _, started = writer.partition("-")
    if front.endswith(f".{os.uname().nodename}") and pid.isdigit():
        return not is_running(int(pid), started)
    if not foreign_after_s:
        return True
    try:
        newest = max([path.stat().st_mtime, *(below.stat().st_mtime for below in path.rglob("*"))])
    except FileNotFoundError:  # finished or removed just now
        return False
    return file_system_time(path.parent) - newest > foreign_after_s


def file_system_time(folder: Path) -> float:
    """Seconds since 1970 on the clock of the file system of `folder`, which other machines share.

    Where the folder cannot be written, on this machine's clock.
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
    """A file that appears under its final name whole, or not at all.

    It has `permissions` from its creation on (less the umask). Raises whatever the body or the disk
    raises, after the temporary file is gone; an OSError names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)  # of a dead process with this number, with its permissions

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
    """Write a file as `atomic_file` does."""
    with atomic_file(path, "w", permissions) as file:
        file.write(text)


def commit_dir(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name: every file fsynced first, the parent after."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_dir(Path(folder))
    os.rename(temporary, final)
    fsync_dir(final.parent)


def replace_dir(temporary: Path, final: Path) -> None:
    """`commit_dir` that replaces the folder `final` if there is one.

    The old folder is renamed before and deleted after the new one has its name, and gets its name back
    if that fails; after a kill in between, `restore_replaced` gives it back.
    What cannot be deleted is left under a temporary name.
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
    """Give the folders in `folder` their names back whose replacement by `replace_dir` was killed halfway."""
    for old in folder.glob(f".*.{REPLACED}.*.tmp"):
        final = folder / old.name[1:].partition(f".{REPLACED}.")[0]
        if not final.exists():
            os.rename(old, final)


def remove_dir(folder: Path) -> None:
    """Delete a committed folder in two steps, so that a kill in between never leaves half of it behind its name."""
    doomed = _other_name(folder, "deleted")
    shutil.rmtree(doomed, ignore_errors=True)  # left by an earlier deletion
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _other_name(folder: Path, why: str) -> Path:
    """A temporary name of `folder` that is not `temporary_name(folder)`, where its replacement may lie."""
    return temporary_name(folder.with_name(f"{folder.name}.{why}"))


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LFS_HEADER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether `path` is the text that git puts in the place of a file which git-lfs has not downloaded."""
    with open(path, "rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER
