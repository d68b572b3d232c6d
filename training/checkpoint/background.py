"""Writers of this rank's files of a checkpoint: synchronous, or in another process.

Both process one request at a time: `begin_...` starts it, `busy` says whether it is running, and
`answer` waits for its end. A failure is returned as an answer. Nothing here is collective:
training/checkpoint/saver.py makes the ranks agree.
"""

from __future__ import annotations

import json
import logging
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from landiff.training.checkpoint import writer
from landiff.training.checkpoint.files import error_line
from landiff.training.checkpoint.parts import StateFile, write_file
from landiff.training.checkpoint.staging import StagingBuffer, staged_bytes

log = logging.getLogger(__name__)


class Writer(Protocol):
    """Writes this rank's part of a checkpoint."""

    def begin_write(self, folder: Path, files: Sequence[StateFile]) -> None:
        """Write files into a folder. On return, the next step may change their tensors."""
        ...

    def begin_again(self, folder: Path) -> None:
        """Write the same files into another folder, after a failure."""
        ...

    def begin_commit(self, request: Mapping[str, Any]) -> None:
        """Commit a checkpoint: see `landiff.training.checkpoint.writer.commit`."""
        ...

    def busy(self) -> bool:
        """Whether a request is running."""
        ...

    def answer(self) -> dict[str, Any]:
        """The answer to the last request, once it is complete.

        entries: of the files that were written. warnings: of a commit. error: text of a failure.
        """
        ...


class InlineWriter:
    """Writes in this process, straight from the tensors."""

    def __init__(self) -> None:
        """Nothing is running."""
        self._files: Sequence[StateFile] = ()
        self._answer: dict[str, Any] = {}

    def begin_write(self, folder: Path, files: Sequence[StateFile]) -> None:
        """Write all files."""
        self._files = files
        self.begin_again(folder)

    def begin_again(self, folder: Path) -> None:
        """Write all files into another folder."""
        try:
            self._answer = {"entries": [self._write(folder, file) for file in self._files]}
        except OSError as error:
            self._answer = failed(error)

    def _write(self, folder: Path, file: StateFile) -> dict[str, Any]:
        if file.same_as is not None:
            writer.link_file(file.same_as.path, folder / file.path)
            digest = file.same_as.sha256
        else:
            digest = write_file(folder, file)
        return {"path": file.path, "bytes": file.num_bytes, "sha256": digest}

    def begin_commit(self, request: Mapping[str, Any]) -> None:
        """Commit."""
        self._files = ()
        try:
            self._answer = {"warnings": writer.commit(request)}
        except OSError as error:
            self._answer = failed(error)

    def busy(self) -> bool:
        """False: every request ends before it returns."""
        return False

    def answer(self) -> dict[str, Any]:
        """The last answer."""
        return self._answer


class BackgroundWriter:
    """Copies files into a staging buffer, from which another process writes them."""

    def __init__(self, device: torch.device) -> None:
        """`device`: of the tensors. Nothing is started before `prepare`."""
        self.device = device
        self.buffer: StagingBuffer | None = None
        self.process: subprocess.Popen | None = None
        self._connection: socket.socket | None = None
        self._running = False
        self._at_once = InlineWriter()
        self._staged: list[dict[str, Any]] | None = None  # None if nothing could be staged
        self._answer: dict[str, Any] = {}

    def prepare(self, files: Sequence[StateFile]) -> None:
        """Reserve the buffer for files of these sizes, and start the process. Raises OSError.

        Files that exist already need no room in it.
        """
        needed = staged_bytes([file for file in files if file.same_as is None])
        if self.buffer is not None and self.buffer.size < needed:
            self.close()
        if self.buffer is None:
            self.buffer = StagingBuffer(needed, self.device)
        if self.process is None:
            self._start(self.buffer)

    def _start(self, buffer: StagingBuffer) -> None:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(buffer.fd), str(buffer.size)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", writer.__name__, *arguments],
                pass_fds=(theirs.fileno(), buffer.fd),
            )
        self._connection = ours

    def begin_write(self, folder: Path, files: Sequence[StateFile]) -> None:
        """Copy files into the buffer, and let the process write them.

        If there is no memory for the buffer, they are written at once.
        """
        try:
            self.prepare(files)
            assert self.buffer is not None
            linked = [_linked(file) for file in files if file.same_as is not None]
            written = [file for file in files if file.same_as is None]
            self._staged = linked + self.buffer.stage(written)
        except OSError as error:
            log.warning(
                "no memory for the staging buffer of checkpoints (%s): this one is written at "
                "once; loop.async_save=false does so always",
                error,
            )
            self._staged = None
            self._at_once.begin_write(folder, files)
            self._answer = self._at_once.answer()
            return
        self.begin_again(folder)

    def begin_again(self, folder: Path) -> None:
        """Let the process write the files that are in the buffer; if it has died, a new one."""
        if self._staged is None:
            return  # the tensors have changed, so that the failure stands
        assert self.buffer is not None
        if self.process is None:
            self._start(self.buffer)
        self._send({"kind": "write", "folder": str(folder), "files": self._staged})

    def begin_commit(self, request: Mapping[str, Any]) -> None:
        """Let the process commit."""
        if self._staged is None:
            self._at_once.begin_commit(request)
            self._answer = self._at_once.answer()
            return
        self._send({"kind": "commit", **request})

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._connection is not None and not self._running, request["kind"]
        self._running = True
        with suppress(OSError):  # the process has died, which `answer` reports
            self._connection.sendall(json.dumps(request).encode() + b"\n")

    def busy(self) -> bool:
        """Whether the process works on a request."""
        if not self._running:
            return False
        assert self._connection is not None
        return not select.select([self._connection], [], [], 0)[0]

    def answer(self) -> dict[str, Any]:
        """The answer to the last request. Waits for it; the death of the process is a failure."""
        if self._running:
            self._running = False
            self._answer = self._receive()
        return self._answer

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        received = b""
        while not received.endswith(b"\n"):
            try:
                block = self._connection.recv(1 << 20)
            except OSError:
                block = b""
            if not block:
                return {"error": self._death()}
            received += block
        return json.loads(received)

    def _death(self) -> str:
        """How the process ended. It is forgotten, so that the next request starts another."""
        assert self.process is not None
        code = self.process.wait()
        self._disconnect()
        text = f"the process that writes checkpoints ended with exit code {code}"
        if code == -signal.SIGKILL:
            text = (
                "the process that writes checkpoints was killed; if memory is short, "
                "loop.async_save=false needs less"
            )
        return text

    def _disconnect(self) -> None:
        """Let the process end, after its request."""
        if self._connection is not None:
            self._connection.close()
        if self.process is not None:
            self.process.wait()
        self._connection = None
        self.process = None
        self._running = False

    def close(self) -> None:
        """End the process and return the memory."""
        self._disconnect()
        if self.buffer is not None:
            self.buffer.close()
        self.buffer = None


def _linked(file: StateFile) -> dict[str, Any]:
    """The request for a file that exists already."""
    assert file.same_as is not None
    same = file.same_as
    return {
        "path": file.path,
        "bytes": file.num_bytes,
        "same_as": str(same.path),
        "sha256": same.sha256,
    }


def failed(error: OSError) -> dict[str, Any]:
    """The answer to a request that failed."""
    log.warning("saving failed", exc_info=error)
    return {"error": error_line(error)}
