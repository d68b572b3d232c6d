"""Why a rank died, in a file: `<run>/errors/rank_0003.txt`. Torch-free, so that launchers can read it too.

When one rank fails, its peers fail a moment later in their next collective. The cause is the earliest file.
"""

from __future__ import annotations

import logging
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path

from landiff.configs.files import write_text
from landiff.configs.secrets import redact

log = logging.getLogger(__name__)

_TRACE = "\nin full:\n"  # behind the message


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those on disk is whole."""


class RankLost(RuntimeError):
    """A rank that could not say why it failed: a signal ended it, or it stands still."""


class NonFiniteError(RuntimeError):
    """Loss, gradient norm or weights are NaN or infinite. The same command would meet it again."""


def error_path(run: Path, rank: int) -> Path:
    return run / "errors" / f"rank_{rank:04d}.txt"


def write_error(run: Path, rank: int, step: int, error: BaseException) -> None:
    """Write time (UTC, microseconds), step, message and traceback of `error`. A disk that is full does not hide the error itself."""
    _write(run, rank, step, error, datetime.now(UTC))


def write_cause(run: Path, rank: int, error: BaseException, step: int = 0) -> None:
    """Write the error file of a rank that could not, unless it has one.

    Its time lies before that of all others, whose ranks failed because of this one.
    """
    if error_path(run, rank).exists():
        return
    now = datetime.now(UTC)
    first = first_error(run)
    when = _read_time(first) if first is not None else None
    _write(
        run, rank, step, error, now if when is None else min(now, when - timedelta(microseconds=1))
    )


def _write(run: Path, rank: int, step: int, error: BaseException, when: datetime) -> None:
    now = when.isoformat(timespec="microseconds")
    message = f"{type(error).__name__}: {error}\n"
    trace = "".join(traceback.format_exception(error))
    text = redact(f"{message}{_TRACE}{trace}")
    try:
        write_text(error_path(run, rank), f"time: {now}\nrank: {rank}\nstep: {step}\n\n{text}")
    except OSError as refused:
        log.warning("no error file: %s", refused)


def _read_time(path: Path) -> datetime | None:
    try:
        found = datetime.fromisoformat(
            path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("time: ")
        )
        return found.replace(tzinfo=found.tzinfo or UTC)
    except (OSError, ValueError):
        return None


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
    return min(
        paths, key=lambda path: path.read_text(encoding="utf-8").partition("\n")[0], default=None
    )
