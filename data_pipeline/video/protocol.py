"""Protocol between a process and its decoder process, and the server loop of the latter.

A decoder may crash, hang or exhaust memory, whatever its input claims to be. So each decoder runs
in a child process (started by `landiff.data_pipeline.video.process`), which answers one request
after the other: a JSON message in (`DecodeRequest`), a JSON message out (`DecodeResponse`), over a
socket pair. The bytes of a video without a path lie in a shared memory file. Frames are returned in
another one, whose file descriptor is sent with the request.

Imports only numpy and the standard library, so that child processes start in a fraction of a
second.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

HEADER = struct.Struct("<Q")  # size in bytes of the message that follows
GRACE_S = 5  # after the time limit, before the child ends itself
NO_CROP = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class DecodeRequest:
    """A request about one video.

    `kind` is one of:
        probe: size, rate and duration, without frames
        decode: spans of frames by time
        scan: small pictures of all frames
        clip: all frames
    """

    kind: str = "probe"
    path: str = ""  # "": the bytes lie in the shared input file
    offset: int = 0  # first byte of the video in the file
    size: int = -1  # bytes; -1: up to the end of the file
    starts_s: tuple[float, ...] = ()  # start times of the spans, relative to the first frame
    num_frames: int = 0  # of each span
    fps: float = 0.0
    height: int = 0
    width: int = 0
    crop: tuple[float, float, float, float] = NO_CROP  # fractions cut off: left, top, right, bottom
    first: int = 0  # scan: index of the first frame
    count: int = 0  # scan: maximum number of frames
    keyframes: bool = False  # scan: key frames only
    hdr: str = "convert"  # or "reject": handling of HDR and wide-gamut video
    interlaced: str = "convert"  # or "reject"
    group: int = 0  # requests of one group continue in a file where the previous one ended
    max_pixels: int = 4096 * 2304
    timeout_s: float = 60.0

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> DecodeRequest:
        """Build a request from its JSON message, in which tuples are lists."""
        values = dict(message)
        for name, value in message.items():
            if isinstance(value, list):
                values[name] = tuple(value)
        return cls(**values)


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video according to its container.

    `duration_s` is computed from the packets, because containers are often wrong about it.
    """

    width: int
    height: int
    fps: float
    codec: str
    duration_s: float
    aspect: float = 0.0  # width / height as displayed: rotated, with square pixels
    conversions: tuple[str, ...] = ()  # needed by the first frame: "smpte2084/bt2020", "bwdif"
    is_image: bool = False  # it has one frame
    missing_s: float = 0.0  # that the container promises beyond the last packet


@dataclass(frozen=True)
class DecodeFailure:
    """Why there are no frames."""

    reason: str  # short code; failures are counted by it
    detail: str = ""


class Refused(ValueError):
    """A video that can be decoded but is not accepted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.failure = DecodeFailure(reason, detail)


@dataclass(frozen=True)
class DecodeResponse:
    """The answer to a request. Its frames lie in the shared memory of the request."""

    failure: DecodeFailure | None = None  # of the whole file
    info: VideoInfo | None = None  # probe
    spans: tuple[DecodeFailure | None, ...] = ()  # decode: None where there are frames
    conversions: tuple[tuple[str, ...], ...] = ()  # decode: applied to each span
    times: tuple[float, ...] = ()  # scan: display times of the frames
    shape: tuple[int, ...] = ()  # of the frames in shared memory
    ended: bool = False  # scan: whether these are the last frames
    cpu_s: float = 0.0  # CPU time of the answer

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> DecodeResponse:
        """Build a response from its JSON message."""
        info = message["info"]
        if info:
            info = VideoInfo(**{**info, "conversions": tuple(info["conversions"])})
        values = {
            **message,
            "failure": _failure_from_json(message["failure"]),
            "info": info,
            "spans": tuple(_failure_from_json(failure) for failure in message["spans"]),
            "conversions": tuple(tuple(names) for names in message["conversions"]),
            "times": tuple(message["times"]),
            "shape": tuple(message["shape"]),
        }
        return cls(**values)


def _failure_from_json(message: dict[str, str] | None) -> DecodeFailure | None:
    """Build a failure from its JSON message."""
    return DecodeFailure(**message) if message else None


# --------------------------------------------------------------------------------------- messages


def send(connection: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send a JSON message, with open files."""
    data = json.dumps(message).encode()
    socket.send_fds(connection, [HEADER.pack(len(data))], fds)
    connection.sendall(data)


def receive(
    connection: socket.socket, deadline: float | None = None
) -> tuple[dict[str, Any], list[int]]:
    """Receive a JSON message and the open files that were sent with it.

    `deadline` is a time of `time.monotonic`. Raises EOFError if the connection is closed, and
    TimeoutError after the deadline.
    """
    _set_timeout(connection, deadline)
    header, fds, _, _ = socket.recv_fds(connection, HEADER.size, 1)
    data = b""
    complete = False
    if len(header) == HEADER.size:
        size = HEADER.unpack(header)[0]
        data = _receive_bytes(connection, size, deadline)
        complete = len(data) == size
    if not complete:
        for fd in fds:
            os.close(fd)
        raise EOFError
    return json.loads(data), fds


def _receive_bytes(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    """Receive `size` bytes, fewer if the connection is closed."""
    data = b""
    while len(data) < size:
        _set_timeout(connection, deadline)
        part = connection.recv(size - len(data))
        if not part:
            break
        data += part
    return data


def _set_timeout(connection: socket.socket, deadline: float | None) -> None:
    """Let the next call on the connection wait until the deadline at most."""
    if deadline is not None:
        connection.settimeout(max(1e-3, deadline - time.monotonic()))


# ------------------------------------------------------------------------------------ child process


class Output:
    """The shared memory that was sent with a request."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """Map a uint8 array of this shape that the parent can read. Raises MemoryError."""
        size = math.prod(shape)
        if os.fstat(self.fd).st_size < size:
            os.ftruncate(self.fd, size)
        if not size:
            return np.empty(shape, np.uint8)
        try:
            memory = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise MemoryError(f"{size} bytes of frames: {error.strerror}") from None
        return np.frombuffer(memory, np.uint8).reshape(shape)


def serve(
    answer: Callable[[DecodeRequest, Output], DecodeResponse],
    parent: int,
    memory_limit: int,
    connection_fd: int,
) -> None:
    """Answer requests until the connection closes or the process `parent` ends.

    A request may use at most `memory_limit` bytes beyond what the process uses now, and
    `DecodeRequest.timeout_s` seconds plus `GRACE_S`.
    """
    started = threading.Event()
    threading.Thread(target=_end_with_parent, args=(parent, started), daemon=True).start()
    started.wait()  # the new thread maps its memory before the limit is computed
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_limit, mapped + memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # shared memory counts as a file
    max_file_size = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    connection = socket.socket(fileno=connection_fd)
    send(connection, {})
    while True:
        try:
            message, fds = receive(connection)
        except EOFError:
            return
        request = DecodeRequest.from_json(message)
        began = time.process_time()
        # ends a hung decoder even if its parent is gone
        signal.alarm(math.ceil(request.timeout_s) + GRACE_S)
        response = answer(request, Output(fds[0]))
        signal.alarm(0)
        for fd in fds:
            os.close(fd)
        send(connection, asdict(replace(response, cpu_s=time.process_time() - began)))


def _end_with_parent(parent: int, started: threading.Event) -> None:
    """End this process once its parent has ended."""
    started.set()
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
