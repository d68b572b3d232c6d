"""Foreign video through PyAV: opened, looked at, its frames in order with their times, and as pictures.

Everything here runs in a child process (`data_pipeline.decoder_pyav`). It imports av, numpy and the standard
library alone.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.video.frame import PictureType

from data_pipeline.decoder_protocol import Failure, VideoInfo

# What PyAV raises on damaged files besides its own errors (measured on mutated files). Anything else ends
# the process, and the parent reports `decoder_died`.
DECODER_ERRORS = (av.error.FFmpegError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError,
                  OSError, TypeError, ValueError)
TRANSPOSE = {90: ("cclock",), 180: ("clock", "clock"), 270: ("clock",)}
LARGEST_CLOCK_ERROR_S = 1e-3
LOGGING_CODECS = frozenset(("hevc", "mjpeg", "libvpx", "libvpx-vp9", "vp8", "vp9", "av1", "libdav1d"))
# libvpx refuses pictures whose data end too early or too late; FFmpeg's own decoders show what comes out.
# It costs 1.2 times their CPU.
STRICT = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
REORDERED = 5  # frames between decoding and showing, at most, as encoders set it
MOST_B_FRAMES = 17  # in a row, of x264 and x265


class Refused(ValueError):
    """A video that is understood and not wanted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.failure = Failure(reason, detail)


class ByteRange(io.RawIOBase):
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
        data = os.pread(self.file.fileno(), count, self.offset + self.position)
        self.position += len(data)
        return data


@dataclass
class Video:
    """An open container, its first real video stream, and the decoder for it."""

    container: av.container.InputContainer
    stream: av.video.stream.VideoStream
    context: av.video.codeccontext.VideoCodecContext
    turn: int | None = None  # degrees, where the frames of `context` don't say
    lacks: bool = False  # the container itself saw that something is missing: a lost packet of MPEG-TS, a file cut off

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def frames(self) -> Iterator[av.VideoFrame]:
        """From where the container stands, in the order of showing. Raises one of DECODER_ERRORS."""
        for packet in self.container.demux(self.stream):
            self.lacks = self.lacks or packet.is_corrupt
            if self.turn is None and self.context is not self.stream.codec_context:
                picture = first_picture(packet)  # the stream's own decoder is told how it is turned
                self.turn = picture and round(picture.rotation) % 360
            yield from self.context.decode(packet)

    def turn_of(self, frame: av.VideoFrame) -> int:
        """By how many degrees the frame is shown turned."""
        return round(frame.rotation) % 360 if self.turn is None else self.turn

    def pixel_aspect(self, turn: int) -> tuple[float, float]:
        """(height, width) of a pixel as shown, the other way round for a video that is turned by a quarter."""
        aspect = float(self.stream.codec_context.sample_aspect_ratio or 1) or 1.0
        return (aspect, 1.0) if turn % 180 else (1.0, aspect)

    def shown_aspect(self, frame: av.VideoFrame) -> float:
        """Width / height of the picture as a player shows it."""
        turn = self.turn_of(frame)
        height, width = (frame.width, frame.height) if turn % 180 else (frame.height, frame.width)
        pixel = self.pixel_aspect(turn)
        return width * pixel[1] / (height * pixel[0])


@dataclass
class Picture:
    """Frames -> RGB of one size: rotated, scaled to cover and centre-cropped in one colour-correct swscale pass."""

    video: Video
    height: int
    width: int
    max_pixels: int
    crop: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    key: tuple = ()
    graph: av.filter.Graph | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """-> uint8 [height, width, 3]."""
        turn = self.video.turn_of(frame)
        key = (frame.width, frame.height, frame.format.name, turn, int(frame.colorspace), int(frame.color_range))
        if key != self.key:
            if frame.width * frame.height > self.max_pixels:
                raise Refused("too_large", f"{frame.width}x{frame.height}")
            self.graph, self.key = self._build(frame, turn), key
        self.graph.push(frame)
        return self.graph.pull().to_ndarray()

    def _build(self, frame: av.VideoFrame, turn: int) -> av.filter.Graph:
        turns = TRANSPOSE.get(turn, ())
        height, width = (frame.width, frame.height) if len(turns) == 1 else (frame.height, frame.width)
        left, top, right, bottom = (math.ceil(share * side - 1e-6) for share, side in zip(self.crop, (width, height) * 2, strict=True))
        kept = (max(1, height - top - bottom), max(1, width - left - right))
        scale = self.video.pixel_aspect(90 if len(turns) == 1 else 0)
        shown = (kept[0] * scale[0], kept[1] * scale[1])
        factor = max(self.height / shown[0], self.width / shown[1])
        height, width = max(self.height, round(shown[0] * factor)), max(self.width, round(shown[1] * factor))
        flags = "area" if factor <= 1 else "bicubic"
        graph = av.filter.Graph()
        graph.threads = 1  # processes share the cores
        chain = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=self.video.stream.time_base)]
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


def _color(frame: av.VideoFrame) -> str:
    """Scale options that name the matrix when the file doesn't: BT.709 from HD on, as players assume."""
    unspecified = int(frame.colorspace) == 2
    high_definition = frame.width >= 1280 or frame.height > 576
    return ":in_color_matrix=bt709" if unspecified and high_definition else ""


def open_video(file: io.RawIOBase, max_pixels: int, *, strict: bool = True) -> Video:
    """The first real video stream of a file, to be decoded by the decoder that notices most damage, or else by the usual one.

    Raises Refused, or one of DECODER_ERRORS.
    """
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
    other = STRICT.get(context.name) if strict else None
    if other in av.codec.codecs_available:
        context = av.codec.CodecContext.create(other, "r")
        context.extradata = stream.codec_context.extradata
    for one in {context, stream.codec_context}:
        # The picture may be larger than the container says. HEVC may bring checksums of its pictures.
        one.options = {"max_pixels": str(max_pixels), "err_detect": "crccheck"}
        one.thread_count, one.thread_type = 1, "NONE"  # frame threads would blur where damage begins
    return Video(container, stream, context)


def probe(file: io.RawIOBase, max_pixels: int) -> VideoInfo:
    """Look at a video; no more of it is decoded than shows which way up it is."""
    with open_video(file, max_pixels, strict=False) as video:
        stream, context, base = video.stream, video.context, video.stream.time_base
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        aspect = context.width * video.pixel_aspect(0)[1] / context.height
        first = last = picture = None
        for packet in video.container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None or packet.is_discard:
                continue
            end = stamp + (packet.duration or (1 / (rate * base) if rate else 0))
            first = stamp if first is None else min(first, stamp)
            last = end if last is None else max(last, end)
            if picture is None:
                picture = first_picture(packet)
                aspect = video.shown_aspect(picture) if picture else aspect
        duration = float((last - first) * base) if first is not None else 0.0
        return VideoInfo(context.width, context.height, rate, context.name, duration, aspect)


def first_picture(packet: av.Packet) -> av.VideoFrame | bool | None:
    """A frame by the stream's own decoder, None when it needs more packets, False when the packet is damaged: decoding will tell."""
    try:
        return next(iter(packet.decode()), None)
    except DECODER_ERRORS:
        return False


class SeekFailed(Exception):
    """A seek came out behind the wanted place."""


def timed_frames(video: Video, skip_to_s: float = 0.0) -> Iterator[tuple[float, av.VideoFrame | None]]:
    """(seconds since the first frame, frame) in order; ends with (end of the last frame, None).

    `skip_to_s`: leave out most of what comes before, but for the first frame. Raises SeekFailed.
    """
    stream = video.stream
    length = 1 / float(stream.average_rate or stream.guessed_rate or 24)
    origin = now = None
    if skip_to_s > 0:
        first = next(video.frames(), None)
        if first is None or first.pts is None:
            raise SeekFailed
        origin, now = float(first.pts * stream.time_base), 0.0
        yield now, first
        try:
            video.container.seek(first.pts + int(skip_to_s / stream.time_base), stream=stream)
        except av.error.FFmpegError as error:
            raise SeekFailed from error
        if video.context.is_open:
            video.context.flush_buffers()
    landed = skip_to_s <= 0
    for frame in video.frames():
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


def marked_frames(video: Video, frames: Iterator[tuple[float, av.VideoFrame | None]]) -> Iterator[tuple[float, av.VideoFrame | None, bool]]:
    """The same with: whether container or decoder noticed damage.

    libavcodec conceals damage. `is_corrupt` is its trace in H.264, MPEG-1, -2 and -4; other decoders leave none
    but a line in the log, when they notice at all (measured: benchmarks/damage.py).
    """
    if video.context.name not in LOGGING_CODECS:
        yield from ((now, frame, frame is not None and (frame.is_corrupt or video.lacks)) for now, frame in frames)
        return
    doubted = 0
    while True:
        with av.logging.Capture(True) as lines:
            item = next(frames, None)
        if item is None:
            return
        if any(level <= av.logging.ERROR for level, _, _ in lines):
            doubted = REORDERED  # the line comes when a picture is decoded, the picture some frames later
        now, frame = item
        yield now, frame, frame is not None and (frame.is_corrupt or video.lacks or doubted > 0)
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


def failure_of(error: BaseException) -> Failure:
    """The short code of what a decoder raised."""
    if isinstance(error, Refused):
        return error.failure
    codes = {MemoryError: "out_of_memory", EOFError: "truncated", av.error.InvalidDataError: "invalid_data"}
    reason = next((code for kind, code in codes.items() if isinstance(error, kind)), "undecodable")
    return Failure(reason, " ".join(f"{type(error).__name__}: {error}".split())[:160])
