"""How a process asks another one for frames, and what the other one does to be harmless.

A decoder may crash, hang or eat memory, whatever is told about its input. So each works in a child process
(`landiff.data_pipeline.video.process` starts it), which serves one request after the other: a JSON message in
(`DecodeRequest`), a JSON message out (`DecodeResponse`), over a pair of sockets. The bytes of a video that has no path lie
in a shared memory file; frames come back in another one, which travels with the request. Imports numpy and the
standard library alone: children start in a fraction of a second.
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
from dataclasses import asdict, dataclass, field, replace

import numpy as np

HEADER = struct.Struct("<Q")  # bytes of the message that follows
GRACE_S = 5  # beyond the time limit: then the child ends by itself


@dataclass(frozen=True)
class DecodeRequest:
    """One video and what is wanted from it.

    "probe": a look; "decode": spans of frames by time; "scan": small pictures of all frames; "clip": all frames.
    """

    kind: str = "probe"
    path: str = ""  # "": the bytes lie in the shared input file
    offset: int = 0  # first byte of the video inside the file
    size: int = -1  # bytes; -1: up to the end of the file
    starts_s: tuple[float, ...] = ()  # where spans start, counted from the first frame
    num_frames: int = 0  # of each span
    fps: float = 0.0
    height: int = 0
    width: int = 0
    crop: tuple[float, float, float, float] = (
        0.0,
        0.0,
        0.0,
        0.0,
    )  # share of the shown picture to cut off: left, top, right, bottom
    first: int = 0  # scan: number of the first frame
    count: int = 0  # scan: frames at most
    keyframes: bool = False  # scan: key frames only
    hdr: str = "convert"  # or "reject": what happens to HDR and wide-gamut video
    interlaced: str = "convert"  # or "reject"
    group: int = 0  # requests of one group go on in a file where the one before ended
    max_pixels: int = 4096 * 2304
    timeout_s: float = 60.0


@dataclass(frozen=True)
class VideoInfo:
    """What the container says, but `duration_s`, which is counted from the packets (containers lie)."""

    width: int
    height: int
    fps: float
    codec: str
    duration_s: float
    aspect: float = 0.0  # width / height as shown: turned, pixels square
    conversions: tuple[str, ...] = ()  # that its first frame needs: "smpte2084/bt2020", "bwdif"


@dataclass(frozen=True)
class DecodeFailure:
    """Why there are no frames: a short code that can be counted, and the detail."""

    reason: str
    detail: str = ""


class Refused(ValueError):
    """A video that is understood and not wanted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.failure = DecodeFailure(reason, detail)


@dataclass(frozen=True)
class DecodeResponse:
    failure: DecodeFailure | None = None  # of the whole file
    info: VideoInfo | None = None
    spans: tuple[DecodeFailure | None, ...] = field(
        default=()
    )  # decode; None: its frames lie in the shared memory
    conversions: tuple[tuple[str, ...], ...] = ()  # decode: those that each span went through
    times: tuple[float, ...] = ()  # scan: when the frames in the shared memory are shown
    shape: tuple[int, ...] = ()  # of the frames in the shared memory
    ended: bool = False  # scan: these were the last
    cpu_s: float = 0.0  # processor time that the answer took

    @classmethod
    def from_json(cls, plain: dict) -> DecodeResponse:
        info = plain["info"]
        if info:
            info = VideoInfo(**info | {"conversions": tuple(info["conversions"])})
        return cls(
            **plain
            | {
                "failure": plain["failure"] and DecodeFailure(**plain["failure"]),
                "info": info,
                "spans": tuple(failure and DecodeFailure(**failure) for failure in plain["spans"]),
                "conversions": tuple(map(tuple, plain["conversions"])),
                "times": tuple(plain["times"]),
                "shape": tuple(plain["shape"]),
            }
        )


# --------------------------------------------------------------------------------------------------- messages


def send(connection: socket.socket, message: dict, fds: tuple[int, ...] = ()) -> None:
    data = json.dumps(message).encode()
    socket.send_fds(connection, [HEADER.pack(len(data))], fds)
    connection.sendall(data)


def receive(connection: socket.socket, until: float | None = None) -> tuple[dict, list[int]]:
    """A message and the files that came with it. Raises EOFError at the end, TimeoutError when the clock shows `until`."""
    _wait_until(connection, until)
    header, fds, _, _ = socket.recv_fds(connection, HEADER.size, 1)
    data = b""
    left = HEADER.size - len(header)
    if header and not left:
        left = HEADER.unpack(header)[0]
        while left and (part := _part(connection, left, until)):
            data += part
            left -= len(part)
    if left or not header:
        for fd in fds:
            os.close(fd)
        raise EOFError
    return json.loads(data), fds


def _part(connection: socket.socket, size: int, until: float | None) -> bytes:
    _wait_until(connection, until)
    return connection.recv(size)


def _wait_until(connection: socket.socket, until: float | None) -> None:
    if until is not None:
        connection.settimeout(max(1e-3, until - time.monotonic()))


# -------------------------------------------------------------------------------------------------- the child


class Output:
    """The shared memory that a request brought along."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 of this shape, for the parent to see. Raises MemoryError."""
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
    """Answer requests until the connection closes or the process `parent` is gone; no call takes more memory or time."""
    watching = threading.Event()
    threading.Thread(target=_end_with, args=(parent, watching), daemon=True).start()
    watching.wait()  # a new thread maps memory of its own, twice as much as it keeps
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_limit, mapped + memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # shared memory counts as a file
    connection = socket.socket(fileno=connection_fd)
    send(connection, {})
    while True:
        try:
            message, fds = receive(connection)
        except EOFError:
            return
        request = DecodeRequest(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in message.items()
            }
        )
        began = time.process_time()
        signal.alarm(
            math.ceil(request.timeout_s) + GRACE_S
        )  # kills a hung decoder even when nobody is left to do it
        response = answer(request, Output(fds[0]))
        signal.alarm(0)
        for fd in fds:
            os.close(fd)
        send(connection, asdict(replace(response, cpu_s=time.process_time() - began)))


def _end_with(parent: int, watching: threading.Event) -> None:
    watching.set()
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
