"""Decoding and encoding of video files. No other module calls a video library's codecs.

`SafeDecoder` decodes source videos, exact in time. `encode_clip` writes the clips of raw shards and
`ClipDecoder` decodes them. Both decoders work in child processes. Frames are uint8 [T, H, W, 3],
RGB.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from landiff.configs.files import atomic_file
from landiff.data_pipeline.video.h264 import H264Encoder
from landiff.data_pipeline.video.process import Backend, DecoderProcess
from landiff.data_pipeline.video.protocol import (
    NO_CROP,
    DecodeFailure,
    DecodeRequest,
    VideoInfo,
)

Crop = tuple[float, float, float, float]  # fractions cut off: left, top, right, bottom
Handling = Literal["convert", "reject"]
TIMEOUT_S = 60.0  # of one request
MEMORY_LIMIT = 3 << 30  # bytes of a child process
RECYCLE = 2000  # requests after which a child process is replaced
MAX_PIXELS = 4096 * 2304  # of a source frame
SCAN_BATCH = 128  # pictures of one scan request


class ClipDamaged(ValueError):
    """A clip of a raw shard has no frames.

    Its bytes are not those that were written, or its decoder failed, died or hung.
    """

    def __init__(self, failure: DecodeFailure) -> None:
        super().__init__(f"{failure.reason}: {failure.detail}")
        self.failure = failure


# ---------------------------------------------------------------------------------- source videos


@dataclass(frozen=True)
class VideoFile:
    """A video as a range of bytes in a file: a whole file, or a member of a tar."""

    path: Path
    offset: int = 0
    size: int = -1  # -1: up to the end


@dataclass(frozen=True)
class Wanted:
    """Format of decoded spans: `num_frames` frames, displayed at start + k / fps."""

    num_frames: int
    fps: float
    height: int
    width: int
    crop: Crop = NO_CROP  # applied before scaling


@dataclass(frozen=True)
class DecodedSpan:
    """Frames of a span and the conversions applied to them."""

    frames: np.ndarray  # uint8 [num_frames, height, width, 3]
    conversions: tuple[str, ...] = ()  # "bwdif", or source colours such as "smpte2084/bt2020"


@dataclass(frozen=True)
class Scanned:
    """A batch of small pictures from a scan."""

    times: tuple[float, ...]  # s since the first frame
    frames: np.ndarray  # uint8 [len(times), H, W, 3]


class ScanFailed(ValueError):
    """A video cannot be scanned."""

    def __init__(self, failure: DecodeFailure) -> None:
        super().__init__(f"{failure.reason}: {failure.detail}")
        self.failure = failure


class SafeDecoder:
    """Decodes files that may crash a decoder, hang it or exhaust its memory.

    PyAV decodes in a child process (`DecoderProcess`). `hdr` applies to HDR and wide-gamut video,
    `interlaced` to interlaced video: "convert" gives progressive SDR BT.709 frames, "reject" gives
    a DecodeFailure. Not thread-safe.
    """

    def __init__(
        self,
        *,
        timeout_s: float = TIMEOUT_S,
        memory_limit: int = MEMORY_LIMIT,
        max_pixels: int = MAX_PIXELS,
        recycle: int = RECYCLE,
        hdr: Handling = "convert",
        interlaced: Handling = "convert",
    ) -> None:
        self.max_pixels = max_pixels
        self.hdr = hdr
        self.interlaced = interlaced
        self._group = 0
        self.process = DecoderProcess(
            "pyav", timeout_s=timeout_s, memory_limit=memory_limit, recycle=recycle
        )

    def __enter__(self) -> SafeDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the child process."""
        self.process.close()

    def begin(self) -> None:
        """Forget the file that was decoded last.

        Results after this call do not depend on earlier requests. Otherwise damage at the start of
        a file would be known to a decoder that has seen the start, and not to others.
        """
        self._group += 1

    def probe(self, video: VideoFile | bytes) -> VideoInfo | DecodeFailure:
        """Read size, rate, codec and true duration without decoding."""
        response, _ = self.process.ask(self._request(video))
        if response.failure is not None:
            return response.failure
        assert response.info is not None, response
        return response.info

    def decode(
        self, video: VideoFile | bytes, starts_s: Sequence[float], wanted: Wanted
    ) -> list[np.ndarray | DecodeFailure]:
        """Decode spans like `decode_spans`. Returns only frames, without conversions."""
        results: list[np.ndarray | DecodeFailure] = []
        for span in self.decode_spans(video, starts_s, wanted):
            results.append(span.frames if isinstance(span, DecodedSpan) else span)
        return results

    def decode_spans(
        self, video: VideoFile | bytes, starts_s: Sequence[float], wanted: Wanted
    ) -> list[DecodedSpan | DecodeFailure]:
        """Decode one span for each start time, in seconds since the first frame.

        Returns the frames of each span, or why there are none. Successive calls for later parts of
        one file decode it only once, up to the next `begin`. All spans of a call share one block of
        memory, which is freed when the last of them is deleted.
        """
        request = replace(
            self._request(video), kind="decode", starts_s=tuple(starts_s), **asdict(wanted)
        )
        response, frames = self.process.ask(request)
        if response.failure is not None:
            return [response.failure] * len(starts_s)
        spans: list[DecodedSpan | DecodeFailure] = []
        for index, failure in enumerate(response.spans):
            if failure is not None:
                spans.append(failure)
            else:
                assert frames is not None, response
                spans.append(DecodedSpan(frames[index], response.conversions[index]))
        return spans

    def scan(self, video: VideoFile | bytes, *, keyframes: bool = False) -> Iterator[Scanned]:
        """Yield small pictures of all frames in order, in batches. Raises ScanFailed.

        With `keyframes`, only key frames are decoded.
        """
        first = 0
        ended = False
        while not ended:
            request = replace(
                self._request(video),
                kind="scan",
                first=first,
                count=SCAN_BATCH,
                keyframes=keyframes,
            )
            response, frames = self.process.ask(request)
            if response.failure is not None:
                raise ScanFailed(response.failure)
            if response.times:
                assert frames is not None, response
                yield Scanned(response.times, frames)
            first += len(response.times)
            ended = response.ended

    def _request(self, video: VideoFile | bytes) -> DecodeRequest:
        """Build a probe request. Bytes are passed to the child."""
        request = DecodeRequest(
            hdr=self.hdr,
            interlaced=self.interlaced,
            group=self._group,
            max_pixels=self.max_pixels,
            timeout_s=self.process.timeout_s,
        )
        if isinstance(video, bytes):
            self.process.put(video)
            return replace(request, size=len(video))
        path = os.fspath(video.path.absolute())
        return replace(request, path=path, offset=video.offset, size=video.size)


# --------------------------------------------------------------------------- clips of raw shards


def encode_clip(
    frames_THWC: np.ndarray, fps: float, *, crf: float = 14, preset: str = "slow"
) -> bytes:
    """Encode uint8 [T, H, W, 3] of even size as MP4: H.264, yuv420p, BT.709, one closed GOP.

    Equal frames give equal bytes: one thread, no time stamps, no encoder banner. A lower `crf` of
    x264 gives higher quality. Raises ValueError for other shapes.
    """
    height, width = frames_THWC.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"yuv420p needs an even height and width; the frames are {height}x{width}")
    buffer = io.BytesIO()
    _write_h264(buffer, frames_THWC, fps, {"crf": str(crf), "preset": preset}, faststart=False)
    return buffer.getvalue()


def write_mp4(
    path: Path, frames_THWC: np.ndarray, fps: float, *, crf: float = 18, comment: str = ""
) -> None:
    """Write an MP4 that all players support: H.264 High, yuv420p, index first.

    For odd sizes, the last row or column is repeated. `comment` is stored as the metadata of that
    name (`read_comment`).
    """
    with Mp4Writer(path, len(frames_THWC), fps, crf=crf, comment=comment) as writer:
        writer.add(frames_THWC)


class Mp4Writer:
    """Context manager that writes the file of `write_mp4` from parts, byte for byte.

    The file appears under its final name when all frames are written, or not at all.
    """

    def __init__(
        self, path: Path, num_frames: int, fps: float, *, crf: float = 18, comment: str = ""
    ) -> None:
        """num_frames: of all parts together. Other arguments are those of `write_mp4`."""
        self.path = path
        self.num_frames = num_frames
        self.fps = fps
        self.comment = comment
        self._options = {"crf": str(crf), "preset": "medium"}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Mp4Writer:
        file = self._stack.enter_context(atomic_file(self.path))
        # by name, because the muxer reads the file again to move the index to the front
        self._encoder = H264Encoder(
            file.name,
            self.num_frames,
            self.fps,
            self._options,
            faststart=True,
            comment=self.comment,
        )
        self._stack.enter_context(self._encoder)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, frames_THWC: np.ndarray) -> None:
        """Append frames, uint8 [T, H, W, 3]."""
        height, width = frames_THWC.shape[1:3]
        even = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self._encoder.add(even)


def read_comment(path: Path) -> str:
    """The comment of an MP4 file that `write_mp4` wrote; empty if it has none.

    Raises OSError if the file cannot be read as a video.
    """
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment", "")
    except av.FFmpegError as error:
        raise OSError(f"{path} is not a video: {error}") from None


def spaced_frames(path: Path, count: int) -> np.ndarray:
    """`count` evenly spaced frames of a video of this project, the first and the last included.

    uint8 [count, H, W, 3], decoded in this process in memory that does not depend on the length.
    For videos of others, which may be damaged or hostile, use `ClipDecoder`. Raises OSError if the
    file cannot be read as a video.
    """
    chosen: dict[int, np.ndarray] = {}
    try:
        with av.open(str(path)) as container:
            length = container.streams.video[0].frames
            wanted = np.linspace(0, length - 1, count).round().astype(int).tolist()
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    chosen[index] = frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise OSError(f"{path} is not a video: {error}") from None
    if not chosen or max(wanted) not in chosen:
        raise OSError(f"{path} lacks frames")
    return np.stack([chosen[index] for index in wanted])


class ClipDecoder:
    """Decodes clips written by `encode_clip` in a child process (`DecoderProcess`).

    decord is faster, the colours of PyAV are more exact. They never share a process, because each
    has its own FFmpeg. Not thread-safe.
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
        """Stop the child process."""
        self.process.close()

    def decode(self, clip: bytes, *, sha256: str | None = None) -> np.ndarray:
        """Decode all frames, uint8 [T, H, W, 3].

        Raises ClipDamaged if the clip does not have the checksum `sha256`
        (RawSample.video_sha256), or if its decoder fails.
        """
        if sha256 is not None:
            found = hashlib.sha256(clip).hexdigest()
            if found != sha256:
                detail = (
                    f"the clip has sha256 {found[:16]}..., but its sample says {sha256[:16]}...; "
                    "the shard is damaged"
                )
                raise ClipDamaged(DecodeFailure("damaged", detail))
        self.process.put(clip)
        request = DecodeRequest(kind="clip", size=len(clip), timeout_s=self.process.timeout_s)
        response, frames = self.process.ask(request)
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
    comment: str = "",
) -> None:
    """Write frames of even size as H.264 in MP4. `options` are x264's."""
    encoder = H264Encoder(
        target, len(frames_THWC), fps, options, faststart=faststart, comment=comment
    )
    with encoder:
        encoder.add(frames_THWC)
