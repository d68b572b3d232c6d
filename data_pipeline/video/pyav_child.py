"""Child process that decodes source videos with PyAV.

Requests of one group for later parts of the same video continue where the previous one ended, so
that a long video is decoded only once.

The frame of a time is the one that is displayed then: the last frame whose timestamp is not later.
All frames from the first to the last requested one are decoded in order, which is exact for every
container (open GOP, variable frame rate, edit lists, MPEG-TS). Seeking is not exact in general. It
is used only for containers with a true index, to a few seconds before a distant time, and the
position after the seek is checked.
"""

from __future__ import annotations

import io
import os

import av
import numpy as np

from landiff.data_pipeline.video.deinterlace import Deinterlacer
from landiff.data_pipeline.video.frames import (
    DECODER_ERRORS,
    DEINTERLACER,
    MAX_CLOCK_ERROR_S,
    ByteRange,
    JudgedFrame,
    SeekFailed,
    failure_of,
    flag_damage,
    frame_rate,
    open_video,
    probe,
    spread_damage,
    timed_frames,
)
from landiff.data_pipeline.video.picture import Picture
from landiff.data_pipeline.video.promised import missing_s, promised_s, truncated_detail
from landiff.data_pipeline.video.protocol import (
    DecodeFailure,
    DecodeRequest,
    DecodeResponse,
    Output,
    Refused,
    serve,
)

SEEKABLE = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"))  # formats with a true index
SEEK_FROM_S = 30.0  # earlier times are reached by decoding
PREROLL_S = 10.0  # decoded before the requested time, so that open GOPs at the seek are over
SCAN_SIDE = 256  # long side of scanned pictures
# fields that must be equal for a request to continue in an open session
SESSION_FIELDS = (
    "group",
    "kind",
    "path",
    "offset",
    "size",
    "fps",
    "height",
    "width",
    "crop",
    "keyframes",
    "hdr",
    "interlaced",
    "max_pixels",
)


class Session:
    """A video that is open at one position.

    `shown` is the current frame, `before` and `upcoming` are its neighbours. `upcoming` has no
    frame at the end of the video.
    """

    def __init__(self, raw: io.RawIOBase, request: DecodeRequest) -> None:
        self.raw = raw
        self.request = request
        self.failure: DecodeFailure | None = None  # of everything from here on
        self.before: av.VideoFrame | None = None
        self.shown: JudgedFrame | None = None
        self.upcoming: JudgedFrame | None = None
        self.number = 0  # frames passed so far
        try:
            self._open(skip_to_s=min(request.starts_s, default=0.0) - PREROLL_S)
        except SeekFailed:
            self.video.container.close()
            self._open(skip_to_s=0.0)

    def _open(self, skip_to_s: float) -> None:
        """Open the video and read its first frame, or the frame at `skip_to_s`."""
        request = self.request
        self.before = None
        self.shown = None
        self.upcoming = None
        try:
            self.video = open_video(
                ByteRange(self.raw, request.offset, request.size),
                request.max_pixels,
                # only FFmpeg's own decoders can skip all but key frames
                strict=not request.keyframes,
            )
            if request.keyframes:
                self.video.context.skip_frame = "NONKEY"
            frame_rate(self.video)  # rejects a stream without timestamps
            # Timestamps are rounded to ticks: a frame at most half a tick late counts as displayed.
            half_tick = float(self.video.stream.time_base) / 2
            self.tolerance = min(half_tick, MAX_CLOCK_ERROR_S) + 1e-6
            is_seekable = self.video.container.format.name in SEEKABLE
            seeks = is_seekable and skip_to_s + PREROLL_S >= SEEK_FROM_S
            timed = timed_frames(self.video, skip_to_s if seeks else 0.0)
            self.frames = spread_damage(flag_damage(self.video, timed))
            self.picture = Picture(
                self.video,
                request.height,
                request.width,
                request.max_pixels,
                crop=request.crop,
                hdr=request.hdr,
            )
            self.deinterlacer = Deinterlacer(self.video.stream.time_base)
        except BaseException:
            self.close()
            raise
        self.advance()
        if seeks:  # past the first frame, to the position after the seek
            self.advance()

    def close(self) -> None:
        """Close the container and the file."""
        if hasattr(self, "video"):
            self.video.container.close()
        self.raw.close()

    def advance(self) -> None:
        """Advance by one frame. Errors and the end of the video are stored in `failure`."""
        self.before = self.shown[1] if self.shown else None
        self.shown = self.upcoming
        if self.shown is not None:
            self.number += 1
        try:
            self.upcoming = next(self.frames, None)
            if self.upcoming is None:
                self.failure = DecodeFailure("too_short")
        except DECODER_ERRORS as error:
            self.failure = failure_of(error)

    def can_continue_with(self, request: DecodeRequest) -> bool:
        """Whether a request can be answered from the current position."""
        if not request.path:
            return False
        for name in SESSION_FIELDS:
            if getattr(self.request, name) != getattr(request, name):
                return False
        if request.kind == "scan":
            return request.first == self.number
        return self.shown is None or min(request.starts_s) + self.tolerance >= self.shown[0]

    def decode(self, request: DecodeRequest, out: np.ndarray) -> DecodeResponse:
        """Decode spans into `out`, uint8 [spans, num_frames, height, width, 3]."""
        failures: list[DecodeFailure | None] = [None] * len(request.starts_s)
        conversions: list[set[str]] = [set() for _ in request.starts_s]
        targets: list[tuple[float, int, int]] = []  # (time, span, index in the span)
        for span, start in enumerate(request.starts_s):
            targets += [(start + k / request.fps, span, k) for k in range(request.num_frames)]
        pixels: np.ndarray | None = None  # of the current frame
        for target, span, index in sorted(targets):
            if self._advance_to(target):
                pixels = None
            failure = self._failure_at(target)
            if failure is None and failures[span] is None:
                try:
                    if pixels is None:
                        pixels = self._current_picture()
                except DECODER_ERRORS as error:
                    failure = failure_of(error)
                    self.failure = failure
                else:
                    out[span, index] = pixels
                    conversions[span].update(self._conversions())
            failures[span] = failures[span] or failure
        return DecodeResponse(
            spans=tuple(failures),
            conversions=tuple(tuple(sorted(names)) for names in conversions),
            shape=out.shape,
        )

    def _advance_to(self, target: float) -> bool:
        """Advance until the frame of time `target` is shown. Returns whether any frame passed."""
        has_moved = False
        while self._next_frame() is not None and self._is_due(target):
            self.advance()
            has_moved = True
        return has_moved

    def _next_frame(self) -> av.VideoFrame | None:
        """The upcoming frame, None at the end of the video or after a failure."""
        if self.failure is not None or self.upcoming is None:
            return None
        return self.upcoming[1]

    def _is_due(self, target: float) -> bool:
        """Whether the upcoming frame, or the end of the video, is reached at time `target`."""
        assert self.upcoming is not None
        return self.upcoming[0] <= target + self.tolerance

    def _failure_at(self, target: float) -> DecodeFailure | None:
        """Why there is no frame for time `target`, None if the current frame can be used."""
        if self.failure is not None:
            return self.failure
        assert self.upcoming is not None
        if self._is_due(target):
            return self._failure_after_end(self.upcoming[0])
        if self.shown is None:
            return DecodeFailure("too_short")
        if self._is_suspect(self.shown, self.upcoming):
            detail = f"frame {self.number - 1} at {self.shown[0]:.3f} s"
            return DecodeFailure("corrupt_frame", detail)
        return None

    def _failure_after_end(self, end_s: float) -> DecodeFailure:
        """Why there are no frames after `end_s`, the end of the last frame."""
        promised = promised_s(self.video.container, self.video.stream)
        if missing_s(promised, end_s, frame_rate(self.video)):
            return DecodeFailure("truncated", truncated_detail(end_s, promised))
        return DecodeFailure("too_short", f"ends after {end_s:.3f} s")

    def _is_suspect(self, shown: JudgedFrame, upcoming: JudgedFrame) -> bool:
        """Whether the current frame may be damaged, or would be after deinterlacing."""
        return shown[2] or (self.video.is_interlaced(shown[1]) and upcoming[2])

    def _current_picture(self) -> np.ndarray:
        """Convert the current frame to uint8 [height, width, 3].

        Raises Refused, or one of DECODER_ERRORS.
        """
        assert self.shown is not None and self.upcoming is not None
        frame = self.shown[1]
        if self.video.check_interlaced(frame, self.request.interlaced):
            frame = self.deinterlacer(self.before, frame, self.upcoming[1])
        return self.picture(frame)

    def _conversions(self) -> list[str]:
        """Names of the conversions applied to the current frame."""
        assert self.shown is not None
        names = []
        if self.picture.conversion is not None:
            names.append(self.picture.conversion.name)
        if self.video.is_interlaced(self.shown[1]):
            names.append(DEINTERLACER)
        return names

    def scan(self, request: DecodeRequest, output: Output) -> DecodeResponse:
        """Return the next small pictures. Damaged frames are shown as the decoder returns them."""
        times: list[float] = []
        out: np.ndarray | None = None
        while self.number < request.first and self._next_frame() is not None:
            self.advance()
        while len(times) < request.count:
            frame = self._next_frame()
            if frame is None:
                break
            assert self.upcoming is not None
            if not self.picture.height:
                height, width = scan_size(self.video.display_aspect(frame))
                self.picture.height = height
                self.picture.width = width
            if out is None:
                out = output.array((request.count, self.picture.height, self.picture.width, 3))
            out[len(times)] = self.picture(frame)
            times.append(self.upcoming[0])
            self.advance()
        if self.failure is not None and self.failure.reason == "out_of_memory":
            return DecodeResponse(failure=self.failure)  # the rest may be readable in a new child
        return DecodeResponse(
            times=tuple(times),
            shape=(len(times), self.picture.height, self.picture.width, 3),
            ended=self._next_frame() is None,
        )


def scan_size(aspect: float) -> tuple[int, int]:
    """Even height and width of scanned pictures, with a long side of SCAN_SIDE.

    `aspect` is width / height.
    """
    height = float(SCAN_SIDE)
    width = float(SCAN_SIDE)
    if aspect >= 1:
        height = SCAN_SIDE / aspect
    else:
        width = SCAN_SIDE * aspect
    return max(8, round(height / 2) * 2), max(8, round(width / 2) * 2)


class PyAVServer:
    """Answers requests. The last video stays open."""

    def __init__(self, input_fd: int) -> None:
        self.input_fd = input_fd
        self.session: Session | None = None

    def answer(self, request: DecodeRequest, output: Output) -> DecodeResponse:
        """Answer a request. All errors of damaged files become a DecodeFailure."""
        try:
            if request.kind == "probe":
                return self._probe(request)
            if request.kind == "clip":
                return self._decode_clip(request, output)
            session = self.session
            if session is None or not session.can_continue_with(request):
                self.forget()
                session = Session(self._open(request), request)
                self.session = session
            if request.kind == "scan":
                return session.scan(request, output)
            shape = (len(request.starts_s), request.num_frames, request.height, request.width, 3)
            return session.decode(request, output.array(shape))
        except FileNotFoundError:
            return DecodeResponse(failure=DecodeFailure("missing_file", request.path))
        except PermissionError:
            return DecodeResponse(failure=DecodeFailure("unreadable_file", request.path))
        except DECODER_ERRORS as error:
            self.forget()
            return DecodeResponse(failure=failure_of(error))

    def forget(self) -> None:
        """Close the open video."""
        if self.session is not None:
            self.session.close()
        self.session = None

    def _probe(self, request: DecodeRequest) -> DecodeResponse:
        """Read the properties of a video."""
        with self._open(request) as raw:
            file = ByteRange(raw, request.offset, request.size)
            info = probe(file, request.max_pixels, request.hdr, request.interlaced)
            return DecodeResponse(info=info)

    def _decode_clip(self, request: DecodeRequest, output: Output) -> DecodeResponse:
        """Decode all frames of a clip."""
        with self._open(request) as raw:
            file = ByteRange(raw, request.offset, request.size)
            return DecodeResponse(shape=whole_clip(file, request.max_pixels, output))

    def _open(self, request: DecodeRequest) -> io.FileIO:
        """Open the file of a request, or the shared input file."""
        return open(request.path or os.dup(self.input_fd), "rb", buffering=0)


def whole_clip(file: io.RawIOBase, max_pixels: int, output: Output) -> tuple[int, ...]:
    """Decode all frames of a clip to shared memory, in their own size.

    Returns the shape of the frames. Raises Refused.
    """
    with open_video(file, max_pixels) as video:
        height, width = video.context.height, video.context.width
        out = output.array((video.stream.frames, height, width, 3))
        picture = Picture(video, height, width, max_pixels)
        count = 0
        for frame in video.frames():
            if count == len(out):
                raise Refused("damaged", f"more frames than the {len(out)} of its index")
            out[count] = picture(frame)
            count += 1
    return (count, *out.shape[1:])


def main(parent: int, memory_limit: int, connection_fd: int, input_fd: int) -> None:
    """Serve requests until the connection closes or the parent process ends."""
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    serve(PyAVServer(input_fd).answer, parent, memory_limit, connection_fd)
