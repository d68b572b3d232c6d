"""Videos that are not progressive SDR BT.709, made from known pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.format import VideoFormat

PATCHES = (
    (200, 40, 40),
    (40, 180, 40),
    (40, 40, 200),
    (200, 200, 200),
)  # SDR BT.709, one for each quadrant
X264 = {"preset": "veryfast", "crf": "2"}
X264_PARAMS = "threads=1:mbtree=0:cpu-independent=1"
LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
FROM_BT709 = {  # linear light; literature values
    1: np.eye(3),
    9: np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]),
    12: np.array([[0.8225, 0.1774, 0.0000], [0.0332, 0.9669, 0.0000], [0.0171, 0.0724, 0.9108]]),
}


@dataclass(frozen=True)
class Color:
    """How a video codes its colours: code points of ITU-T H.273, and what the file says of them."""

    transfer: int
    primaries: int = 9
    matrix: int = 9
    full_range: bool = False
    pixels: str = "yuv420p10le"
    tagged: tuple[int, int, int] | None = (
        None  # primaries, transfer, matrix, where the file says something else
    )


def signal_of(patches_N3: np.ndarray, color: Color) -> np.ndarray:
    """SDR BT.709 levels 0 ... 255 (gamma 2.4, white is 203 nits) -> R'G'B' signal 0 ... 1."""
    linear = (patches_N3 / 255) ** 2.4 @ FROM_BT709[color.primaries].T
    if color.transfer == 16:
        power = (linear * 203 / 10000) ** (2610 / 16384)
        return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    if color.transfer == 18:
        display = linear * 203 / 1000
        luminance = display @ (0.2627, 0.6780, 0.0593)
        scene = display * np.maximum(luminance, 1e-9)[:, None] ** (1 / 1.2 - 1)
        logarithmic = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithmic)
    return np.maximum(linear, 0) ** (1 / 2.4)


def quadrants(values_4: np.ndarray, height: int, width: int) -> np.ndarray:
    """[height, width] with one value in each quadrant."""
    return values_4.reshape(2, 2).repeat(height // 2, 0).repeat(width // 2, 1)


def color_video(
    color: Color,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    patches: tuple[tuple[int, int, int], ...] = PATCHES,
    frames: int = 5,
    height: int = 64,
    width: int = 96,
) -> bytes:
    """A still video at 24 fps that shows `patches` in its quadrants."""
    video_format = VideoFormat(color.pixels, width, height)
    signal_N3 = signal_of(np.array(patches, float), color)
    planes = _planes(signal_N3, color, video_format, height, width)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        defaults = {**X264, "x264-params": X264_PARAMS} if codec == "libx264" else {}
        stream = output.add_stream(codec, rate=24, options=options or defaults)
        stream.width, stream.height, stream.pix_fmt = width, height, color.pixels
        context = stream.codec_context
        tags = color.tagged or (color.primaries, color.transfer, color.matrix)
        context.color_primaries, context.color_trc, context.colorspace = tags
        context.color_range = 2 if color.full_range else 1
        for number in range(frames):
            frame = frame_of(planes, color.pixels, height, width)
            frame.color_primaries, frame.color_trc, frame.colorspace = tags
            frame.color_range = context.color_range
            frame.pts, frame.time_base = number, Fraction(1, 24)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def _planes(
    signal_N3: np.ndarray, color: Color, video_format: VideoFormat, height: int, width: int
) -> list[np.ndarray]:
    bits = video_format.components[0].bits
    red, blue = LUMA_WEIGHTS[color.matrix]
    luma = signal_N3 @ (red, 1 - red - blue, blue)
    chroma = [(signal_N3[:, 2] - luma) / (2 - 2 * blue), (signal_N3[:, 0] - luma) / (2 - 2 * red)]
    unit = 1 << bits - 8
    if color.full_range:
        codes = [
            luma * ((1 << bits) - 1),
            *(c * ((1 << bits) - 1) + (1 << bits - 1) for c in chroma),
        ]
    else:
        codes = [(luma * 219 + 16) * unit, *((c * 224 + 128) * unit for c in chroma)]
    sizes = [(height, width), *[(video_format.chroma_height(), video_format.chroma_width())] * 2]
    dtype = np.uint8 if bits == 8 else np.uint16
    return [
        quadrants(np.round(code).astype(dtype), *size)
        for code, size in zip(codes, sizes, strict=True)
    ]


def frame_of(planes: list[np.ndarray], pixels: str, height: int, width: int) -> av.VideoFrame:
    """A frame with these planes."""
    frame = av.VideoFrame(width, height, pixels)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.frombuffer(plane, values.dtype).reshape(values.shape[0], -1)
        rows[:, : values.shape[1]] = values
    return frame


# --------------------------------------------------------------------------------------- interlaced


def moving_bar(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A bright bar that moves by one pixel with each picture, uint8 [count, height, width, 3]."""
    pictures = np.full((count, height, width, 3), 30, np.uint8)
    for number in range(count):
        left = 4 + number % (width - 24)
        pictures[number, :, left : left + 16] = 220
    return pictures


def interlaced(pictures_THWC: np.ndarray, *, top_first: bool = True) -> np.ndarray:
    """Weave every two pictures into one frame: the first gives the lines of the first field."""
    frames = pictures_THWC[::2].copy()
    second = 1 if top_first else 0
    frames[:, second::2] = pictures_THWC[1::2, second::2]
    return frames


def interlaced_video(
    frames_THWC: np.ndarray,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    field: str = "tff",
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    rate: int = 24,
) -> bytes:
    """A video of interlaced frames; `field`: "tff", "bff", or "prog" for progressive ones."""
    height, width = frames_THWC.shape[1:3]
    flags = {"flags": "+ilme+ildct"} if field != "prog" else {}
    if codec == "libx264":
        order = "" if field == "prog" else f":{field}=1"
        flags |= {**X264, "x264-params": X264_PARAMS + order}
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=VideoFormat("rgb24"), time_base=Fraction(1, rate)
    )
    mode = graph.add("setfield", f"mode={field}")
    graph.link_nodes(source, graph.add("format", pixels), mode, graph.add("buffersink")).configure()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options={**flags, **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for number, picture in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            graph.push(frame)
            output.mux(stream.encode(graph.pull()))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def comb(frames_THWC: np.ndarray) -> float:
    """Mean difference of a line from its neighbours; 0 for vertical bars in progressive frames."""
    gray = frames_THWC.mean(-1)
    return float(np.abs(2 * gray[:, 1:-1] - gray[:, :-2] - gray[:, 2:]).mean())
