"""A decoder in a child process, as seen from its parent: starts it, sends requests, replaces it."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np

from landiff.configs.paths import IMPORT_ROOT
from landiff.data_pipeline.video.protocol import (
    DecodeFailure,
    DecodeRequest,
    DecodeResponse,
    receive,
    send,
)

Backend = Literal["pyav", "decord"]
START_TIMEOUT_S = 60.0
# failures that earlier requests of the same child may have caused
RETRIED_FAILURES = frozenset(("decoder_died", "out_of_memory"))
MAX_SPARE = 4  # shared memory files kept for reuse


class SharedMemory:
    """Memory files that children write and this process reads.

    A file is reused once no array refers to it.
    """

    def __init__(self) -> None:
        self._spare: deque[int] = deque()
        self._max_spare = MAX_SPARE

    def take(self) -> int:
        """Return the file descriptor of an unused memory file."""
        try:
            return self._spare.pop()
        except IndexError:
            return os.memfd_create("landiff-frames")

    def give_back(self, fd: int) -> None:
        """Keep a memory file for reuse, or close it."""
        if len(self._spare) < self._max_spare:
            self._spare.append(fd)
        else:
            os.close(fd)

    def frames(self, fd: int, shape: Sequence[int]) -> np.ndarray:
        """View a file as a uint8 array. The file is given back when its last view is deleted."""
        memory = mmap.mmap(fd, int(np.prod(shape)))
        weakref.finalize(memory, self.give_back, fd).atexit = False
        return np.frombuffer(memory, np.uint8).reshape(shape)

    def close(self) -> None:
        """Close unused files now, and the others once they are given back."""
        self._max_spare = 0
        while self._spare:
            os.close(self._spare.pop())


class DecoderProcess:
    """A long-lived child process that decodes.

    The child is replaced when it dies, when it exceeds `timeout_s`, and after `recycle` requests,
    but not within a group of requests. If a child that has answered other requests dies or runs out
    of memory, a new child answers the request again, so that the answer depends on the file alone.
    The child ends with its parent. Not thread-safe.
    """

    def __init__(
        self, backend: Backend, *, timeout_s: float, memory_limit: int, recycle: int
    ) -> None:
        self.backend = backend
        self.timeout_s = timeout_s
        self.memory_limit = memory_limit
        self.recycle = recycle
        self.starts = 0  # children started so far
        self.cpu_s = 0.0  # CPU time of all answers
        self.shared = SharedMemory()
        self._served = 0  # requests sent to the current child
        self._group = 0  # of the last request
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._input = os.memfd_create("landiff-video")

    @property
    def pid(self) -> int | None:
        """Process ID of the child, None if none is running."""
        return self._child.pid if self._child else None

    def close(self) -> None:
        """Stop the child and free unused shared memory."""
        self._stop()
        self.shared.close()
        if self._input >= 0:
            os.close(self._input)
        self._input = -1

    def put(self, video: bytes) -> None:
        """Store the bytes of a video. The next request without a path is about them."""
        os.ftruncate(self._input, len(video))
        view = memoryview(video)
        written = 0
        while written < len(video):
            written += os.pwrite(self._input, view[written:], written)

    def ask(self, request: DecodeRequest) -> tuple[DecodeResponse, np.ndarray | None]:
        """Return the answer to a request and its frames, uint8 of `DecodeResponse.shape`."""
        memory = self.shared.take()
        try:
            response = self._ask(request, memory)
            if self._served > 1 and _may_succeed_in_new_child(response):
                self._stop()
                response = self._ask(request, memory)
        except BaseException:
            self.shared.give_back(memory)
            raise
        self.cpu_s += response.cpu_s
        if response.shape and 0 not in response.shape:
            return response, self.shared.frames(memory, response.shape)
        self.shared.give_back(memory)
        return response, None

    def _ask(self, request: DecodeRequest, memory: int) -> DecodeResponse:
        """Send a request to the child and wait for its answer."""
        child, connection = self._child_for(request)
        self._served += 1
        self._group = request.group
        try:
            connection.settimeout(self.timeout_s)
            send(connection, asdict(request), (memory,))
            message, _ = receive(connection, time.monotonic() + self.timeout_s)
        except TimeoutError:
            self._stop()
            failure = DecodeFailure("timeout", f"more than {self.timeout_s:g} s")
            return DecodeResponse(failure=failure)
        except (EOFError, ConnectionError):
            code = child.wait()
            self._stop()
            detail = signal.Signals(-code).name if code < 0 else f"exit {code}"
            return DecodeResponse(failure=DecodeFailure("decoder_died", detail))
        return DecodeResponse.from_json(message)

    def _child_for(self, request: DecodeRequest) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Return the child that answers a request, started or replaced if necessary."""
        # A child is not replaced within a group: a new one would seek to the place, and notice
        # less of the damage before it.
        in_group = request.path and request.group == self._group
        if self._served >= self.recycle and not in_group:
            self._stop()
        if self._child is None:
            self._start()
        assert self._child is not None and self._connection is not None
        return self._child, self._connection

    def _start(self) -> None:
        """Start a child and wait until it is ready."""
        ours, theirs = socket.socketpair()
        arguments = (os.getpid(), self.memory_limit, theirs.fileno(), self._input)
        # IMPORT_ROOT is last in sys.path, so that no module of the project shadows a package. With
        # -P, none of the working directory does either.
        add_path = f"import sys; sys.path.append({str(IMPORT_ROOT)!r})"
        module = f"landiff.data_pipeline.video.{self.backend}_child"
        code = f"{add_path}; from {module} import main; main{arguments}"
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # libraries print to it
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), self._input),
        )
        theirs.close()
        self._connection = ours
        self._served = 0
        self.starts += 1
        try:
            receive(ours, time.monotonic() + START_TIMEOUT_S)
        except (EOFError, ConnectionError, TimeoutError):
            self._stop()
            raise RuntimeError(
                "the decoder process does not start; to see the error, run: "
                f"{sys.executable} -P -c '{add_path}; import {module}'"
            ) from None

    def _stop(self) -> None:
        """Kill the child, if one is running."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        if self._connection is not None:
            self._connection.close()
        self._child = None
        self._connection = None


def _may_succeed_in_new_child(response: DecodeResponse) -> bool:
    """Whether a failure may be due to earlier requests of the same child."""
    failures = [response.failure, *response.spans]
    return any(failure is not None and failure.reason in RETRIED_FAILURES for failure in failures)
