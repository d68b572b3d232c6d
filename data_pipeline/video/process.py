"""A decoder in a child process, as its parent sees it: started, asked, replaced when it dies or hangs."""

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
AGE = frozenset(("decoder_died", "out_of_memory"))  # may be due to what came before
MOST_SPARE = 4  # shared memories that wait for their next use


class SharedMemory:
    """Memory files that children write and this process reads, used again when nobody holds their frames any more."""

    def __init__(self) -> None:
        self._spare: deque[int] = deque()
        self._room = MOST_SPARE

    def take(self) -> int:
        try:
            return self._spare.pop()
        except IndexError:
            return os.memfd_create("landiff-frames")

    def give_back(self, fd: int) -> None:
        if len(self._spare) < self._room:
            self._spare.append(fd)
        else:
            os.close(fd)

    def frames(self, fd: int, shape: Sequence[int]) -> np.ndarray:
        """The file as uint8 of this shape; it is given back when the last view of the array is gone."""
        memory = mmap.mmap(fd, int(np.prod(shape)))
        weakref.finalize(memory, self.give_back, fd).atexit = False
        return np.frombuffer(memory, np.uint8).reshape(shape)

    def close(self) -> None:
        self._room = 0
        while self._spare:
            os.close(self._spare.pop())


class DecoderProcess:
    """One long-lived child that decodes.

    It is replaced when it dies, exceeds `timeout_s`, and every `recycle` requests, between groups. What an old child died of, or
    had no memory for, is asked of a new one: so the answer is the file's, and not what other files left behind. It
    ends with its parent. Not for use by two threads at once.
    """

    def __init__(
        self, backend: Backend, *, timeout_s: float, memory_limit: int, recycle: int
    ) -> None:
        self.backend, self.timeout_s, self.memory_limit, self.recycle = (
            backend,
            timeout_s,
            memory_limit,
            recycle,
        )
        self.starts = 0  # children started so far
        self.cpu_s = 0.0  # processor time of all answers
        self.shared = SharedMemory()
        self._served = 0  # requests of this child
        self._group = 0  # of the last request
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._input = os.memfd_create("landiff-video")

    @property
    def pid(self) -> int | None:
        """Of the child, where one runs."""
        return self._child.pid if self._child else None

    def close(self) -> None:
        """End the child and free the shared memory that nobody holds."""
        self._stop()
        self.shared.close()
        if self._input >= 0:
            os.close(self._input)
        self._input = -1

    def put(self, video: bytes) -> None:
        """The bytes that the next request without a path is about."""
        os.ftruncate(self._input, len(video))
        view = memoryview(video)
        written = 0
        while written < len(video):
            written += os.pwrite(self._input, view[written:], written)

    def ask(self, request: DecodeRequest) -> tuple[DecodeResponse, np.ndarray | None]:
        """The answer, and the frames that belong to it: uint8 of `DecodeResponse.shape`."""
        memory = self.shared.take()
        try:
            response = self._ask(request, memory)
            if self._served > 1 and any(
                failure and failure.reason in AGE for failure in (response.failure, *response.spans)
            ):
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
        # not within a group: a new child would look for the place, and see less of the damage before it
        goes_on = request.path and request.group == self._group
        if self._child is None or (self._served >= self.recycle and not goes_on):
            self._stop()
            self._start()
        self._served += 1
        self._group = request.group
        try:
            self._connection.settimeout(self.timeout_s)
            send(self._connection, asdict(request), (memory,))
            message, _ = receive(self._connection, time.monotonic() + self.timeout_s)
        except TimeoutError:
            self._stop()
            return DecodeResponse(
                failure=DecodeFailure("timeout", f"more than {self.timeout_s:g} s")
            )
        except (EOFError, ConnectionError):
            code = self._child.wait()
            self._stop()
            return DecodeResponse(
                failure=DecodeFailure(
                    "decoder_died", signal.Signals(-code).name if code < 0 else f"exit {code}"
                )
            )
        return DecodeResponse.from_json(message)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        numbers = (os.getpid(), self.memory_limit, theirs.fileno(), self._input)
        # the root comes last, so that nothing of the project shadows a package; -P: nor does the working folder
        module = f"landiff.data_pipeline.video.{self.backend}_child"
        code = f"import sys; sys.path.append({str(IMPORT_ROOT)!r}); from {module} import main; main{numbers}"
        command = [sys.executable, "-P", "-c", code]
        # what a library prints goes nowhere
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), self._input),
        )
        theirs.close()
        self._connection, self._served = ours, 0
        self.starts += 1
        try:
            receive(ours, time.monotonic() + START_TIMEOUT_S)
        except (EOFError, ConnectionError, TimeoutError):
            self._stop()
            raise RuntimeError(
                f"the decoder process does not start; to see why, run: {sys.executable} -P -c "
                f"'import sys; sys.path.append({str(IMPORT_ROOT)!r}); import {module}'"
            ) from None

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            self._connection.close()
