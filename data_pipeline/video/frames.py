"""Access to source videos through PyAV: opening, probing, and their frames in display order.

Everything here runs in a child process (`landiff.data_pipeline.video.pyav_child`). It imports only
av, numpy and the standard library.
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
from landiff.data_pipeline.video.promised import missing_s, promised_s
from landiff.data_pipeline.video.protocol import DecodeFailure, Refused, VideoInfo

# Errors that PyAV raises on damaged files, its own and others (measured on mutated files). Any
# other error ends the process, and the parent reports `decoder_died`.
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
MAX_CLOCK_ERROR_S = 1e-3
# decoders that report damage only in their log
LOGGING_CODECS = frozenset(
    ("hevc", "mjpeg", "libvpx", "libvpx-vp9", "vp8", "vp9", "av1", "libdav1d")
)
# libvpx rejects pictures whose data ends too early or too late, where FFmpeg's own decoders return
# damaged frames. It takes 1.2 times the CPU time.
STRICT_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MAX_REORDERED = 5  # frames between decoding and display, as encoders set it
MAX_B_FRAMES = 17  # in a row, of x264 and x265
NO_TIMESTAMPS = 0x80  # AVFMT_NOTIMESTAMPS, a flag of raw stream formats
DISPLAY_STAMPED = frozenset(("mpegts", "mpeg"))  # formats whose timestamps are display times
CLOCK_PACKETS = 64  # packets that are read to find out whether timestamps are display times
DEINTERLACER = "bwdif"
IMAGE_CODECS = frozenset(("gif", "mjpeg", "png", "webp"))
DOLBY_VISION = frozenset((SideDataType.DOVI_METADATA, SideDataType.DOVI_RPU_BUFFER))

TimedFrame = tuple[float, av.VideoFrame | None]  # display time in s; None: the end of the video
JudgedFrame = tuple[float, av.VideoFrame | None, bool]  # with whether the frame may be damaged


class ByteRange(io.RawIOBase):
    """The bytes [offset, offset + size) of a file, as a file."""

    def __init__(self, file: io.RawIOBase, offset: int, size: int) -> None:
        self.file = file
        self.offset = offset
        self.size = size if size >= 0 else file.seek(0, os.SEEK_END) - offset
        self.position = 0

    def readable(self) -> bool:
        """Whether the file can be read."""
        return True

    def seekable(self) -> bool:
        """Whether the file supports `seek`."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position in the range."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        """Return the position in the range."""
        return self.position

    def read(self, count: int = -1) -> bytes:
        """Read up to `count` bytes, all that are left if it is negative."""
        left = max(0, self.size - self.position)
        count = left if count < 0 else min(count, left)
        data = os.pread(self.file.fileno(), count, self.offset + self.position)
        self.position += len(data)
        return data


@dataclass
class Video:
    """An open container with its first real video stream and the decoder for it."""

    container: av.container.InputContainer
    stream: av.video.stream.VideoStream
    context: av.video.codeccontext.VideoCodecContext
    rotation: int | None = None  # degrees, if the frames of `context` do not carry it
    is_incomplete: bool = False  # the container reports missing data, e.g. lost MPEG-TS packets
    tags: ColorTags = ColorTags()  # of the container; frames may have their own
    slots: DisplaySlots | None = None  # if the container's timestamps are in decoding order
    _packets: Iterator[av.Packet] | None = None  # all packets, if some were already read

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def frames(self) -> Iterator[av.VideoFrame]:
        """Yield frames in display order, from the current position of the container.

        Raises one of DECODER_ERRORS.
        """
        for packet in self.packets():
            self.is_incomplete = self.is_incomplete or packet.is_corrupt
            if self.rotation is None and self.context is not self.stream.codec_context:
                # only the stream's own decoder receives the rotation
                self.rotation = self._rotation_in(packet)
            if self.slots is None:
                yield from self.context.decode(packet)
            else:
                yield from self.slots.displayed(packet, self.context.decode(packet))

    def packets(self) -> Iterator[av.Packet]:
        """Yield packets in decoding order, from the current position of the container."""
        packets = self._packets
        self._packets = None
        yield from packets or self.container.demux(self.stream)

    def find_clock(self) -> None:
        """Set `slots` if frames are reordered although timestamps only rise, as in AVI."""
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
        """Seek to a key frame that is not displayed later than `pts`. Raises SeekFailed."""
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
        """Return the conversion of a frame to SDR BT.709, None if it needs none.

        Raises Refused if its colours cannot be converted.
        """
        tags = tags_of(frame).or_else(self.tags)
        has_metadata = False
        if self.context.name not in IMAGE_CODECS:
            # Images may carry data that PyAV does not know (Exif), at which it raises an error.
            has_metadata = any(data.type in DOLBY_VISION for data in frame.side_data)
        refuse_dolby_vision(self.stream.codec_context.codec_tag, has_metadata, tags)
        return find_conversion(tags)

    def is_interlaced(self, frame: av.VideoFrame) -> bool:
        """Whether a frame consists of fields."""
        # in PNG the flag stands for the order of pixels in the file
        return frame.interlaced_frame and self.context.name not in ("png", "apng")

    def check_interlaced(self, frame: av.VideoFrame, handling: str) -> bool:
        """Whether a frame has to be deinterlaced.

        Raises Refused with the reason field_coded if that is not possible, and with the reason
        interlaced if `handling` is "reject".
        """
        if not self.is_interlaced(frame):
            return False
        if self.context.name == "hevc":  # FFmpeg does not join the fields of HEVC
            raise Refused("field_coded", "every picture of this HEVC video is one field")
        if handling == "reject":
            raise Refused("interlaced", "its frames hold two fields, and video.interlaced = reject")
        return True

    def rotation_of(self, frame: av.VideoFrame) -> int:
        """Rotation with which a frame is displayed, in degrees."""
        return round(frame.rotation) % 360 if self.rotation is None else self.rotation

    def pixel_size(self, rotation: int) -> tuple[float, float]:
        """Relative (height, width) of a pixel as displayed."""
        aspect = float(self.stream.codec_context.sample_aspect_ratio or 1) or 1.0
        return (aspect, 1.0) if rotation % 180 else (1.0, aspect)

    def display_aspect(self, frame: av.VideoFrame) -> float:
        """Width / height of the picture as a player shows it."""
        rotation = self.rotation_of(frame)
        height, width = frame.height, frame.width
        if rotation % 180:
            height, width = width, height
        pixel_height, pixel_width = self.pixel_size(rotation)
        return width * pixel_width / (height * pixel_height)

    def _rotation_in(self, packet: av.Packet) -> int | None:
        """Rotation of a packet's first frame, None if the packet gives no frame."""
        frame, is_damaged = first_picture(packet)
        if is_damaged:
            return 0
        return None if frame is None else round(frame.rotation) % 360


def open_video(file: io.RawIOBase, max_pixels: int, *, strict: bool = True) -> Video:
    """Open the first real video stream of a file.

    `strict` selects the decoder that reports the most damage. Raises Refused, or one of
    DECODER_ERRORS.
    """
    # A file must not open a protocol: playlists would read other files and the network.
    container = av.open(
        file, mode="r", container_options={"protocol_whitelist": "none"}, metadata_errors="replace"
    )
    if not container.streams.video:
        raise Refused("no_video_stream")
    cover_art = av.stream.Disposition.attached_pic
    streams = [one for one in container.streams.video if not one.disposition & cover_art]
    if not streams:
        raise Refused("cover_art_only")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise Refused("unknown_codec")
    if context.width <= 0 or context.height <= 0:
        detail = ""
        if context.name == "webp":
            detail = "perhaps an animated WebP, which FFmpeg does not decode; convert it to GIF"
        raise Refused("no_dimensions", detail)
    if context.width * context.height > max_pixels:
        raise Refused("too_large", f"{context.width}x{context.height}")
    strict_name = None
    # PyAV's libvpx does not decode pictures of more than 8 bits
    if strict and context.format is not None and context.format.components[0].bits == 8:
        strict_name = STRICT_DECODERS.get(context.name)
    if strict_name in av.codec.codecs_available:
        context = av.codec.CodecContext.create(strict_name, "r")
        context.extradata = stream.codec_context.extradata
    for one in {context, stream.codec_context}:
        # A picture may be larger than the container says. HEVC may carry checksums of pictures.
        one.options = {"max_pixels": str(max_pixels), "err_detect": "crccheck"}
        # with frame threads it would be unclear which frame is damaged
        one.thread_count = 1
        one.thread_type = "NONE"
    video = Video(container, stream, context, tags=tags_of(stream.codec_context))
    video.find_clock()
    return video


def probe(file: io.RawIOBase, max_pixels: int, hdr: str, interlaced: str) -> VideoInfo:
    """Read size, rate and duration of a video, and the conversions that its first picture needs.

    Only the first picture is decoded. Raises Refused, or one of DECODER_ERRORS.
    """
    with open_video(file, max_pixels, strict=False) as video:
        context = video.context
        time_base = video.stream.time_base
        rate = frame_rate(video)
        frame_ticks = 1 / (rate * time_base) if rate else 0.0
        aspect = context.width * video.pixel_size(0)[1] / context.height
        conversions: tuple[str, ...] = ()
        searching = True  # for the first picture
        extent = PacketExtent()
        whole = PacketExtent()  # with packets that are not displayed
        for packet in video.packets():
            whole.add(packet, default_ticks=frame_ticks)
            if packet.is_discard:
                continue
            extent.add(packet, default_ticks=frame_ticks)
            if searching:
                picture, is_damaged = first_picture(packet)
                searching = picture is None and not is_damaged
                if picture is not None:
                    aspect = video.display_aspect(picture)
                    conversions = needed_conversions(video, picture, hdr, interlaced)
        return VideoInfo(
            width=context.width,
            height=context.height,
            fps=rate,
            codec=context.name,
            duration_s=float(extent.ticks * time_base),
            aspect=aspect,
            conversions=conversions,
            is_image=extent.packets == 1,
            missing_s=missing_s(
                promised_s(video.container, video.stream), float(whole.ticks * time_base), rate
            ),
        )


@dataclass
class PacketExtent:
    """Time span that packets cover, in ticks of their time base."""

    first: float | None = None  # start of the earliest packet
    last: float = 0.0  # end of the latest packet
    unstamped: float = 0.0  # total duration of packets without a timestamp
    packets: int = 0  # with data

    def add(self, packet: av.Packet, default_ticks: float) -> None:
        """Include a packet. `default_ticks` is its duration if it has none."""
        self.packets += packet.size > 0  # the last packet is empty, it flushes the decoder
        duration = packet.duration or default_ticks
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is None:
            if packet.size:
                self.unstamped += duration
        elif self.first is None:
            self.first = stamp
            self.last = stamp + duration
        else:
            self.first = min(self.first, stamp)
            self.last = max(self.last, stamp + duration)

    @property
    def ticks(self) -> float:
        """Length of the span. Without any timestamp, the sum of the durations."""
        return self.unstamped if self.first is None else self.last - self.first


def frame_rate(video: Video) -> float:
    """Frames per second according to the file, 0.0 if unknown. Raises Refused (no_timestamps)."""
    stream = video.stream
    if not video.container.format.flags & NO_TIMESTAMPS:
        return float(stream.average_rate or stream.guessed_rate or 0)
    # libavformat assumes 25 for a raw stream, whatever the stream says
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

    Raises Refused for a conversion that is not possible, or that `hdr` or `interlaced` rejects.
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


def first_picture(packet: av.Packet) -> tuple[av.VideoFrame | None, bool]:
    """Decode a packet with the stream's own decoder.

    Returns the first frame, None if the decoder needs more packets, and whether the packet is
    damaged.
    """
    try:
        return next(iter(packet.decode()), None), False
    except DECODER_ERRORS:
        return None, True


class SeekFailed(Exception):
    """A seek ended after the requested time."""


def timed_frames(video: Video, skip_to_s: float = 0.0) -> Iterator[TimedFrame]:
    """Yield (seconds since the first frame, frame) in order, then (end of the last frame, None).

    With `skip_to_s`, most frames before that time are skipped, but not the first one. Raises
    SeekFailed.
    """
    stream = video.stream
    duration = 1 / float(stream.average_rate or stream.guessed_rate or 24)  # of the current frame
    origin: float | None = None  # timestamp of the first frame
    now = 0.0
    if skip_to_s > 0:
        first = next(video.frames(), None)
        if first is None or first.pts is None:
            raise SeekFailed
        origin = float(first.pts * stream.time_base)
        yield now, first
        video.seek(first.pts + int(skip_to_s / stream.time_base))
    has_landed = skip_to_s <= 0
    for frame in video.frames():
        stamp = None if frame.pts is None else float(frame.pts * stream.time_base)
        if not has_landed:
            if origin is None or stamp is None or stamp - origin > skip_to_s:
                raise SeekFailed
            has_landed = True
        if origin is None:
            origin = stamp or 0.0
        elif stamp is None or stamp - origin <= now:
            now += duration  # without a valid timestamp, frames are counted
        else:
            now = stamp - origin
        if frame.duration:
            duration = float(frame.duration * stream.time_base)
        yield now, frame
    if origin is not None:
        yield now + duration, None


def flag_damage(video: Video, frames: Iterator[TimedFrame]) -> Iterator[JudgedFrame]:
    """Add to each frame whether the container or the decoder reported damage.

    libavcodec conceals damage. The decoders of H.264 and MPEG-1, -2 and -4 set `is_corrupt`. The
    others write at most a line to the log (measured: benchmarks/damage.py).
    """
    if video.context.name not in LOGGING_CODECS:
        for now, frame in frames:
            yield now, frame, frame is not None and (frame.is_corrupt or video.is_incomplete)
        return
    suspect_frames = 0  # frames to come that a logged error may be about
    while True:
        with av.logging.Capture(True) as lines:
            item = next(frames, None)
        if item is None:
            return
        if any(level <= av.logging.ERROR for level, _, _ in lines):
            # the error is logged when a picture is decoded, some frames before it is displayed
            suspect_frames = MAX_REORDERED
        now, frame = item
        is_damaged = frame is not None and (
            frame.is_corrupt or video.is_incomplete or suspect_frames > 0
        )
        yield now, frame, is_damaged
        suspect_frames = max(0, suspect_frames - 1)


def spread_damage(frames: Iterator[JudgedFrame]) -> Iterator[JudgedFrame]:
    """Extend damage to all frames that it may affect.

    These are all later frames, and the B-frames just before the damaged frame. A key frame does not
    end the damage: one in four files with reported damage has further damage that is not reported.
    """
    group: list[TimedFrame] = []
    is_suspect = False
    for now, frame, is_damaged in frames:
        group.append((now, frame))
        is_suspect = is_suspect or is_damaged
        if frame is None or frame.pict_type != PictureType.B or len(group) == MAX_B_FRAMES:
            for time, member in group:
                yield time, member, is_suspect
            group = []


def failure_of(error: BaseException) -> DecodeFailure:
    """Convert an error of a decoder to a failure with a short reason."""
    if isinstance(error, Refused):
        return error.failure
    reasons = {
        MemoryError: "out_of_memory",
        EOFError: "truncated",
        av.error.InvalidDataError: "invalid_data",
    }
    reason = "undecodable"
    for kind, kind_reason in reasons.items():
        if isinstance(error, kind):
            reason = kind_reason
            break
    text = str(error)
    if isinstance(error, av.error.FFmpegError):
        # str(error) ends with the last line of FFmpeg's log, which depends on thread timing
        text = f"[Errno {error.errno}] {error.strerror}"
    return DecodeFailure(reason, " ".join(f"{type(error).__name__}: {text}".split())[:160])
