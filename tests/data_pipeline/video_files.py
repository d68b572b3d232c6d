"""Numbered frames and encoded video files for tests."""

from __future__ import annotations

import io
import itertools
from fractions import Fraction

import av
import numpy as np

HEIGHT, WIDTH = 96, 160
# centres (y, x) of 15 squares that show the bits of a number
CELLS = list(itertools.product((16, 48, 80), (16, 48, 80, 112, 144)))


def barcodes(count: int) -> np.ndarray:
    """Frames whose squares are the bits of their number, uint8 [count, 96, 160, 3]."""
    bits = (np.arange(count)[:, None] >> np.arange(15)) & 1
    small = bits.reshape(count, 3, 5).astype(np.uint8) * 219 + 16
    return small.repeat(32, 1).repeat(32, 2)[..., None].repeat(3, -1)


def numbers(frames: np.ndarray) -> list[int]:
    """Numbers that frames of `barcodes` show."""
    bits = np.stack([frames[:, y, x].mean(-1) > 128 for y, x in CELLS], -1)
    return (bits * (1 << np.arange(15))).sum(-1).tolist()


def encode(
    frames: np.ndarray,
    *,
    container: str,
    codec: str,
    pixels: str = "yuv420p",
    ticks: list[int] | None = None,
    base: Fraction = Fraction(1, 24),
    options: dict[str, str] | None = None,
) -> bytes:
    """A foreign file: frame k is shown from ticks[k] * base on."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=24, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        stream.codec_context.time_base = base
        for k, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (ticks[k] if ticks else k), base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


X264 = {
    "preset": "veryfast",
    "crf": "20",
    "g": "24",
    "x264-params": "threads=1:mbtree=0:cpu-independent=1",
}  # always the same bytes
FOREIGN = {
    "h264 closed GOP mp4": {"container": "mp4", "codec": "libx264", "options": {**X264, "bf": "2"}},
    "h264 open GOP mp4": {
        "container": "mp4",
        "codec": "libx264",
        "options": {**X264, "x264-params": "open-gop=1:bframes=4:b-pyramid=normal"},
    },
    "h264 fragmented mp4": {"container": "ismv", "codec": "libx264", "options": X264},
    "h264 10 bit mkv": {
        "container": "matroska",
        "codec": "libx264",
        "pixels": "yuv420p10le",
        "options": X264,
    },
    "h264 mpeg-ts": {"container": "mpegts", "codec": "libx264", "options": {**X264, "bf": "2"}},
    "mpeg2 mpeg-ts": {
        "container": "mpegts",
        "codec": "mpeg2video",
        "options": {"bf": "2", "q": "4"},
    },
    "mpeg2 program stream": {
        "container": "vob",
        "codec": "mpeg2video",
        "options": {"bf": "2", "q": "4"},
    },
    "mpeg4 avi with B-frames": {
        "container": "avi",
        "codec": "mpeg4",
        "options": {"bf": "2", "q": "4"},
    },
    "mjpeg avi": {
        "container": "avi",
        "codec": "mjpeg",
        "pixels": "yuvj420p",
        "options": {"q": "4"},
    },
    "h264 flv": {"container": "flv", "codec": "libx264", "options": X264},
    "hevc open GOP mp4": {
        "container": "mp4",
        "codec": "libx265",
        "options": {
            "preset": "ultrafast",
            "x265-params": "log-level=none:keyint=24:open-gop=1:pools=none:frame-threads=1",
        },
    },
    "vp9 webm": {
        "container": "webm",
        "codec": "libvpx-vp9",
        "options": {"b": "800k", "deadline": "realtime", "cpu-used": "8"},
    },
    "av1 mp4": {
        "container": "mp4",
        "codec": "libsvtav1",
        "options": {"preset": "12", "crf": "35", "svtav1-params": "lp=1"},
    },
    "vp8 webm": {
        "container": "webm",
        "codec": "libvpx",
        "options": {"b": "800k", "deadline": "realtime", "cpu-used": "8"},
    },
}
