"""Writing files that others read: temporary name beside the final one, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """The name a half-written `path` has. Unique to this process, so that twins never share it."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def remove_dead_twins(path: Path) -> None:
    """Delete what killed writers of `path` left on this node. Those of other nodes, and living ones, are not ours to judge."""
    for twin in path.parent.glob(f".{path.name}.{os.uname().nodename}.*.tmp"):
        pid = twin.name.removesuffix(".tmp").rpartition(".")[2]
        if pid.isdigit() and int(pid) != os.getpid() and not Path("/proc", pid).exists():
            shutil.rmtree(twin, ignore_errors=True) if twin.is_dir() else twin.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator:
    """A file that appears under its final name whole, or not at all.

    Raises whatever the body or the disk raises (OSError with ENOSPC on a full one), after the temporary
    file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, mode, encoding="utf-8" if "b" not in mode else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(text)


def commit_dir(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name: every file fsynced first, the parent after."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_dir(Path(folder))
    os.rename(temporary, final)
    fsync_dir(final.parent)


def remove_dir(folder: Path) -> None:
    """Delete a committed folder in two steps, so that a kill in between never leaves half of it behind its name."""
    doomed = temporary_name(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LFS_HEADER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether `path` is the text that git puts in the place of a file which git-lfs has not downloaded."""
    with open(path, "rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER
