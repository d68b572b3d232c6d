"""Why a rank died, in a file: `<run>/errors/rank_0003.txt`. Torch-free, so that launchers can read it too.

When one rank fails, its peers fail a moment later in their next collective. The cause is the earliest file.
"""

from __future__ import annotations

import logging
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

from configs.files import write_text
from configs.secrets import redact

log = logging.getLogger(__name__)

_TRACE = "\nin full:\n"  # behind the message


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those on disk is whole."""


class NonFiniteError(RuntimeError):
    """Loss, gradient norm or weights are NaN or infinite. The same command would meet it again."""


def error_path(run: Path, rank: int) -> Path:
    return run / "errors" / f"rank_{rank:04d}.txt"


def write_error(run: Path, rank: int, step: int, error: BaseException) -> None:
    """Write time (UTC, microseconds), step, message and traceback of `error`. A disk that is full does not hide the error itself."""
    now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="microseconds")
    message = f"{type(error).__name__}: {error}\n"
    trace = "".join(traceback.format_exception(error))
    text = redact(f"{message}{_TRACE}{trace}")
    try:
        write_text(error_path(run, rank), f"time: {now}\nrank: {rank}\nstep: {step}\n\n{text}")
    except OSError as refused:
        log.warning("no error file: %s", refused)


def read_message(path: Path) -> str:
    """What the exception in an error file said, with its type; without the traceback."""
    return path.read_text(encoding="utf-8").partition("\n\n")[2].partition(_TRACE)[0].strip()


def clear_errors(run: Path, rank: int, world_size: int) -> None:
    """Remove what an earlier attempt left: every rank its own file, rank 0 also those of ranks that are no more."""
    error_path(run, rank).unlink(missing_ok=True)
    if rank == 0:
        for path in (run / "errors").glob("rank_*.txt"):
            if int(path.stem.removeprefix("rank_")) >= world_size:
                path.unlink(missing_ok=True)


def first_error(run: Path) -> Path | None:
    """The file of the rank that failed first, or None."""
    paths = list((run / "errors").glob("rank_*.txt"))
    return min(paths, key=lambda path: path.read_text(encoding="utf-8").partition("\n")[0], default=None)
