"""The process that opens foreign videos: whatever a file does to a decoder, it happens here.

`data_pipeline.video.SafeDecoder` starts this file as a script. It imports av, numpy and the standard library
alone, so that it starts in a fraction of a second. Protocol: one JSON line in (`Request`), one JSON line out
(`Response`), frames through a shared memory file, video bytes through a second one when they have no path.

Requests for later parts of the same video go on where the one before ended: a long video is decoded once.

Which frame: the one that is shown at the wanted time, i.e. the last frame whose timestamp is not later than
it. All frames from the first to the last wanted one are decoded in order, because that is exact for every
container (open GOP, variable frame rate, edit lists, MPEG-TS); seeking is not. Only in containers with a true
index, and only to some seconds before a far place, is a seek exact: it is checked where it arrived.
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
from av.video.frame import PictureType

# What PyAV raises on damaged files besides its own errors (measured on mutated files). Anything else ends
# this process, and the parent reports `decoder_died`.
DECODER_ERRORS = (av.error.FFmpegError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError,
                  OSError, TypeError, ValueError)
TRANSPOSE = {90: ("cclock",), 180: ("clock", "clock"), 270: ("clock",)}
LARGEST_CLOCK_ERROR_S = 1e-3
LOGGING_CODECS = frozenset(("hevc", "mjpeg", "vp8", "vp9", "av1", "libdav1d"))
REORDERED = 5  # frames between decoding and showing, at most, as encoders set it
MOST_B_FRAMES = 17  # in a row, of x264 and x265
SEEKABLE = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"))
SEEK_FROM_S = 30.0  # nearer places are decoded to
PREROLL_S = 10.0  # decoded before the place itself: what an open group of pictures lacks is long past
SCAN_SIDE = 256
SCAN_BYTES = SCAN_SIDE * SCAN_SIDE * 3  # of one picture of a scan, at most


@dataclass(frozen=True)
class Request:
    """One video and what is wanted from it: spans of frames, small pictures of all frames, or only a look."""

    kind: str = "probe"  # "probe", "decode", "scan"
    path: str = ""  # "": the bytes lie in the shared input file
    offset: int = 0  # first byte of the video inside the file
    size: int = -1  # bytes; -1: up to the end of the file
    starts_s: tuple[float, ...] = ()  # where spans start, counted from the first frame
    num_frames: int = 0  # of each span
    fps: float = 0.0
    height: int = 0
    width: int = 0
    crop: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # share of the shown picture to cut off: left, top, right, bottom
    first: int = 0  # scan: number of the first frame
    count: int = 0  # scan: frames at most
    keyframes: bool = False  # scan: key frames only
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


@dataclass(frozen=True)
class Failure:
    """Why there are no frames: a short code that can be counted, and the detail."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Response:
    failure: Failure | None = None  # of the whole file
    info: VideoInfo | None = None
    spans: tuple[Failure | None, ...] = field(default=())  # decode; None: its frames lie in the shared memory
    times: tuple[float, ...] = ()  # scan: when the frames in the shared memory are shown
    size: tuple[int, int] = (0, 0)  # scan: height and width of those frames
    ended: bool = False  # scan: these were the last


SAME_SESSION = ("kind", "path", "offset", "size", "fps", "height", "width", "crop", "keyframes", "max_pixels")


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
    crop: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
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
        height, width = (frame.width, frame.height) if len(turns) == 1 else (frame.height, frame.width)
        left, top, right, bottom = (math.ceil(share * side - 1e-6) for share, side in zip(self.crop, (width, height) * 2, strict=True))
        kept = (max(1, height - top - bottom), max(1, width - left - right))
        scale = pixel_aspect(self.stream, len(turns) == 1)
        shown = (kept[0] * scale[0], kept[1] * scale[1])
        factor = max(self.height / shown[0], self.width / shown[1])
        height, width = max(self.height, round(shown[0] * factor)), max(self.width, round(shown[1] * factor))
        flags = "area" if factor <= 1 else "bicubic"
        graph = av.filter.Graph()
        chain = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=self.stream.time_base)]
        chain += [graph.add("transpose", turn) for turn in turns]
        if any(self.crop):
            chain.append(graph.add("crop", f"{kept[1]}:{kept[0]}:{left}:{top}"))
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


def pixel_aspect(stream: av.video.stream.VideoStream, turned: bool) -> tuple[float, float]:
    """(height, width) of a pixel as shown, the other way round for a video that is turned by a quarter."""
    aspect = float(stream.codec_context.sample_aspect_ratio or 1) or 1.0
    return (aspect, 1.0) if turned else (1.0, aspect)


def shown_aspect(stream: av.video.stream.VideoStream, frame: av.VideoFrame) -> float:
    """Width / height of the picture as a player shows it."""
    turned = round(frame.rotation) % 180 == 90
    height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
    pixel = pixel_aspect(stream, turned)
    return width * pixel[1] / (height * pixel[0])


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
    context.options = {"max_pixels": str(max_pixels)}  # the picture may be larger than the container says
    context.thread_count = 1  # frame threads would blur where damage begins
    stream.thread_type = "NONE"
    return container, stream


def probe(file: io.RawIOBase, max_pixels: int) -> VideoInfo:
    """Look at a video; no more of it is decoded than shows which way up it is."""
    container, stream = open_video(file, max_pixels)
    with container:
        context, base = stream.codec_context, stream.time_base
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        aspect = context.width * pixel_aspect(stream, False)[1] / context.height
        first = last = picture = None
        for packet in container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None or packet.is_discard:
                continue
            end = stamp + (packet.duration or (1 / (rate * base) if rate else 0))
            first = stamp if first is None else min(first, stamp)
            last = end if last is None else max(last, end)
            if picture is None:
                picture = _first_picture(packet)
                aspect = shown_aspect(stream, picture) if picture else aspect
        duration = float((last - first) * base) if first is not None else 0.0
        return VideoInfo(context.width, context.height, rate, context.name, duration, aspect)


def _first_picture(packet: av.Packet) -> av.VideoFrame | bool | None:
    """A frame, None when more packets are needed, False when the packet is damaged: decoding will tell."""
    try:
        return next(iter(packet.decode()), None)
    except DECODER_ERRORS:
        return False


class SeekFailed(Exception):
    """A seek came out behind the wanted place."""


def timed_frames(container: av.container.InputContainer, stream: av.video.stream.VideoStream,
                 skip_to_s: float = 0.0) -> Iterator[tuple[float, av.VideoFrame | None]]:
    """(seconds since the first frame, frame) in order; ends with (end of the last frame, None).

    `skip_to_s`: leave out most of what comes before, but for the first frame. Raises SeekFailed.
    """
    length = 1 / float(stream.average_rate or stream.guessed_rate or 24)
    origin = now = None
    if skip_to_s > 0:
        first = next(iter(container.decode(stream)), None)
        if first is None or first.pts is None:
            raise SeekFailed
        origin, now = float(first.pts * stream.time_base), 0.0
        yield now, first
        try:
            container.seek(first.pts + int(skip_to_s / stream.time_base), stream=stream)
        except av.error.FFmpegError as error:
            raise SeekFailed from error
    landed = skip_to_s <= 0
    for frame in container.decode(stream):
        if not landed:
            landed = frame.pts is not None and float(frame.pts * stream.time_base) - origin <= skip_to_s
            if not landed:
                raise SeekFailed
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


def marked_frames(frames: Iterator[tuple[float, av.VideoFrame | None]], codec: str) -> Iterator[tuple[float, av.VideoFrame | None, bool]]:
    """The same with: whether the decoder noticed damage.

    libavcodec conceals damage. `is_corrupt` is its trace in H.264, MPEG-1, -2 and -4; other decoders leave none
    but a line in the log, when they notice at all (measured: benchmarks/damage.py).
    """
    doubted = 0
    while True:
        with av.logging.Capture(True) as lines:
            item = next(frames, None)
        if item is None:
            return
        if codec in LOGGING_CODECS and any(level <= av.logging.ERROR for level, _, _ in lines):
            doubted = REORDERED  # the line comes when a picture is decoded, the picture some frames later
        now, frame = item
        yield now, frame, frame is not None and (frame.is_corrupt or doubted > 0)
        doubted = max(0, doubted - 1)


def judged_frames(frames: Iterator[tuple[float, av.VideoFrame | None, bool]]) -> Iterator[tuple[float, av.VideoFrame | None, bool]]:
    """The same, with damage where it spreads to: everything after it, and the B-frames just before it.

    A key frame is no new beginning: of files with damage that was noticed, one in four has more that was not.
    """
    group: list[tuple[float, av.VideoFrame | None]] = []
    suspect = False
    for now, frame, corrupt in frames:
        group.append((now, frame))
        suspect = suspect or corrupt
        if frame is None or frame.pict_type != PictureType.B or len(group) == MOST_B_FRAMES:
            yield from ((when, member, suspect) for when, member in group)
            group = []


class Session:
    """One video, open at one place."""

    def __init__(self, raw: io.RawIOBase, request: Request) -> None:
        self.raw = raw
        self.request = request
        self.failure: Failure | None = None  # of everything from here on
        self.shown: tuple[float, av.VideoFrame | None, bool] | None = None
        self.upcoming: tuple[float, av.VideoFrame | None, bool] | None = None
        self.number = 0  # frames taken so far
        try:
            self._open(skip_to_s=min(request.starts_s, default=0.0) - PREROLL_S)
        except SeekFailed:
            self.container.close()
            self._open(skip_to_s=0.0)

    def _open(self, skip_to_s: float) -> None:
        request = self.request
        self.shown = self.upcoming = None
        try:
            self.container, self.stream = open_video(_Range(self.raw, request.offset, request.size), request.max_pixels)
            if request.keyframes:
                self.stream.codec_context.skip_frame = "NONKEY"
            # timestamps are rounded to ticks: a frame that is at most half a tick late counts as shown
            self.tolerance = min(float(self.stream.time_base) / 2, LARGEST_CLOCK_ERROR_S) + 1e-6
            far = skip_to_s + PREROLL_S >= SEEK_FROM_S and self.container.format.name in SEEKABLE
            frames = timed_frames(self.container, self.stream, skip_to_s if far else 0.0)
            self.frames = judged_frames(marked_frames(frames, self.stream.codec_context.name))
            self.picture = Picture(self.stream, request.height, request.width, request.max_pixels, request.crop)
        except BaseException:
            self.close()
            raise
        self.advance()
        if far:  # past the first frame, to where the seek came out
            self.advance()

    def close(self) -> None:
        if hasattr(self, "container"):
            self.container.close()
        self.raw.close()

    def advance(self) -> None:
        """Go on by one frame; errors and the end are remembered."""
        self.shown = self.upcoming
        self.number += self.shown is not None
        try:
            self.upcoming = next(self.frames, None)
            if self.upcoming is None:
                self.failure = Failure("too_short")
        except DECODER_ERRORS as error:
            self.failure = failure_of(error)

    def goes_on_to(self, request: Request) -> bool:
        """Whether `request` can be answered from here on."""
        old = self.request
        if not request.path or any(getattr(old, name) != getattr(request, name) for name in SAME_SESSION):
            return False
        if request.kind == "scan":
            return request.first == self.number
        return self.shown is None or min(request.starts_s) + self.tolerance >= self.shown[0]

    def decode(self, request: Request, out: np.ndarray) -> tuple[Failure | None, ...]:
        """Fill `out` (uint8 [spans, num_frames, height, width, 3]); -> None or a Failure for each span."""
        failures: list[Failure | None] = [None] * len(request.starts_s)
        targets = sorted((start + k / request.fps, span, k)
                         for span, start in enumerate(request.starts_s) for k in range(request.num_frames))
        pixels: np.ndarray | None = None
        for target, span, place in targets:
            while self.failure is None and self.upcoming[1] is not None and self.upcoming[0] <= target + self.tolerance:
                self.advance()
                pixels = None
            if self.failure is None and self.upcoming[0] <= target + self.tolerance:
                failures[span] = failures[span] or Failure("too_short", f"ends after {self.upcoming[0]:.3f} s")
            elif self.failure is not None or self.shown is None:
                failures[span] = failures[span] or self.failure or Failure("too_short")
            elif self.shown[2]:
                failures[span] = failures[span] or Failure("corrupt_frame", f"frame {self.number - 1} at {self.shown[0]:.3f} s")
            elif failures[span] is None:
                try:
                    pixels = self.picture(self.shown[1]) if pixels is None else pixels
                except DECODER_ERRORS as error:
                    self.failure = failures[span] = failure_of(error)
                else:
                    out[span, place] = pixels
        return tuple(failures)

    def scan(self, request: Request, out: np.ndarray) -> Response:
        """The next small pictures into `out` (uint8, flat). Damaged frames show what the decoder made of them."""
        times: list[float] = []
        while self.number < request.first and self.failure is None and self.upcoming[1] is not None:
            self.advance()
        while len(times) < request.count and self.failure is None and self.upcoming[1] is not None:
            when, frame, _ = self.upcoming
            if not self.picture.height:
                self.picture.height, self.picture.width = scan_size(shown_aspect(self.stream, frame))
            size = self.picture.height * self.picture.width * 3
            out[len(times) * size : (len(times) + 1) * size] = self.picture(frame).reshape(-1)
            times.append(when)
            self.advance()
        ended = self.failure is not None or self.upcoming[1] is None
        return Response(times=tuple(times), size=(self.picture.height, self.picture.width), ended=ended)


def scan_size(aspect: float) -> tuple[int, int]:
    """Height and width of a scan's pictures: the long side is SCAN_SIDE, both are even."""
    height, width = (SCAN_SIDE / aspect, SCAN_SIDE) if aspect >= 1 else (SCAN_SIDE, SCAN_SIDE * aspect)
    return max(8, round(height / 2) * 2), max(8, round(width / 2) * 2)


class Server:
    """Answers requests; keeps the last video open."""

    def __init__(self, input_fd: int, output_fd: int) -> None:
        self.input_fd, self.output_fd = input_fd, output_fd
        self.session: Session | None = None

    def answer(self, request: Request) -> Response:
        """Do one request; every way in which a file can be bad becomes a Failure."""
        try:
            if request.kind == "probe":
                with self._open(request) as raw:
                    return Response(info=probe(_Range(raw, request.offset, request.size), request.max_pixels))
            if self.session is None or not self.session.goes_on_to(request):
                self.forget()
                self.session = Session(self._open(request), request)
            if request.kind == "scan":
                return self.session.scan(request, np.frombuffer(mmap.mmap(self.output_fd, request.count * SCAN_BYTES), np.uint8))
            shape = (len(request.starts_s), request.num_frames, request.height, request.width, 3)
            out = np.frombuffer(mmap.mmap(self.output_fd, math.prod(shape)), np.uint8).reshape(shape)
            return Response(spans=self.session.decode(request, out))
        except FileNotFoundError:
            return Response(failure=Failure("missing_file", request.path))
        except PermissionError:
            return Response(failure=Failure("unreadable_file", request.path))
        except DECODER_ERRORS as error:
            self.forget()
            return Response(failure=failure_of(error))

    def forget(self) -> None:
        if self.session is not None:
            self.session.close()
        self.session = None

    def _open(self, request: Request) -> io.RawIOBase:
        return open(request.path or os.dup(self.input_fd), "rb", buffering=0)


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
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_limit, mapped + memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=replies, flush=True)
    server = Server(input_fd, output_fd)
    for line in sys.stdin:
        request = Request(**{name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(line).items()})
        signal.alarm(math.ceil(request.timeout_s) + 5)  # kills a hung decoder even when nobody is left to do it
        response = server.answer(request)
        signal.alarm(0)
        print(json.dumps(asdict(response)), file=replies, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
