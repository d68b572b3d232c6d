"""Conversion of decoded frames to RGB pictures of one size, in SDR BT.709."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from landiff.data_pipeline.video.protocol import NO_CROP, Refused

if TYPE_CHECKING:
    from landiff.data_pipeline.video.frames import Video

# arguments of FFmpeg's transpose filters by rotation in degrees
TRANSPOSE = {90: ("cclock",), 180: ("clock", "clock"), 270: ("clock",)}
SCALE_MATRICES = {1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}
# Pixel format before a conversion. swscale's rgb48le is wrong for 4:2:0 of 10 bits without scaling.
WIDE_FORMAT = "gbrp16le"


@dataclass
class Picture:
    """Converts frames to RGB of one size in SDR BT.709.

    Frames are rotated, cropped by `crop`, scaled to cover the size, and centre-cropped. The filter
    graph is rebuilt when the format of the frames changes.
    """

    video: Video
    height: int
    width: int
    max_pixels: int
    crop: tuple[float, float, float, float] = NO_CROP  # fractions: left, top, right, bottom
    hdr: str = "convert"  # or "reject"
    key: tuple[Any, ...] = ()  # format of the last frame
    conversion: ColorConversion | None = None  # of the last frame
    converter: SdrConverter | None = None
    graph: av.filter.Graph | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a frame to uint8 [height, width, 3]. Raises Refused."""
        rotation = self.video.rotation_of(frame)
        key = (
            frame.width,
            frame.height,
            frame.format.name,
            rotation,
            tags_of(frame),
            int(frame.color_range),
        )
        graph = self.graph
        if graph is None or key != self.key:
            if frame.width * frame.height > self.max_pixels:
                raise Refused("too_large", f"{frame.width}x{frame.height}")
            self._set_conversion(frame)
            graph = self._build(frame, rotation)
            self.graph = graph
            self.key = key
        graph.push(frame)
        picture = graph.pull().to_ndarray()
        return picture if self.converter is None else self.converter(picture)

    def _set_conversion(self, frame: av.VideoFrame) -> None:
        """Set the colour conversion that frames of this format need."""
        self.conversion = self.video.conversion_of(frame)
        self.converter = None
        if self.conversion is not None:
            if self.hdr == "reject":
                raise Refused("hdr", hdr_detail(self.conversion))
            self.converter = SdrConverter(self.conversion, white_of(frame))

    def _build(self, frame: av.VideoFrame, rotation: int) -> av.filter.Graph:
        """Build the filter graph for frames of this format."""
        turns = TRANSPOSE.get(rotation, ())
        height, width = frame.height, frame.width
        if len(turns) == 1:
            height, width = width, height
        left = _cropped_pixels(self.crop[0], width)
        top = _cropped_pixels(self.crop[1], height)
        right = _cropped_pixels(self.crop[2], width)
        bottom = _cropped_pixels(self.crop[3], height)
        kept_height = max(1, height - top - bottom)
        kept_width = max(1, width - left - right)
        pixel_height, pixel_width = self.video.pixel_size(90 if len(turns) == 1 else 0)
        display_height = kept_height * pixel_height
        display_width = kept_width * pixel_width
        factor = max(self.height / display_height, self.width / display_width)
        scaled_height = max(self.height, round(display_height * factor))
        scaled_width = max(self.width, round(display_width * factor))
        flags = "area" if factor <= 1 else "bicubic"
        flags += "+accurate_rnd+full_chroma_int+bitexact"
        scale_options = f"{scaled_width}:{scaled_height}:flags={flags}{self._matrix(frame)}"
        graph = av.filter.Graph()
        graph.threads = 1  # the cores are used by other processes
        source = graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
            time_base=self.video.stream.time_base,
        )
        chain = [source]
        chain += [graph.add("transpose", turn) for turn in turns]
        if any(self.crop):
            chain.append(graph.add("crop", f"{kept_width}:{kept_height}:{left}:{top}"))
        chain += [
            graph.add("scale", scale_options),
            graph.add("format", "rgb24" if self.conversion is None else WIDE_FORMAT),
            graph.add("crop", f"{self.width}:{self.height}"),
            graph.add("buffersink"),
        ]
        for before, after in itertools.pairwise(chain):
            before.link_to(after)
        graph.configure()
        return graph

    def _matrix(self, frame: av.VideoFrame) -> str:
        """Scale option with the YUV matrix of frames that do not name theirs.

        It is the container's matrix, or else the usual one for the size.
        """
        if int(frame.colorspace) != UNSPECIFIED:
            return ""
        if self.video.tags.matrix not in (UNSPECIFIED, RGB_MATRIX):
            return f":in_color_matrix={SCALE_MATRICES[self.video.tags.matrix]}"
        if self.conversion is not None and self.conversion.unspecified_matrix:
            return ":in_color_matrix=bt2020"
        is_high_definition = frame.width >= 1280 or frame.height > 576
        return ":in_color_matrix=bt709" if is_high_definition else ""


def _cropped_pixels(fraction: float, side: int) -> int:
    """Pixels to cut off one side. Rounded up, so that no border is left."""
    return math.ceil(fraction * side - 1e-6)


def white_of(frame: av.VideoFrame) -> int:
    """The 16-bit value in WIDE_FORMAT to which swscale maps the largest nominal signal."""
    is_full_range = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    if is_full_range or frame.format.is_rgb:
        bits = frame.format.components[0].bits
        return (1 << bits) - 1 << 16 - bits
    return 65283
