"""The only decoder and encoder of video files.

Foreign videos are decoded by `SafeDecoder` (PyAV in a child process, exact by time). The clips that
`encode_clip` made are decoded by `decode_clip`, in this process. Frames are uint8 [T, H, W, 3], RGB.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from configs.files import atomic_file
from data_pipeline import video_child
from data_pipeline.video_child import Failure, Request, Response, VideoInfo

ClipBackend = Literal["decord", "pyav"]
Crop = tuple[float, float, float, float]
START_TIMEOUT_S = 60.0
SCAN_BATCH = 128  # pictures of a scan at once
# Equal frames, equal bytes. x264's macroblock tree reads stale memory in small frames: the same call gave
# up to three different streams. cpu-independent keeps the choice of SIMD code out of the result.
X264_EXACT = "threads=1:mbtree=0:cpu-independent=1"


class ClipDamaged(ValueError):
    """A normalised clip is not what was written."""


# ------------------------------------------------------------------------------------------ foreign videos


@dataclass(frozen=True)
class VideoFile:
    """A video as a range of bytes in a file: a whole file, or a member of a tar."""

    path: Path
    offset: int = 0
    size: int = -1  # -1: up to the end


@dataclass(frozen=True)
class Wanted:
    """What is wanted from a video: spans of `num_frames` frames, each shown at start + k / fps."""

    num_frames: int
    fps: float
    height: int
    width: int
    crop: Crop = (0.0, 0.0, 0.0, 0.0)  # share of the picture to cut off first: left, top, right, bottom


@dataclass(frozen=True)
class Scanned:
    """Some frames of a video, small."""

    times: tuple[float, ...]  # s since the first frame
    frames: np.ndarray  # uint8 [len(times), H, W, 3]


class ScanFailed(ValueError):
    """A video that can't be looked through."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.reason}: {failure.detail}")
        self.failure = failure


class SafeDecoder:
    """Decodes files that may crash, hang or eat memory: one long-lived child process does it.

    The child is replaced when it dies, exceeds `timeout_s`, and every `recycle` requests. It ends with its
    parent. Not for use by two threads at once.
    """

    def __init__(self, *, timeout_s: float = 60.0, memory_limit: int = 3 << 30, max_pixels: int = 4096 * 2304,
                 recycle: int = 2000) -> None:
        self.timeout_s, self.memory_limit, self.max_pixels, self.recycle = timeout_s, memory_limit, max_pixels, recycle
        self.starts = 0  # children started so far
        self._requests = 0  # of this child
        self._child: subprocess.Popen[bytes] | None = None
        self._input = os.memfd_create("landiff-video")
        self._output = os.memfd_create("landiff-frames")

    def __enter__(self) -> SafeDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the child, where one runs."""
        return self._child.pid if self._child else None

    def close(self) -> None:
        """End the child and free the shared memory."""
        self._stop()
        for fd in (self._input, self._output):
            if fd >= 0:
                os.close(fd)
        self._input = self._output = -1

    def probe(self, video: VideoFile | bytes) -> VideoInfo | Failure:
        """Size, rate, codec and true duration, without decoding."""
        response = self._ask(self._request(video))
        return response.failure or response.info

    def decode(self, video: VideoFile | bytes, starts_s: Sequence[float], wanted: Wanted) -> list[np.ndarray | Failure]:
        """One entry for each start: uint8 [num_frames, height, width, 3], or why there is none.

        Calls for later and later parts of one file decode it once.
        """
        shape = (len(starts_s), wanted.num_frames, wanted.height, wanted.width, 3)
        size = math.prod(shape)
        self._reserve(size)
        response = self._ask(self._request(video, kind="decode", starts_s=tuple(starts_s), **asdict(wanted)))
        if response.failure:
            return [response.failure] * len(starts_s)
        with mmap.mmap(self._output, size, prot=mmap.PROT_READ) as memory:
            frames = np.frombuffer(memory, np.uint8).reshape(shape).copy()
        return [failure or frames[span] for span, failure in enumerate(response.spans)]

    def scan(self, video: VideoFile | bytes, *, keyframes: bool = False) -> Iterator[Scanned]:
        """Small pictures of all frames, in order, a batch at a time. Raises ScanFailed."""
        self._reserve(SCAN_BATCH * video_child.SCAN_BYTES)
        first, ended = 0, False
        while not ended:
            response = self._ask(self._request(video, kind="scan", first=first, count=SCAN_BATCH, keyframes=keyframes))
            if response.failure:
                raise ScanFailed(response.failure)
            shape = (len(response.times), *response.size, 3)
            if response.times:
                with mmap.mmap(self._output, math.prod(shape), prot=mmap.PROT_READ) as memory:
                    yield Scanned(response.times, np.frombuffer(memory, np.uint8).reshape(shape).copy())
            first, ended = first + len(response.times), response.ended

    def _reserve(self, size: int) -> None:
        if os.fstat(self._output).st_size < size:
            os.ftruncate(self._output, size)

    def _request(self, video: VideoFile | bytes, **wanted: object) -> Request:
        if isinstance(video, bytes):
            os.ftruncate(self._input, 0)
            with os.fdopen(os.dup(self._input), "wb") as file:
                file.seek(0)
                file.write(video)
            source = {"path": "", "size": len(video)}
        else:
            source = {"path": os.fspath(video.path.absolute()), "offset": video.offset, "size": video.size}
        return Request(**source, max_pixels=self.max_pixels, timeout_s=self.timeout_s, **wanted)

    def _ask(self, request: Request) -> Response:
        if self._child is None or self._requests >= self.recycle:
            self._stop()
            self._start()
        self._requests += 1
        try:
            self._child.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            reply = json.loads(self._read_line(self.timeout_s))
        except TimeoutError:
            self._stop()
            return Response(failure=Failure("timeout", f"more than {self.timeout_s:g} s"))
        except (EOFError, BrokenPipeError):
            code = self._child.wait()
            self._stop()
            return Response(failure=Failure("decoder_died", signal.Signals(-code).name if code < 0 else f"exit {code}"))
        return Response(
            failure=Failure(**reply["failure"]) if reply["failure"] else None,
            info=VideoInfo(**reply["info"]) if reply["info"] else None,
            spans=tuple(Failure(**failure) if failure else None for failure in reply["spans"]),
            times=tuple(reply["times"]), size=tuple(reply["size"]), ended=reply["ended"],
        )

    def _start(self) -> None:
        # -P: the folder of the script would shadow packages by the names of its neighbours
        command = [sys.executable, "-P", video_child.__file__, *map(str, (os.getpid(), self.memory_limit, self._input, self._output))]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       bufsize=0, pass_fds=(self._input, self._output))
        self._requests = 0
        self.starts += 1
        try:
            self._read_line(START_TIMEOUT_S)
        except (EOFError, TimeoutError):
            self._stop()
            raise RuntimeError(f"the decoder process does not start; try it by hand: {' '.join(command)}") from None

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()

    def _read_line(self, timeout_s: float) -> bytes:
        until, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(self._child.stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError
            line += data
        return line


# ------------------------------------------------------------------------------------------ our own clips


def encode_clip(frames_THWC: np.ndarray, fps: float, *, crf: float = 14, preset: str = "slow") -> bytes:
    """uint8 [T, H, W, 3], even sizes -> MP4 bytes: H.264, yuv420p, BT.709, one closed GOP.

    Equal frames give equal bytes: one thread, no clock, no banner. `crf` is x264's quality, lower is better.
    """
    if frames_THWC.shape[1] % 2 or frames_THWC.shape[2] % 2:
        raise ValueError(f"yuv420p wants even sizes; the frames are {frames_THWC.shape[1]}x{frames_THWC.shape[2]}")
    buffer = io.BytesIO()
    _write_h264(buffer, frames_THWC, fps, {"crf": str(crf), "preset": preset}, faststart=False)
    return buffer.getvalue()


def write_mp4(path: Path, frames_THWC: np.ndarray, fps: float, *, crf: float = 18) -> None:
    """Write an MP4 that plays everywhere: H.264 High, yuv420p, index first; odd sizes get a repeated edge."""
    height, width = frames_THWC.shape[1:3]
    even = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic_file(path) as file:  # by name: moving the index to the front needs to read it again
        _write_h264(file.name, even, fps, {"crf": str(crf), "preset": "medium"}, faststart=True)


def decode_clip(data: bytes, *, backend: ClipBackend = "decord", sha256: str | None = None) -> np.ndarray:
    """Bytes of `encode_clip` -> all frames, uint8 [T, H, W, 3].

    Only for clips we made: a foreign file can take the process down. Raises ClipDamaged when `sha256`
    (RawSample.video_sha256) is given and differs.
    """
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ClipDamaged(f"the clip has sha256 {found[:16]}..., its sample says {sha256[:16]}...; the shard is damaged")
    return _decode_decord(data) if backend == "decord" else _decode_pyav(data)


def _decode_decord(data: bytes) -> np.ndarray:
    import decord  # here, because it loads a second FFmpeg

    # Through a path, since decord can crash on byte streams; all frames in order, since its seeking is not exact.
    fd = os.memfd_create("landiff-clip")
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(data)
        reader = decord.VideoReader(f"/proc/self/fd/{fd}", num_threads=1)
        frames = reader.get_batch(range(len(reader))).asnumpy()
        del reader  # an idle reader decodes ahead and keeps it all
    except decord.DECORDError as error:
        raise ClipDamaged(f"decord cannot read the clip (it also refuses widths of 8, 16, 24, 48 and 72): "
                          f"{str(error).splitlines()[0]}; the other choice is pyav") from None
    finally:
        os.close(fd)
    # decord's colour conversion cuts off fractions: -1.0, -1.5, -1.0 levels in R, G, B whatever the content
    return np.array([0, *range(2, 256), 255], np.uint8)[frames]


def _decode_pyav(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        context = stream.codec_context
        picture = video_child.Picture(stream, context.height, context.width, context.height * context.width)
        return np.stack([picture(frame) for frame in container.decode(stream)])


def _write_h264(target: io.BytesIO | str, frames_THWC: np.ndarray, fps: float, options: dict[str, str], *, faststart: bool) -> None:
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or not len(frames_THWC):
        raise ValueError(f"frames must be uint8 [T, H, W, 3]; got {frames_THWC.dtype} {list(frames_THWC.shape)}")
    rate = Fraction(fps).limit_denominator(1001)
    flags = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if faststart else {})
    with av.open(target, "w", format="mp4", options=flags) as container:
        length, height, width = frames_THWC.shape[:3]
        stream = container.add_stream("libx264", rate=rate, options={
            **options, "x264-params": f"open-gop=0:keyint={length}:scenecut=0:{X264_EXACT}", "flags": "+bitexact",
        })
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = context_base = 1 / rate
        context = stream.codec_context
        context.time_base, context.thread_count = context_base, 1
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        graph = _to_yuv(width, height, context_base)
        container.start_encoding()
        # the banner (SEI) of x264 is larger than a small clip's picture data, and names the build
        without_banner = BitStreamFilterContext("filter_units=remove_types=6", stream)
        for index, picture in enumerate([*frames_THWC, None]):
            frame = None
            if picture is not None:
                graph.push(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
                frame = graph.pull()
                frame.pts, frame.time_base = index, context_base
            for packet in stream.encode(frame):
                for kept in without_banner.filter(packet):
                    container.mux(kept)


def _to_yuv(width: int, height: int, time_base: Fraction) -> av.filter.Graph:
    graph = av.filter.Graph()
    chain = [
        graph.add_buffer(width=width, height=height, format="rgb24", time_base=time_base),
        graph.add("scale", "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact:out_color_matrix=bt709:out_range=tv"),
        graph.add("format", "yuv420p"),
        graph.add("buffersink"),
    ]
    for before, after in itertools.pairwise(chain):
        before.link_to(after)
    graph.configure()
    return graph
