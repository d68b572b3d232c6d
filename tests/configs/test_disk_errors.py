"""Messages for failed writes: the file, and advice that fits the cause."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from landiff.configs.disk_errors import FREE_SPACE, PERMISSIONS, READ_ONLY, explain, naming, way_out
from landiff.configs.files import atomic_file, write_text


def test_a_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(OSError) as error,
        naming(tmp_path / "video.mp4"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "video.mp4"))
    assert (
        explain(error.value) == f"{tmp_path / 'video.mp4'}: No space left on device; {FREE_SPACE}"
    )


def test_a_failed_write_names_the_file_and_not_its_temporary(tmp_path):
    path = tmp_path / "weights"
    with pytest.raises(OSError, match="No space left") as error, atomic_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(path) and list(tmp_path.iterdir()) == []
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(path, "x")


def test_an_error_that_names_another_file_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error, naming(tmp_path / "a"):
        (tmp_path / "b").read_bytes()
    assert error.value.filename == str(tmp_path / "b")


@pytest.mark.parametrize(("number", "advice"), [
    (errno.ENOSPC, FREE_SPACE), (errno.EDQUOT, FREE_SPACE), (errno.EROFS, READ_ONLY),
    (errno.EACCES, PERMISSIONS), (errno.EPERM, PERMISSIONS),
    (errno.EIO, ""), (errno.ENOENT, ""), (errno.EFBIG, ""),
])  # fmt: skip
def test_the_way_out_depends_on_the_error_number(tmp_path, number, advice):
    error = OSError(number, "it failed", str(tmp_path / "x"))
    assert way_out(error, tmp_path) == advice
    wrapped = RuntimeError("a library failed")
    wrapped.__cause__ = error
    assert way_out(wrapped, tmp_path) == advice
    assert (
        way_out(RuntimeError(f"rank 3: {OSError(number, os.strerror(number))}"), tmp_path) == advice
    )


def test_a_library_that_says_nothing_is_judged_by_the_folder(tmp_path):
    assert way_out(RuntimeError("unexpected pos"), tmp_path) == ""
    assert way_out(RuntimeError("unexpected pos"), Path("/proc/sys/landiff")) in (
        READ_ONLY,
        PERMISSIONS,
        FREE_SPACE,
    )
