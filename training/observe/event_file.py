"""TensorBoard's event files, written in the thread that calls.

torch's SummaryWriter writes in a thread of its own, which prints a traceback when the disk is
full, and raises the error in a later, unrelated call. Here the call that writes raises it. The
files are the same.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

FLUSH_EVERY_S = 10.0
VERSION = "brain.Event:2"


class EventFile:
    """A new event file in a folder. Use as a context manager, or call `close`."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Creates the file. Raises OSError.

        `purge_step`: TensorBoard drops this step and later ones of older files in the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time()):010d}.{os.uname().nodename}.{os.getpid()}"
        names = (folder / f"{stem}.{number}" for number in itertools.count())
        self.path = next(path for path in names if not path.exists())
        self._file = self.path.open("wb")
        self._records = RecordWriter(self._file)
        self._flushed = time.monotonic()
        self._write(Event(step=purge_step or 0, file_version=VERSION))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve. Raises OSError."""
        self.add_summary(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), step)

    def add_summary(self, summary: Summary, step: int) -> None:
        """Whatever a summary holds. Raises OSError."""
        self._write(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Hand everything to the operating system. Raises OSError."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file. Raises OSError."""
        self._file.close()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_EVERY_S:
            self.flush()
