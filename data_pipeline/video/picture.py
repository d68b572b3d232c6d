"""Frames of any video as RGB pictures of one size, in SDR BT.709."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import ColorRange

from landiff.data_pipeline.video.color import (
    RGB_MATRIX,
    UNSPECIFIED,
    ColorConversion,
    SdrConverter,
    hdr_detail,
    tags_of,
)
from landiff.data_pipeline.video.protocol import Refused

if TYPE_CHECKING:
    from landiff.data_pipeline.video.frames import Video

TRANSPOSE = {90: ("cclock",), 180: ("clock", "clock"), 270: ("clock",)}
SCALE_MATRICES = {1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}
WIDE_FORMAT = (
    "gbrp16le"  # for conversions; swscale's rgb48le is wrong for 4:2:0 of 10 bits in its own size
)


@dataclass
class Picture:
    """Frames -> RGB of one size: rotated, scaled to cover, centre-cropped, in SDR BT.709."""

    video: Video
    height: int
    width: int
    max_pixels: int
    crop: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    hdr: str = "convert"
    key: tuple = ()
    conversion: ColorConversion | None = None  # of the last frame
    converter: SdrConverter | None = None
    graph: av.filter.Graph | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """-> uint8 [height, width, 3]."""
        turn = self.video.turn_of(frame)
        key = (
            frame.width,
            frame.height,
            frame.format.name,
            turn,
            tags_of(frame),
            int(frame.color_range),
        )
        if key != self.key:
            if frame.width * frame.height > self.max_pixels:
                raise Refused("too_large", f"{frame.width}x{frame.height}")
            self._set_conversion(frame)
            self.graph, self.key = self._build(frame, turn), key
        self.graph.push(frame)
        picture = self.graph.pull().to_ndarray()
        return picture if self.converter is None else self.converter(picture)

    def _set_conversion(self, frame: av.VideoFrame) -> None:
        self.conversion, self.converter = self.video.conversion_of(frame), None
        if self.conversion is not None:
            if self.hdr == "reject":
                raise Refused("hdr", hdr_detail(self.conversion))
            self.converter = SdrConverter(self.conversion, white_of(frame))

    def _build(self, frame: av.VideoFrame, turn: int) -> av.filter.Graph:
        turns = TRANSPOSE.get(turn, ())
        height, width = frame.height, frame.width
        if len(turns) == 1:
            height, width = width, height
        left, top, right, bottom = (
            math.ceil(share * side - 1e-6)
            for share, side in zip(self.crop, (width, height) * 2, strict=True)
        )
        kept = (max(1, height - top - bottom), max(1, width - left - right))
        scale = self.video.pixel_aspect(90 if len(turns) == 1 else 0)
        shown = (kept[0] * scale[0], kept[1] * scale[1])
        factor = max(self.height / shown[0], self.width / shown[1])
        height, width = (
            max(self.height, round(shown[0] * factor)),
            max(self.width, round(shown[1] * factor)),
        )
        flags = "area" if factor <= 1 else "bicubic"
        flags += "+accurate_rnd+full_chroma_int+bitexact"
        pixels = "rgb24" if self.conversion is None else WIDE_FORMAT
        graph = av.filter.Graph()
        graph.threads = 1  # processes share the cores
        chain = [
            graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=self.video.stream.time_base,
            )
        ]
        chain += [graph.add("transpose", turn) for turn in turns]
        if any(self.crop):
            chain.append(graph.add("crop", f"{kept[1]}:{kept[0]}:{left}:{top}"))
        chain += [
            graph.add("scale", f"{width}:{height}:flags={flags}{self._matrix(frame)}"),
            graph.add("format", pixels),
            graph.add("crop", f"{self.width}:{self.height}"),
            graph.add("buffersink"),
        ]
        for before, after in itertools.pairwise(chain):
            before.link_to(after)
        graph.configure()
        return graph

    def _matrix(self, frame: av.VideoFrame) -> str:
        """Scale options for frames without a matrix: the container's, or the usual one."""
        if int(frame.colorspace) != UNSPECIFIED:
            return ""
        if self.video.tags.matrix not in (UNSPECIFIED, RGB_MATRIX):
            return f":in_color_matrix={SCALE_MATRICES[self.video.tags.matrix]}"
        if self.conversion is not None and self.conversion.unspecified_matrix:
            return ":in_color_matrix=bt2020"
        high_definition = frame.width >= 1280 or frame.height > 576
        return ":in_color_matrix=bt709" if high_definition else ""


def white_of(frame: av.VideoFrame) -> int:
    """The 16-bit value that swscale gives in WIDE_FORMAT for the largest nominal signal."""
    is_full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    if is_full or frame.format.is_rgb:
        bits = frame.format.components[0].bits
        return (1 << bits) - 1 << 16 - bits
    return 65283
