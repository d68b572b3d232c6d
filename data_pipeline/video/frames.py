"""Foreign video through PyAV: opened, looked at, its frames in order with their times, and as pictures.

Everything here runs in a child process (`landiff.data_pipeline.video.pyav_child`). It imports av, numpy and the standard
library alone.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import av
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import PictureType

from landiff.data_pipeline.video.clock import DisplaySlots
from landiff.data_pipeline.video.color import (
    ColorConversion,
    ColorTags,
    find_conversion,
    hdr_detail,
    refuse_dolby_vision,
    tags_of,
)
from landiff.data_pipeline.video.protocol import DecodeFailure, Refused, VideoInfo

# What PyAV raises on damaged files besides its own errors (measured on mutated files). Anything else ends
# the process, and the parent reports `decoder_died`.
DECODER_ERRORS = (
    av.error.FFmpegError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
)
LARGEST_CLOCK_ERROR_S = 1e-3
LOGGING_CODECS = frozenset(
    ("hevc", "mjpeg", "libvpx", "libvpx-vp9", "vp8", "vp9", "av1", "libdav1d")
)
# libvpx refuses pictures whose data end too early or too late; FFmpeg's own decoders show what comes out.
# It costs 1.2 times their CPU.
STRICT = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
REORDERED = 5  # frames between decoding and showing, at most, as encoders set it
MOST_B_FRAMES = 17  # in a row, of x264 and x265
NO_TIMESTAMPS = 0x80  # AVFMT_NOTIMESTAMPS, a flag of containers: raw streams
DISPLAY_STAMPED = frozenset(("mpegts", "mpeg"))  # their timestamps are display times by definition
CLOCK_PACKETS = 64  # read to find out whether timestamps are display times
DEINTERLACER = "bwdif"
DOLBY_VISION = frozenset((SideDataType.DOVI_METADATA, SideDataType.DOVI_RPU_BUFFER))


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
    tags: ColorTags = ColorTags()  # of the container; frames may have their own
    slots: DisplaySlots | None = None  # where the container's timestamps are in decoding order
    _packets: Iterator[av.Packet] | None = None  # those that were looked at, and what follows them

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def frames(self) -> Iterator[av.VideoFrame]:
        """From where the container stands, in the order of showing. Raises one of DECODER_ERRORS."""
        for packet in self.packets():
            self.lacks = self.lacks or packet.is_corrupt
            if self.turn is None and self.context is not self.stream.codec_context:
                picture = first_picture(packet)  # the stream's own decoder is told how it is turned
                self.turn = picture and round(picture.rotation) % 360
            if self.slots is None:
                yield from self.context.decode(packet)
            else:
                yield from self.slots.displayed(packet, self.context.decode(packet))

    def packets(self) -> Iterator[av.Packet]:
        """From where the container stands, in the order of decoding."""
        packets, self._packets = self._packets, None
        yield from packets or self.container.demux(self.stream)

    def find_clock(self) -> None:
        """Set `slots` if timestamps only rise, as in AVI, although frames are reordered."""
        depth = self.stream.codec_context.reorder_depth
        if not depth or self.container.format.name in DISPLAY_STAMPED:
            return
        rest = self.container.demux(self.stream)
        seen: list[av.Packet] = []
        latest: int | None = None
        in_decoding_order = True
        for packet in itertools.islice(rest, CLOCK_PACKETS):
            seen.append(packet)
            if packet.pts is None:
                continue
            if latest is not None and packet.pts < latest:
                in_decoding_order = False
                break
            latest = packet.pts
        self._packets = itertools.chain(seen, rest)
        if in_decoding_order and latest is not None:
            self.slots = DisplaySlots(depth)

    def seek(self, pts: int) -> None:
        """Go to a key frame that is not shown later than `pts`. Raises SeekFailed."""
        self._packets = None
        if self.slots is not None:
            self.slots.clear()
        try:
            self.container.seek(pts, stream=self.stream)
        except av.error.FFmpegError as error:
            raise SeekFailed from error
        if self.context.is_open:
            self.context.flush_buffers()

    def conversion_of(self, frame: av.VideoFrame) -> ColorConversion | None:
        """What turns the colours of a frame into SDR BT.709. Raises Refused when nothing does."""
        tags = tags_of(frame).or_else(self.tags)
        has_metadata = any(data.type in DOLBY_VISION for data in frame.side_data)
        refuse_dolby_vision(self.stream.codec_context.codec_tag, has_metadata, tags)
        return find_conversion(tags)

    def is_interlaced(self, frame: av.VideoFrame) -> bool:
        """Whether a frame is made of fields. In PNG the flag means the order of the pixels."""
        return frame.interlaced_frame and self.context.name not in ("png", "apng")

    def check_interlaced(self, frame: av.VideoFrame, handling: str) -> bool:
        """Whether a frame has to be deinterlaced.

        Raises Refused: field_coded where that is not possible, interlaced where `handling` is
        "reject".
        """
        if not self.is_interlaced(frame):
            return False
        if self.context.name == "hevc":  # FFmpeg does not join the fields of HEVC
            raise Refused("field_coded", "every picture of this HEVC video is one field")
        if handling == "reject":
            raise Refused("interlaced", "its frames hold two fields, and video.interlaced = reject")
        return True

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


def open_video(file: io.RawIOBase, max_pixels: int, *, strict: bool = True) -> Video:
    """The first real video stream of a file, to be decoded by the decoder that notices most damage, or else by the usual one.

    Raises Refused, or one of DECODER_ERRORS.
    """
    # No protocol may be opened from inside a file: playlists would read other files and the network.
    container = av.open(
        file, mode="r", container_options={"protocol_whitelist": "none"}, metadata_errors="replace"
    )
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
    # PyAV's libvpx does not decode pictures of more than 8 bits.
    other = None
    if strict and context.format is not None and context.format.components[0].bits == 8:
        other = STRICT.get(context.name)
    if other in av.codec.codecs_available:
        context = av.codec.CodecContext.create(other, "r")
        context.extradata = stream.codec_context.extradata
    for one in {context, stream.codec_context}:
        # The picture may be larger than the container says. HEVC may bring checksums of its pictures.
        one.options = {"max_pixels": str(max_pixels), "err_detect": "crccheck"}
        one.thread_count, one.thread_type = (
            1,
            "NONE",
        )  # frame threads would blur where damage begins
    video = Video(container, stream, context, tags=tags_of(stream.codec_context))
    video.find_clock()
    return video


def probe(file: io.RawIOBase, max_pixels: int, hdr: str, interlaced: str) -> VideoInfo:
    """Size, rate and duration of a video, and the conversions that its first picture needs.

    Only the first picture is decoded. Raises Refused, or one of DECODER_ERRORS.
    """
    with open_video(file, max_pixels, strict=False) as video:
        context, base = video.context, video.stream.time_base
        rate = frame_rate(video)
        aspect = context.width * video.pixel_aspect(0)[1] / context.height
        conversions: tuple[str, ...] = ()
        first = last = picture = None
        unstamped = 0.0  # in ticks: what packets without a timestamp last
        for packet in video.packets():
            if packet.is_discard:
                continue
            length = packet.duration or (1 / (rate * base) if rate else 0)
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None:
                if packet.size:  # the last packet is empty: it flushes the decoder
                    unstamped += length
            else:
                first = stamp if first is None else min(first, stamp)
                last = stamp + length if last is None else max(last, stamp + length)
            if picture is None:
                picture = first_picture(packet)
                if picture:
                    aspect = video.shown_aspect(picture)
                    conversions = needed_conversions(video, picture, hdr, interlaced)
        ticks = unstamped if first is None else last - first
        return VideoInfo(
            context.width,
            context.height,
            rate,
            context.name,
            float(ticks * base),
            aspect,
            conversions,
        )


def frame_rate(video: Video) -> float:
    """Frames per second as the file says, 0.0 where it doesn't. Raises Refused (no_timestamps)."""
    stream = video.stream
    if not video.container.format.flags & NO_TIMESTAMPS:
        return float(stream.average_rate or stream.guessed_rate or 0)
    # libavformat takes 25 for a raw stream whatever the stream says
    rate = stream.codec_context.framerate
    if not rate:
        raise Refused(
            "no_timestamps",
            f"a raw {video.context.name} stream without timestamps and without a frame rate; "
            "put it into a container: ffmpeg -r RATE -i FILE -c copy FILE.mkv",
        )
    return float(rate)


def needed_conversions(
    video: Video, frame: av.VideoFrame, hdr: str, interlaced: str
) -> tuple[str, ...]:
    """Names of the conversions that a frame needs.

    Raises Refused for what is not possible, or where `hdr` or `interlaced` is "reject".
    """
    names = []
    conversion = video.conversion_of(frame)
    if conversion is not None:
        if hdr == "reject":
            raise Refused("hdr", hdr_detail(conversion))
        names.append(conversion.name)
    if video.check_interlaced(frame, interlaced):
        names.append(DEINTERLACER)
    return tuple(names)


def first_picture(packet: av.Packet) -> av.VideoFrame | bool | None:
    """A frame by the stream's own decoder, None when it needs more packets, False when the packet is damaged: decoding will tell."""
    try:
        return next(iter(packet.decode()), None)
    except DECODER_ERRORS:
        return False


class SeekFailed(Exception):
    """A seek came out behind the wanted place."""


def timed_frames(
    video: Video, skip_to_s: float = 0.0
) -> Iterator[tuple[float, av.VideoFrame | None]]:
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
        video.seek(first.pts + int(skip_to_s / stream.time_base))
    landed = skip_to_s <= 0
    for frame in video.frames():
        if not landed:
            landed = (
                frame.pts is not None and float(frame.pts * stream.time_base) - origin <= skip_to_s
            )
            if not landed:
                raise SeekFailed
        stamp = float(frame.pts * stream.time_base) if frame.pts is not None else None
        if origin is None:
            origin, now = stamp or 0.0, 0.0
        elif (
            stamp is None or stamp - origin <= now
        ):  # no clock, or one that runs backwards: count frames
            now += length
        else:
            now = stamp - origin
        if frame.duration:
            length = float(frame.duration * stream.time_base)
        yield now, frame
    if now is not None:
        yield now + length, None


def marked_frames(
    video: Video, frames: Iterator[tuple[float, av.VideoFrame | None]]
) -> Iterator[tuple[float, av.VideoFrame | None, bool]]:
    """The same with: whether container or decoder noticed damage.

    libavcodec conceals damage. `is_corrupt` is its trace in H.264, MPEG-1, -2 and -4; other decoders leave none
    but a line in the log, when they notice at all (measured: benchmarks/damage.py).
    """
    if video.context.name not in LOGGING_CODECS:
        yield from (
            (now, frame, frame is not None and (frame.is_corrupt or video.lacks))
            for now, frame in frames
        )
        return
    doubted = 0
    while True:
        with av.logging.Capture(True) as lines:
            item = next(frames, None)
        if item is None:
            return
        if any(level <= av.logging.ERROR for level, _, _ in lines):
            doubted = (
                REORDERED  # the line comes when a picture is decoded, the picture some frames later
            )
        now, frame = item
        yield now, frame, frame is not None and (frame.is_corrupt or video.lacks or doubted > 0)
        doubted = max(0, doubted - 1)


def judged_frames(
    frames: Iterator[tuple[float, av.VideoFrame | None, bool]],
) -> Iterator[tuple[float, av.VideoFrame | None, bool]]:
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


def failure_of(error: BaseException) -> DecodeFailure:
    """The short code of what a decoder raised."""
    if isinstance(error, Refused):
        return error.failure
    codes = {
        MemoryError: "out_of_memory",
        EOFError: "truncated",
        av.error.InvalidDataError: "invalid_data",
    }
    reason = next((code for kind, code in codes.items() if isinstance(error, kind)), "undecodable")
    text = str(error)
    if isinstance(error, av.error.FFmpegError):
        # str(error) ends with the last line of FFmpeg's log, which depends on how its threads ran
        text = f"[Errno {error.errno}] {error.strerror}"
    return DecodeFailure(reason, " ".join(f"{type(error).__name__}: {text}".split())[:160])
