"""The only decoder and encoder of video files.

Foreign videos are decoded by `SafeDecoder`, exact by time; the clips that `encode_clip` made by `ClipDecoder`.
Both work in child processes. Frames are uint8 [T, H, W, 3], RGB.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from landiff.configs.files import atomic_file
from landiff.data_pipeline.video.process import Backend, DecoderProcess
from landiff.data_pipeline.video.protocol import DecodeFailure, DecodeRequest, VideoInfo

Crop = tuple[float, float, float, float]
Handling = Literal["convert", "reject"]
TIMEOUT_S = 60.0  # for one request
MEMORY_LIMIT = 3 << 30  # of a child
RECYCLE = 2000  # requests of one child
SCAN_BATCH = 128  # pictures of a scan at once
# Equal frames, equal bytes. x264's macroblock tree reads stale memory in small frames: the same call gave
# up to three different streams. cpu-independent keeps the choice of SIMD code out of the result.
X264_EXACT = "threads=1:mbtree=0:cpu-independent=1"


class ClipDamaged(ValueError):
    """A normalised clip has no frames: it is not what was written, or its decoder died or hung."""

    def __init__(self, failure: DecodeFailure) -> None:
        super().__init__(f"{failure.reason}: {failure.detail}")
        self.failure = failure


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
    crop: Crop = (
        0.0,
        0.0,
        0.0,
        0.0,
    )  # share of the picture to cut off first: left, top, right, bottom


@dataclass(frozen=True)
class DecodedSpan:
    """The frames of a span, and what was done to them."""

    frames: np.ndarray  # uint8 [num_frames, height, width, 3]
    conversions: tuple[str, ...] = ()  # "smpte2084/bt2020": from these colours; "bwdif"


@dataclass(frozen=True)
class Scanned:
    """Some frames of a video, small."""

    times: tuple[float, ...]  # s since the first frame
    frames: np.ndarray  # uint8 [len(times), H, W, 3]


class ScanFailed(ValueError):
    """A video that can't be looked through."""

    def __init__(self, failure: DecodeFailure) -> None:
        super().__init__(f"{failure.reason}: {failure.detail}")
        self.failure = failure


class SafeDecoder:
    """Decodes files that may crash, hang or eat memory: PyAV in a child process (`DecoderProcess`) does it.

    `hdr` tells what happens to HDR and wide-gamut video, `interlaced` to interlaced video:
    "convert" makes SDR BT.709 and progressive frames, "reject" gives a DecodeFailure. Not for use by two
    threads at once.
    """

    def __init__(
        self,
        *,
        timeout_s: float = TIMEOUT_S,
        memory_limit: int = MEMORY_LIMIT,
        max_pixels: int = 4096 * 2304,
        recycle: int = RECYCLE,
        hdr: Handling = "convert",
        interlaced: Handling = "convert",
    ) -> None:
        self.max_pixels = max_pixels
        self.handling = {"hdr": hdr, "interlaced": interlaced}
        self._group = 0
        self.process = DecoderProcess(
            "pyav", timeout_s=timeout_s, memory_limit=memory_limit, recycle=recycle
        )

    def __enter__(self) -> SafeDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.close()

    def begin(self) -> None:
        """Forget the file that was decoded last.

        What comes then depends on nothing before: else a file that goes on would be known as damaged by the one that
        saw its beginning, and not by another.
        """
        self._group += 1

    def probe(self, video: VideoFile | bytes) -> VideoInfo | DecodeFailure:
        """Size, rate, codec and true duration, without decoding."""
        response, _ = self.process.ask(self._request(video))
        return response.failure or response.info

    def decode(
        self, video: VideoFile | bytes, starts_s: Sequence[float], wanted: Wanted
    ) -> list[np.ndarray | DecodeFailure]:
        """The frames that `decode_spans` returns, without their conversions."""
        spans = self.decode_spans(video, starts_s, wanted)
        return [span.frames if isinstance(span, DecodedSpan) else span for span in spans]

    def decode_spans(
        self, video: VideoFile | bytes, starts_s: Sequence[float], wanted: Wanted
    ) -> list[DecodedSpan | DecodeFailure]:
        """One entry for each start: its frames, or why there are none.

        Calls for later and later parts of one file decode it once, up to `begin`. The memory of all
        spans is freed with the last of them.
        """
        response, frames = self.process.ask(
            self._request(video, kind="decode", starts_s=tuple(starts_s), **asdict(wanted))
        )
        if response.failure:
            return [response.failure] * len(starts_s)
        spans: list[DecodedSpan | DecodeFailure] = []
        for number, failure in enumerate(response.spans):
            spans.append(failure or DecodedSpan(frames[number], response.conversions[number]))
        return spans

    def scan(self, video: VideoFile | bytes, *, keyframes: bool = False) -> Iterator[Scanned]:
        """Small pictures of all frames, in order, a batch at a time. Raises ScanFailed."""
        first, ended = 0, False
        while not ended:
            response, frames = self.process.ask(
                self._request(
                    video, kind="scan", first=first, count=SCAN_BATCH, keyframes=keyframes
                )
            )
            if response.failure:
                raise ScanFailed(response.failure)
            if response.times:
                yield Scanned(response.times, frames)
            first, ended = first + len(response.times), response.ended

    def _request(self, video: VideoFile | bytes, **wanted: object) -> DecodeRequest:
        if isinstance(video, bytes):
            self.process.put(video)
            source = {"path": "", "size": len(video)}
        else:
            source = {
                "path": os.fspath(video.path.absolute()),
                "offset": video.offset,
                "size": video.size,
            }
        return DecodeRequest(
            **source,
            max_pixels=self.max_pixels,
            timeout_s=self.process.timeout_s,
            group=self._group,
            **self.handling,
            **wanted,
        )


# ------------------------------------------------------------------------------------------ our own clips


def encode_clip(
    frames_THWC: np.ndarray, fps: float, *, crf: float = 14, preset: str = "slow"
) -> bytes:
    """uint8 [T, H, W, 3], even sizes -> MP4 bytes: H.264, yuv420p, BT.709, one closed GOP.

    Equal frames give equal bytes: one thread, no clock, no banner. `crf` is x264's quality, lower is better.
    """
    if frames_THWC.shape[1] % 2 or frames_THWC.shape[2] % 2:
        raise ValueError(
            f"yuv420p wants even sizes; the frames are {frames_THWC.shape[1]}x{frames_THWC.shape[2]}"
        )
    buffer = io.BytesIO()
    _write_h264(buffer, frames_THWC, fps, {"crf": str(crf), "preset": preset}, faststart=False)
    return buffer.getvalue()


def write_mp4(path: Path, frames_THWC: np.ndarray, fps: float, *, crf: float = 18) -> None:
    """Write an MP4 that plays everywhere: H.264 High, yuv420p, index first; odd sizes get a repeated edge."""
    height, width = frames_THWC.shape[1:3]
    even = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic_file(path) as file:  # by name: moving the index to the front needs to read it again
        _write_h264(file.name, even, fps, {"crf": str(crf), "preset": "medium"}, faststart=True)


class ClipDecoder:
    """Decodes bytes of `encode_clip`, in a child process (`DecoderProcess`). Not for use by two threads at once.

    decord is the faster one; PyAV's colours are the more exact. They never share a process: each has its own FFmpeg.
    """

    def __init__(
        self,
        backend: Backend = "decord",
        *,
        timeout_s: float = TIMEOUT_S,
        memory_limit: int = MEMORY_LIMIT,
        recycle: int = RECYCLE,
    ) -> None:
        self.process = DecoderProcess(
            backend, timeout_s=timeout_s, memory_limit=memory_limit, recycle=recycle
        )

    def __enter__(self) -> ClipDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.close()

    def decode(self, clip: bytes, *, sha256: str | None = None) -> np.ndarray:
        """All frames, uint8 [T, H, W, 3].

        Raises ClipDamaged: when `sha256` (RawSample.video_sha256) is given and differs, and when the decoder fails.
        """
        if sha256 is not None and (found := hashlib.sha256(clip).hexdigest()) != sha256:
            raise ClipDamaged(
                DecodeFailure(
                    "damaged",
                    f"the clip has sha256 {found[:16]}..., its sample says {sha256[:16]}...; the shard is damaged",
                )
            )
        self.process.put(clip)
        response, frames = self.process.ask(
            DecodeRequest(kind="clip", size=len(clip), timeout_s=self.process.timeout_s)
        )
        if frames is None:
            raise ClipDamaged(response.failure or DecodeFailure("damaged", "no frames"))
        return frames


def _write_h264(
    target: io.BytesIO | str,
    frames_THWC: np.ndarray,
    fps: float,
    options: dict[str, str],
    *,
    faststart: bool,
) -> None:
    if (
        frames_THWC.dtype != np.uint8
        or frames_THWC.ndim != 4
        or frames_THWC.shape[-1] != 3
        or not len(frames_THWC)
    ):
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3]; got {frames_THWC.dtype} {list(frames_THWC.shape)}"
        )
    rate = Fraction(fps).limit_denominator(1001)
    flags = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if faststart else {})
    with av.open(target, "w", format="mp4", options=flags) as container:
        length, height, width = frames_THWC.shape[:3]
        stream = container.add_stream(
            "libx264",
            rate=rate,
            options={
                **options,
                "x264-params": f"open-gop=0:keyint={length}:scenecut=0:{X264_EXACT}",
                "flags": "+bitexact",
            },
        )
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
                graph.push(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                )
                frame = graph.pull()
                frame.pts, frame.time_base = index, context_base
            for packet in stream.encode(frame):
                for kept in without_banner.filter(packet):
                    container.mux(kept)


def _to_yuv(width: int, height: int, time_base: Fraction) -> av.filter.Graph:
    graph = av.filter.Graph()
    chain = [
        graph.add_buffer(width=width, height=height, format="rgb24", time_base=time_base),
        graph.add(
            "scale",
            "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact:out_color_matrix=bt709:out_range=tv",
        ),
        graph.add("format", "yuv420p"),
        graph.add("buffersink"),
    ]
    for before, after in itertools.pairwise(chain):
        before.link_to(after)
    graph.configure()
    return graph
