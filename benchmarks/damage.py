"""Damaged files that the decoder notices, by codec: files with some wrong bytes, decoded safely.

    python -m benchmarks.damage [files per codec]

One row per codec, counted in spans of 3 frames: spans of files that were rejected as a whole, spans
with right frames that were kept or rejected, and spans with visibly wrong frames (PSNR below 30 dB
to the undamaged file) that were rejected or kept.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from fractions import Fraction

import av
import cv2
import numpy as np

from landiff.data_pipeline.video.codec import DecodeFailure, SafeDecoder, Wanted

LENGTH = 72  # frames
HEIGHT = 96
WIDTH = 160
RATE = 24
X264 = {"preset": "veryfast", "g": "24", "x264-params": "threads=1"}
CODECS = {
    "h264": ("mp4", "libx264", X264),
    "hevc": (
        "mp4",
        "libx265",
        {"preset": "ultrafast", "x265-params": "log-level=none:keyint=24:pools=none"},
    ),
    "mpeg4": ("avi", "mpeg4", {"bf": "2", "q": "4", "g": "24"}),
    "mpeg2": ("mpegts", "mpeg2video", {"bf": "2", "q": "4", "g": "24"}),
    "mjpeg": ("avi", "mjpeg", {"q": "4"}),
    "vp8": ("webm", "libvpx", {"b": "800k", "deadline": "realtime", "cpu-used": "8", "g": "24"}),
    "vp9": (
        "webm",
        "libvpx-vp9",
        {"b": "800k", "deadline": "realtime", "cpu-used": "8", "g": "24"},
    ),
    "hevc with hashes": (
        "mp4",
        "libx265",
        {"preset": "ultrafast", "x265-params": "log-level=none:keyint=24:pools=none:hash=1"},
    ),
    "av1": ("mp4", "libsvtav1", {"preset": "12", "crf": "35", "g": "24"}),
}


def scene() -> np.ndarray:
    """A view that moves over a large picture, uint8 [LENGTH, HEIGHT, WIDTH, 3]."""
    small = np.random.default_rng(1).integers(0, 255, (20, 40, 3), dtype=np.uint8)
    large = cv2.resize(small, (2 * WIDTH, 2 * HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.stack([large[k // 2 : k // 2 + HEIGHT, k : k + WIDTH] for k in range(LENGTH)])


def encode(frames: np.ndarray, container: str, codec: str, options: dict[str, str]) -> bytes:
    """The video file of the frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=RATE, options=options)
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            frame.time_base = Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@dataclass
class Counts:
    """Spans by outcome."""

    rejected_whole: int = 0
    right_kept: int = 0
    right_rejected: int = 0
    wrong_rejected: int = 0
    wrong_kept: int = 0

    def add(self, *, wrong: bool, rejected: bool) -> None:
        """Counts a span of a file that was not rejected as a whole."""
        if wrong and rejected:
            self.wrong_rejected += 1
        elif wrong:
            self.wrong_kept += 1
        elif rejected:
            self.right_rejected += 1
        else:
            self.right_kept += 1


def measure(decoder: SafeDecoder, data: bytes, files: int) -> Counts:
    """Decodes `files` damaged copies of a file."""
    generator = np.random.default_rng(0)
    wanted = Wanted(3, float(RATE), HEIGHT, WIDTH)
    starts = [k / 8 for k in range(LENGTH // 3)]
    reference = decoder.decode(data, starts, wanted)
    counts = Counts()
    for number in range(files):
        damaged = bytearray(data)
        for place in generator.integers(len(data) // 20, len(data) * 19 // 20, 1 + number % 8):
            damaged[place] = generator.integers(256)
        spans = decoder.decode(bytes(damaged), starts, wanted)
        if all(isinstance(span, DecodeFailure) for span in spans):
            counts.rejected_whole += len(spans)
            continue
        frames = unchecked(bytes(damaged))
        for index, (span, good) in enumerate(zip(spans, reference, strict=True)):
            rejected = isinstance(span, DecodeFailure)
            seen = frames[3 * index :][:3] if isinstance(span, DecodeFailure) else span
            wrong = len(seen) < 3 or cv2.PSNR(seen, good) < 30
            counts.add(wrong=wrong, rejected=rejected)
    return counts


def unchecked(data: bytes) -> np.ndarray:
    """Frames that a decoder without any checks returns."""
    frames = []
    try:
        with av.open(io.BytesIO(data)) as container:
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, ValueError):
        pass
    if not frames:
        return np.empty((0, HEIGHT, WIDTH, 3), np.uint8)
    return np.stack(frames)


def main(files: int) -> None:
    """Measures and prints the table."""
    print(
        f"{'codec':<18}{'rejected whole':>15}{'right, kept':>13}{'right, rejected':>17}"
        f"{'wrong, rejected':>17}{'wrong, kept':>13}"
    )
    clip = scene()
    with SafeDecoder() as decoder:
        for name, (container, codec, options) in CODECS.items():
            counts = measure(decoder, encode(clip, container, codec, options), files)
            print(
                f"{name:<18}{counts.rejected_whole:>15}{counts.right_kept:>13}"
                f"{counts.right_rejected:>17}{counts.wrong_rejected:>17}{counts.wrong_kept:>13}",
                flush=True,
            )


if __name__ == "__main__":
    files = 40
    if len(sys.argv) > 1:
        files = int(sys.argv[1])
    main(files)
