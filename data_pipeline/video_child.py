"""The process that opens foreign videos: whatever a file does to a decoder, it happens here.

`data_pipeline.video.SafeDecoder` starts this file as a script. It imports av, numpy and the standard library
alone, so that it starts in a fraction of a second. Protocol: one JSON line in (`Request`), one JSON line out
(`Response`), frames through a shared memory file, video bytes through a second one when they have no path.

Which frame: the one that is shown at the wanted time, i.e. the last frame whose timestamp is not later than
it. All frames from the first to the last wanted one are decoded in order, because that is exact for every
container (open GOP, variable frame rate, edit lists, MPEG-TS); seeking is not.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import mmap
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import av
import numpy as np

# What PyAV raises on damaged files besides its own errors (measured on mutated files). Anything else ends
# this process, and the parent reports `decoder_died`.
DECODER_ERRORS = (av.error.FFmpegError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError,
                  OSError, TypeError, ValueError)
TRANSPOSE = {90: ("cclock",), 180: ("clock", "clock"), 270: ("clock",)}
LARGEST_CLOCK_ERROR_S = 1e-3


@dataclass(frozen=True)
class Request:
    """One video and the spans wanted from it; no `starts_s` means: only look (`VideoInfo`)."""

    path: str = ""  # "": the bytes lie in the shared input file
    offset: int = 0  # first byte of the video inside the file
    size: int = -1  # bytes; -1: up to the end of the file
    starts_s: tuple[float, ...] = ()  # where spans start, counted from the first frame
    num_frames: int = 0  # of each span
    fps: float = 0.0
    height: int = 0
    width: int = 0
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


@dataclass(frozen=True)
class Failure:
    """Why there are no frames: a short code that can be counted, and the detail."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Response:
    failure: Failure | None = None  # of the whole file
    info: VideoInfo | None = None
    spans: tuple[Failure | None, ...] = field(default=())  # None: its frames lie in the shared memory


class Refused(ValueError):
    """A video that is understood and not wanted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.failure = Failure(reason, detail)


class _Range(io.RawIOBase):
    """The bytes [offset, offset + size) of a file, as a file."""

    def __init__(self, file: io.RawIOBase, offset: int, size: int) -> None:
        self.file, self.offset = file, offset
        self.size = size if size >= 0 else file.seek(0, os.SEEK_END) - offset
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        count = left if count < 0 else min(count, left)
        self.file.seek(self.offset + self.position)
        data = self.file.read(count) or b""
        self.position += len(data)
        return data


@dataclass
class Picture:
    """Frames -> RGB of one size: rotated, scaled to cover and centre-cropped in one colour-correct swscale pass."""

    stream: av.video.stream.VideoStream
    height: int
    width: int
    max_pixels: int
    key: tuple = ()
    graph: av.filter.Graph | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """-> uint8 [height, width, 3]."""
        rotation = round(frame.rotation) % 360
        key = (frame.width, frame.height, frame.format.name, rotation, int(frame.colorspace), int(frame.color_range))
        if key != self.key:
            if frame.width * frame.height > self.max_pixels:
                raise Refused("too_large", f"{frame.width}x{frame.height}")
            self.graph, self.key = self._build(frame, TRANSPOSE.get(rotation, ())), key
        self.graph.push(frame)
        return self.graph.pull().to_ndarray()

    def _build(self, frame: av.VideoFrame, turns: tuple[str, ...]) -> av.filter.Graph:
        aspect = float(self.stream.codec_context.sample_aspect_ratio or 1) or 1.0
        shown = (frame.height, frame.width * aspect)
        if len(turns) == 1:
            shown = shown[::-1]
        factor = max(self.height / shown[0], self.width / shown[1])
        height, width = max(self.height, round(shown[0] * factor)), max(self.width, round(shown[1] * factor))
        flags = "area" if factor <= 1 else "bicubic"
        graph = av.filter.Graph()
        chain = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=self.stream.time_base)]
        chain += [graph.add("transpose", turn) for turn in turns]
        chain += [
            graph.add("scale", f"{width}:{height}:flags={flags}+accurate_rnd+full_chroma_int+bitexact{_color(frame)}"),
            graph.add("format", "rgb24"),
            graph.add("crop", f"{self.width}:{self.height}"),
            graph.add("buffersink"),
        ]
        for before, after in itertools.pairwise(chain):
            before.link_to(after)
        graph.configure()
        return graph


def _color(frame: av.VideoFrame) -> str:
    """Scale options that name the matrix when the file doesn't: BT.709 from HD on, as players assume."""
    unspecified = int(frame.colorspace) == 2
    high_definition = frame.width >= 1280 or frame.height > 576
    return ":in_color_matrix=bt709" if unspecified and high_definition else ""


def open_video(file: io.RawIOBase, max_pixels: int) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
    """The container and its first real video stream. Raises Refused, or one of DECODER_ERRORS."""
    # No protocol may be opened from inside a file: playlists would read other files and the network.
    container = av.open(file, mode="r", container_options={"protocol_whitelist": "none"}, metadata_errors="replace")
    if not container.streams.video:
        raise Refused("no_video_stream")
    pictures = av.stream.Disposition.attached_pic
    stream = next((s for s in container.streams.video if not s.disposition & pictures), None)
    if stream is None:
        raise Refused("cover_art_only")
    context = stream.codec_context
    if context is None:
        raise Refused("unknown_codec")
    if context.width <= 0 or context.height <= 0:
        raise Refused("no_dimensions")
    if context.width * context.height > max_pixels:
        raise Refused("too_large", f"{context.width}x{context.height}")
    context.thread_count = 1  # frame threads would blur where damage begins
    stream.thread_type = "NONE"
    return container, stream


def probe(file: io.RawIOBase, max_pixels: int) -> VideoInfo:
    """Look at a video without decoding it."""
    container, stream = open_video(file, max_pixels)
    with container:
        context, base = stream.codec_context, stream.time_base
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        first = last = None
        for packet in container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None or packet.is_discard:
                continue
            end = stamp + (packet.duration or (1 / (rate * base) if rate else 0))
            first = stamp if first is None else min(first, stamp)
            last = end if last is None else max(last, end)
        duration = float((last - first) * base) if first is not None else 0.0
        return VideoInfo(context.width, context.height, rate, context.name, duration)


def timed_frames(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> Iterator[tuple[float, av.VideoFrame | None]]:
    """(seconds since the first frame, frame) in order; ends with (end of the last frame, None)."""
    length = 1 / float(stream.average_rate or stream.guessed_rate or 24)
    origin = now = None
    for frame in container.decode(stream):
        stamp = float(frame.pts * stream.time_base) if frame.pts is not None else None
        if origin is None:
            origin, now = stamp or 0.0, 0.0
        elif stamp is None or stamp - origin <= now:  # no clock, or one that runs backwards: count frames
            now += length
        else:
            now = stamp - origin
        if frame.duration:
            length = float(frame.duration * stream.time_base)
        yield now, frame
    if now is not None:
        yield now + length, None


def decode(file: io.RawIOBase, request: Request, out: np.ndarray) -> tuple[Failure | None, ...]:
    """Fill `out` (uint8 [spans, num_frames, height, width, 3]); -> None or a Failure for each span."""
    container, stream = open_video(file, request.max_pixels)
    with container:
        # timestamps are rounded to ticks: a frame that is at most half a tick late counts as shown
        tolerance = min(float(stream.time_base) / 2, LARGEST_CLOCK_ERROR_S) + 1e-6
        targets = sorted((start + k / request.fps, span, k)
                         for span, start in enumerate(request.starts_s) for k in range(request.num_frames))
        missing = [request.num_frames] * len(request.starts_s)
        picture = Picture(stream, request.height, request.width, request.max_pixels)
        shown: av.VideoFrame | None = None
        pixels: np.ndarray | None = None
        done, reason, detail = 0, "too_short", ""
        try:
            for index, (now, frame) in enumerate(timed_frames(container, stream)):
                while done < len(targets) and shown is not None and now > targets[done][0] + tolerance:
                    pixels = picture(shown) if pixels is None else pixels
                    _, span, place = targets[done]
                    out[span, place] = pixels
                    missing[span] -= 1
                    done += 1
                if done == len(targets):
                    break
                if frame is None:
                    detail = f"ends after {now:.3f} s"
                elif frame.is_corrupt:  # libavcodec conceals damage; this flag is its only trace
                    reason, detail = "corrupt_frame", f"frame {index} at {now:.3f} s"
                    break
                shown, pixels = frame, None
        except DECODER_ERRORS as error:  # spans that are complete stay good
            failure = failure_of(error)
            reason, detail = failure.reason, failure.detail
    return tuple(None if left == 0 else Failure(reason, detail) for left in missing)


def answer(request: Request, input_fd: int, output_fd: int) -> Response:
    """Do one request; every way in which a file can be bad becomes a Failure."""
    try:
        with open(request.path or os.dup(input_fd), "rb", buffering=0) as raw:
            file = _Range(raw, request.offset, request.size)
            if not request.starts_s:
                return Response(info=probe(file, request.max_pixels))
            shape = (len(request.starts_s), request.num_frames, request.height, request.width, 3)
            out = np.frombuffer(mmap.mmap(output_fd, math.prod(shape)), np.uint8).reshape(shape)
            return Response(spans=decode(file, request, out))
    except FileNotFoundError:
        return Response(failure=Failure("missing_file", request.path))
    except PermissionError:
        return Response(failure=Failure("unreadable_file", request.path))
    except DECODER_ERRORS as error:
        return Response(failure=failure_of(error))


def failure_of(error: BaseException) -> Failure:
    """The short code of what a decoder raised."""
    if isinstance(error, Refused):
        return error.failure
    codes = {MemoryError: "out_of_memory", EOFError: "truncated", av.error.InvalidDataError: "invalid_data"}
    reason = next((code for kind, code in codes.items() if isinstance(error, kind)), "undecodable")
    return Failure(reason, " ".join(f"{type(error).__name__}: {error}".split())[:160])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(parent: int, memory_limit: int, input_fd: int, output_fd: int) -> None:
    """Serve requests from stdin until it closes or the parent is gone."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not answer for us
    av.logging.set_level(None)
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_limit, mapped + memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = Request(**json.loads(line))
        signal.alarm(math.ceil(request.timeout_s) + 5)  # kills a hung decoder even when nobody is left to do it
        response = answer(request, input_fd, output_fd)
        signal.alarm(0)
        print(json.dumps(asdict(response)), file=replies, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
