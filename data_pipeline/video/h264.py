"""H.264 in MP4, encoded frame by frame, so that equal frames give equal bytes."""

from __future__ import annotations

import contextlib
import io
import itertools
from fractions import Fraction

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

# Options with which equal frames give equal bytes. x264's macroblock tree reads uninitialized
# memory for small frames: the same call gave up to three different streams. cpu-independent makes
# the result independent of the SIMD code that x264 selects.
X264_EXACT = "threads=1:mbtree=0:cpu-independent=1"


class H264Encoder:
    """Context manager that encodes frames of even size, given in any parts, as H.264 in MP4."""

    def __init__(
        self,
        target: io.BytesIO | str,
        num_frames: int,
        fps: float,
        options: dict[str, str],
        *,
        faststart: bool,
        comment: str = "",
    ) -> None:
        """Open `target`. num_frames: of the whole video. options: of x264."""
        self.added = 0
        self.num_frames = num_frames
        self._target = target
        self._comment = comment
        self._time_base = 1 / Fraction(fps).limit_denominator(1001)
        self._container_options = {"fflags": "+bitexact"}
        if faststart:
            self._container_options["movflags"] = "+faststart"
        self._stream_options = {
            **options,
            "x264-params": f"open-gop=0:keyint={num_frames}:scenecut=0:{X264_EXACT}",
            "flags": "+bitexact",
        }
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> H264Encoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                if self.added != self.num_frames or not self.added:
                    raise ValueError(
                        f"{self.added} frames were added to a video of {self.num_frames}"
                    )
                self._encode(None)

    def add(self, frames_THWC: np.ndarray) -> None:
        """Encode the next frames. Raises ValueError for frames of another shape or type."""
        is_rgb = frames_THWC.ndim == 4 and frames_THWC.shape[-1] == 3
        if frames_THWC.dtype != np.uint8 or not is_rgb:
            raise ValueError(
                "frames must be uint8 [T, H, W, 3]; got "
                f"{frames_THWC.dtype} {list(frames_THWC.shape)}"
            )
        for frame_HWC in frames_THWC:
            if not self.added:
                self._open(*frame_HWC.shape[:2])
            picture = np.ascontiguousarray(frame_HWC)
            self._graph.push(av.VideoFrame.from_ndarray(picture, format="rgb24"))
            frame = self._graph.pull()
            frame.pts = self.added
            frame.time_base = self._time_base
            self._encode(frame)
            self.added += 1

    def _open(self, height: int, width: int) -> None:
        """Write the header of a video of this size."""
        container = self._stack.enter_context(
            av.open(self._target, "w", format="mp4", options=self._container_options)
        )
        if self._comment:
            container.metadata["comment"] = self._comment
        stream = container.add_stream(
            "libx264", rate=1 / self._time_base, options=self._stream_options
        )
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        stream.time_base = self._time_base
        context = stream.codec_context
        context.time_base = self._time_base
        context.thread_count = 1
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        self._graph = rgb_to_yuv(width, height, self._time_base)
        container.start_encoding()
        self._container = container
        self._stream = stream
        # The banner of x264, an SEI message, is larger than the pictures of a small clip, and it
        # names the build.
        self._without_banner = BitStreamFilterContext("filter_units=remove_types=6", stream)

    def _encode(self, frame: av.VideoFrame | None) -> None:
        """Encode a frame; None flushes the encoder."""
        for packet in self._stream.encode(frame):
            for kept in self._without_banner.filter(packet):
                self._container.mux(kept)


def rgb_to_yuv(width: int, height: int, time_base: Fraction) -> av.filter.Graph:
    """Build the filter graph from RGB to yuv420p, BT.709."""
    scale_options = (
        "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
        ":out_color_matrix=bt709:out_range=tv"
    )
    graph = av.filter.Graph()
    chain = [
        graph.add_buffer(width=width, height=height, format="rgb24", time_base=time_base),
        graph.add("scale", scale_options),
        graph.add("format", "yuv420p"),
        graph.add("buffersink"),
    ]
    for before, after in itertools.pairwise(chain):
        before.link_to(after)
    graph.configure()
    return graph
