"""The process that opens foreign videos: whatever a file does to a decoder, it happens here.

Requests of one group for later parts of the same video go on where the one before ended: a long video is decoded once.

Which frame: the one that is shown at the wanted time, i.e. the last frame whose timestamp is not later than
it. All frames from the first to the last wanted one are decoded in order, because that is exact for every
container (open GOP, variable frame rate, edit lists, MPEG-TS); seeking is not. Only in containers with a true
index, and only to some seconds before a far place, is a seek exact: it is checked where it arrived.
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
    LARGEST_CLOCK_ERROR_S,
    ByteRange,
    SeekFailed,
    failure_of,
    frame_rate,
    judged_frames,
    marked_frames,
    open_video,
    probe,
    timed_frames,
)
from landiff.data_pipeline.video.picture import Picture
from landiff.data_pipeline.video.protocol import (
    DecodeFailure,
    DecodeRequest,
    DecodeResponse,
    Output,
    Refused,
    serve,
)

SEEKABLE = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"))
SEEK_FROM_S = 30.0  # nearer places are decoded to
PREROLL_S = (
    10.0  # decoded before the place itself: what an open group of pictures lacks is long past
)
SCAN_SIDE = 256  # of the pictures of a scan, at most
SAME_SESSION = (
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
    """One video, open at one place."""

    def __init__(self, raw: io.RawIOBase, request: DecodeRequest) -> None:
        self.raw = raw
        self.request = request
        self.failure: DecodeFailure | None = None  # of everything from here on
        self.before: av.VideoFrame | None = None  # the one before the one that is shown
        self.shown: tuple[float, av.VideoFrame | None, bool] | None = None
        self.upcoming: tuple[float, av.VideoFrame | None, bool] | None = None
        self.number = 0  # frames taken so far
        try:
            self._open(skip_to_s=min(request.starts_s, default=0.0) - PREROLL_S)
        except SeekFailed:
            self.video.container.close()
            self._open(skip_to_s=0.0)

    def _open(self, skip_to_s: float) -> None:
        request = self.request
        self.before = self.shown = self.upcoming = None
        try:
            # only FFmpeg's own decoders can leave out all but key frames
            self.video = open_video(
                ByteRange(self.raw, request.offset, request.size),
                request.max_pixels,
                strict=not request.keyframes,
            )
            if request.keyframes:
                self.video.context.skip_frame = "NONKEY"
            frame_rate(self.video)  # a stream without a clock is refused
            # timestamps are rounded to ticks: a frame that is at most half a tick late counts as shown
            self.tolerance = (
                min(float(self.video.stream.time_base) / 2, LARGEST_CLOCK_ERROR_S) + 1e-6
            )
            far = (
                skip_to_s + PREROLL_S >= SEEK_FROM_S
                and self.video.container.format.name in SEEKABLE
            )
            self.frames = judged_frames(
                marked_frames(self.video, timed_frames(self.video, skip_to_s if far else 0.0))
            )
            self.picture = Picture(
                self.video,
                request.height,
                request.width,
                request.max_pixels,
                request.crop,
                request.hdr,
            )
            self.deinterlacer = Deinterlacer(self.video.stream.time_base)
        except BaseException:
            self.close()
            raise
        self.advance()
        if far:  # past the first frame, to where the seek came out
            self.advance()

    def close(self) -> None:
        if hasattr(self, "video"):
            self.video.container.close()
        self.raw.close()

    def advance(self) -> None:
        """Go on by one frame; errors and the end are remembered."""
        self.before = self.shown[1] if self.shown else None
        self.shown = self.upcoming
        self.number += self.shown is not None
        try:
            self.upcoming = next(self.frames, None)
            if self.upcoming is None:
                self.failure = DecodeFailure("too_short")
        except DECODER_ERRORS as error:
            self.failure = failure_of(error)

    def goes_on_to(self, request: DecodeRequest) -> bool:
        """Whether `request` can be answered from here on."""
        old = self.request
        if not request.path or any(
            getattr(old, name) != getattr(request, name) for name in SAME_SESSION
        ):
            return False
        if request.kind == "scan":
            return request.first == self.number
        return self.shown is None or min(request.starts_s) + self.tolerance >= self.shown[0]

    def decode(self, request: DecodeRequest, out: np.ndarray) -> DecodeResponse:
        """Fill `out`, uint8 [spans, num_frames, height, width, 3].

        Returns for each span None or a DecodeFailure, and the conversions of its frames.
        """
        failures: list[DecodeFailure | None] = [None] * len(request.starts_s)
        conversions: list[set[str]] = [set() for _ in request.starts_s]
        targets = sorted(
            (start + k / request.fps, span, k)
            for span, start in enumerate(request.starts_s)
            for k in range(request.num_frames)
        )
        pixels: np.ndarray | None = None
        for target, span, place in targets:
            while (
                self.failure is None
                and self.upcoming[1] is not None
                and self.upcoming[0] <= target + self.tolerance
            ):
                self.advance()
                pixels = None
            if self.failure is None and self.upcoming[0] <= target + self.tolerance:
                failures[span] = failures[span] or DecodeFailure(
                    "too_short", f"ends after {self.upcoming[0]:.3f} s"
                )
            elif self.failure is not None or self.shown is None:
                failures[span] = failures[span] or self.failure or DecodeFailure("too_short")
            elif self._is_suspect():
                failures[span] = failures[span] or DecodeFailure(
                    "corrupt_frame", f"frame {self.number - 1} at {self.shown[0]:.3f} s"
                )
            elif failures[span] is None:
                try:
                    pixels = self._shown_picture() if pixels is None else pixels
                except DECODER_ERRORS as error:
                    self.failure = failures[span] = failure_of(error)
                else:
                    out[span, place] = pixels
                    conversions[span].update(self._conversions())
        return DecodeResponse(
            spans=tuple(failures),
            conversions=tuple(tuple(sorted(names)) for names in conversions),
            shape=out.shape,
        )

    def _is_suspect(self) -> bool:
        """Whether damage is in the shown frame, or would be when it is deinterlaced."""
        return self.shown[2] or (self.video.is_interlaced(self.shown[1]) and self.upcoming[2])

    def _shown_picture(self) -> np.ndarray:
        """uint8 [height, width, 3]. Raises Refused, or one of DECODER_ERRORS."""
        frame = self.shown[1]
        if self.video.check_interlaced(frame, self.request.interlaced):
            frame = self.deinterlacer(self.before, frame, self.upcoming[1])
        return self.picture(frame)

    def _conversions(self) -> list[str]:
        """What was done to the shown frame."""
        names = []
        if self.picture.conversion is not None:
            names.append(self.picture.conversion.name)
        if self.video.is_interlaced(self.shown[1]):
            names.append(DEINTERLACER)
        return names

    def scan(self, request: DecodeRequest, output: Output) -> DecodeResponse:
        """The next small pictures. Damaged frames show what the decoder made of them."""
        times: list[float] = []
        out: np.ndarray | None = None
        while self.number < request.first and self.failure is None and self.upcoming[1] is not None:
            self.advance()
        while len(times) < request.count and self.failure is None and self.upcoming[1] is not None:
            when, frame, _ = self.upcoming
            if not self.picture.height:
                self.picture.height, self.picture.width = scan_size(self.video.shown_aspect(frame))
            if out is None:
                out = output.array((request.count, self.picture.height, self.picture.width, 3))
            out[len(times)] = self.picture(frame)
            times.append(when)
            self.advance()
        if self.failure is not None and self.failure.reason == "out_of_memory":
            return DecodeResponse(failure=self.failure)  # what follows may be sound
        ended = self.failure is not None or self.upcoming[1] is None
        return DecodeResponse(
            times=tuple(times),
            shape=(len(times), self.picture.height, self.picture.width, 3),
            ended=ended,
        )


def scan_size(aspect: float) -> tuple[int, int]:
    """Height and width of a scan's pictures: the long side is SCAN_SIDE, both are even."""
    height, width = (
        (SCAN_SIDE / aspect, SCAN_SIDE) if aspect >= 1 else (SCAN_SIDE, SCAN_SIDE * aspect)
    )
    return max(8, round(height / 2) * 2), max(8, round(width / 2) * 2)


class PyAVServer:
    """Answers requests; keeps the last video open."""

    def __init__(self, input_fd: int) -> None:
        self.input_fd = input_fd
        self.session: Session | None = None

    def answer(self, request: DecodeRequest, output: Output) -> DecodeResponse:
        """Do one request; every way in which a file can be bad becomes a DecodeFailure."""
        try:
            if request.kind == "probe":
                with self._open(request) as raw:
                    file = ByteRange(raw, request.offset, request.size)
                    info = probe(file, request.max_pixels, request.hdr, request.interlaced)
                    return DecodeResponse(info=info)
            if request.kind == "clip":
                with self._open(request) as raw:
                    return DecodeResponse(
                        shape=whole_clip(
                            ByteRange(raw, request.offset, request.size), request.max_pixels, output
                        )
                    )
            if self.session is None or not self.session.goes_on_to(request):
                self.forget()
                self.session = Session(self._open(request), request)
            if request.kind == "scan":
                return self.session.scan(request, output)
            out = output.array(
                (len(request.starts_s), request.num_frames, request.height, request.width, 3)
            )
            return self.session.decode(request, out)
        except FileNotFoundError:
            return DecodeResponse(failure=DecodeFailure("missing_file", request.path))
        except PermissionError:
            return DecodeResponse(failure=DecodeFailure("unreadable_file", request.path))
        except DECODER_ERRORS as error:
            self.forget()
            return DecodeResponse(failure=failure_of(error))

    def forget(self) -> None:
        if self.session is not None:
            self.session.close()
        self.session = None

    def _open(self, request: DecodeRequest) -> io.RawIOBase:
        return open(request.path or os.dup(self.input_fd), "rb", buffering=0)


def whole_clip(file: io.RawIOBase, max_pixels: int, output: Output) -> tuple[int, ...]:
    """All frames of a clip into the shared memory, as large as they are; -> their shape. Raises Refused."""
    with open_video(file, max_pixels) as video:
        count, height, width = 0, video.context.height, video.context.width
        out = output.array((video.stream.frames, height, width, 3))
        picture = Picture(video, height, width, max_pixels)
        for count, frame in enumerate(video.frames(), start=1):
            if count > len(out):
                raise Refused("damaged", f"more frames than the {len(out)} of its index")
            out[count - 1] = picture(frame)
    return (count, *out.shape[1:])


def main(parent: int, memory_limit: int, connection_fd: int, input_fd: int) -> None:
    """Serve requests until the connection closes or the parent is gone."""
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    serve(PyAVServer(input_fd).answer, parent, memory_limit, connection_fd)
