"""Writer and reader of TensorBoard event files, without a thread. Torch-free.

torch's SummaryWriter writes in a thread of its own. If the disk is full, that thread prints a
traceback, and a later, unrelated call raises the error. Here the call that writes raises it. The
files are the same.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

FLUSH_EVERY_S = 10.0
VERSION = "brain.Event:2"


class EventFile:
    """A new event file in a folder. Use it as a context manager, or call `close`."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Create the file. Raises OSError.

        `purge_step`: TensorBoard hides this step and later ones of older files in the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time()):010d}.{os.uname().nodename}.{os.getpid()}"
        self.path = _unused_path(folder, stem)
        self._file = self.path.open("wb")
        self._records = RecordWriter(self._file)
        self._flushed = time.monotonic()
        self._write(Event(step=purge_step or 0, file_version=VERSION))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point of a curve. Raises OSError."""
        self.add_summary(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), step)

    def add_summary(self, summary: Summary, step: int) -> None:
        """Add any kind of summary. Raises OSError."""
        self._write(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Pass all events to the operating system. Raises OSError."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file. Raises OSError."""
        self._file.close()

    def __enter__(self) -> EventFile:
        """The file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_EVERY_S:
            self.flush()


def _unused_path(folder: Path, stem: str) -> Path:
    """The first of `stem`.0, `stem`.1, ... that does not exist in `folder`."""
    for number in itertools.count():
        path = folder / f"{stem}.{number}"
        if not path.exists():
            return path
    raise AssertionError("unreachable")


def read_event_files(folder: Path) -> Iterator[Event]:
    """All events of the files in a folder, in the order of writing.

    The end of a file that a kill truncated is left out. Raises OSError.
    """
    # Takes a second, which trainers need not wait for.
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(path)).Load():
            yield Event.FromString(record)
