"""Error files of failed ranks, `<run>/errors/rank_0003.txt`, and errors of a run. Torch-free.

If one rank fails, the others fail a moment later in their next collective. The earliest file
therefore holds the cause.
"""

from __future__ import annotations

import logging
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path

from landiff.configs.files import write_text
from landiff.configs.secrets import redact
from landiff.training.checkpoint.run_folder import ERRORS, rank_name

log = logging.getLogger(__name__)

_TRACE = "\nin full:\n"  # between message and traceback


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or no checkpoint on disk is intact."""


class RankLost(RuntimeError):
    """A rank that could not report its failure: a signal killed it, or it hangs."""


class NonFiniteError(RuntimeError):
    """Loss, gradient norm or weights are NaN or infinite. The same command would fail again."""


def error_path(run: Path, rank: int) -> Path:
    """Path of the error file of a rank."""
    return run / ERRORS / f"{rank_name(rank)}.txt"


def error_paths(run: Path) -> list[Path]:
    """All error files of a run."""
    return list((run / ERRORS).glob("rank_*.txt"))


def write_error(run: Path, rank: int, step: int, error: BaseException) -> None:
    """Write time (UTC, in microseconds), step, message and traceback of `error`.

    A full disk is logged and not raised, so that it does not hide `error`.
    """
    _write(run, rank, step, error, datetime.now(UTC))


def write_cause(run: Path, rank: int, error: BaseException, step: int = 0) -> None:
    """Write the error file of a rank that could not do so itself, unless it exists.

    Its time is set before all others, because the other ranks failed as a consequence.
    """
    if error_path(run, rank).exists():
        return
    when = datetime.now(UTC)
    first = first_error(run)
    first_time = None
    if first is not None:
        first_time = _read_time(first)
    if first_time is not None:
        when = min(when, first_time - timedelta(microseconds=1))
    _write(run, rank, step, error, when)


def _write(run: Path, rank: int, step: int, error: BaseException, when: datetime) -> None:
    time = when.isoformat(timespec="microseconds")
    message = f"{type(error).__name__}: {error}\n"
    trace = "".join(traceback.format_exception(error))
    text = redact(f"{message}{_TRACE}{trace}")
    try:
        write_text(error_path(run, rank), f"time: {time}\nrank: {rank}\nstep: {step}\n\n{text}")
    except OSError as failure:
        log.warning("the error file could not be written: %s", failure)


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0]


def _read_time(path: Path) -> datetime | None:
    try:
        time = datetime.fromisoformat(_first_line(path).removeprefix("time: "))
    except (OSError, ValueError):
        return None
    return time.replace(tzinfo=time.tzinfo or UTC)


def read_message(path: Path) -> str:
    """Type and message of the exception in an error file, without the traceback."""
    return path.read_text(encoding="utf-8").partition("\n\n")[2].partition(_TRACE)[0].strip()


def clear_errors(run: Path, rank: int, world_size: int) -> None:
    """Remove the error files of an earlier attempt.

    Each rank removes its own. Rank 0 also removes those of ranks that no longer exist.
    """
    error_path(run, rank).unlink(missing_ok=True)
    if rank != 0:
        return
    for path in error_paths(run):
        if int(path.stem.removeprefix("rank_")) >= world_size:
            path.unlink(missing_ok=True)


def first_error(run: Path) -> Path | None:
    """The error file of the rank that failed first, or None."""
    return min(error_paths(run), key=_first_line, default=None)
