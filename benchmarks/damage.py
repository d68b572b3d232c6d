"""How much silent damage is noticed, by codec: files with some wrong bytes, decoded by `SafeDecoder`.

One row per codec: files that were refused; files whose frames all look right; files with visibly wrong frames
(PSNR below 30 dB to the whole file's) and how many of those frames' spans were refused; false alarms.

    python -m benchmarks.damage [files per codec]
"""

from __future__ import annotations

import io
import sys
from fractions import Fraction

import av
import cv2
import numpy as np

from landiff.data_pipeline.video.codec import DecodeFailure, SafeDecoder, Wanted

LENGTH, HEIGHT, WIDTH, RATE = 72, 96, 160, 24
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
    """A picture that the view wanders over, uint8 [LENGTH, HEIGHT, WIDTH, 3]."""
    small = np.random.default_rng(1).integers(0, 255, (20, 40, 3), dtype=np.uint8)
    large = cv2.resize(small, (2 * WIDTH, 2 * HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.stack([large[k // 2 : k // 2 + HEIGHT, k : k + WIDTH] for k in range(LENGTH)])


def encode(frames: np.ndarray, container: str, codec: str, options: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = (
            WIDTH,
            HEIGHT,
            "yuvj420p" if codec == "mjpeg" else "yuv420p",
        )
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def measure(decoder: SafeDecoder, data: bytes, files: int) -> tuple[int, int, int, int, int]:
    """(refused whole, right and kept, right and refused, wrong and noticed, wrong and missed), counted in spans of 3 frames."""
    generator = np.random.default_rng(0)
    wanted, starts = Wanted(3, float(RATE), HEIGHT, WIDTH), [k / 8 for k in range(LENGTH // 3)]
    reference = decoder.decode(data, starts, wanted)
    counts = [0] * 5
    for number in range(files):
        damaged = bytearray(data)
        for place in generator.integers(len(data) // 20, len(data) * 19 // 20, 1 + number % 8):
            damaged[place] = generator.integers(256)
        spans = decoder.decode(bytes(damaged), starts, wanted)
        if all(isinstance(span, DecodeFailure) for span in spans):
            counts[0] += len(spans)
            continue
        truth = unchecked(bytes(damaged))
        for number_of_span, (span, good) in enumerate(zip(spans, reference, strict=True)):
            seen = truth[3 * number_of_span :][:3] if isinstance(span, DecodeFailure) else span
            wrong = len(seen) < 3 or cv2.PSNR(seen, good) < 30
            counts[
                (3 if isinstance(span, DecodeFailure) else 4)
                if wrong
                else (2 if isinstance(span, DecodeFailure) else 1)
            ] += 1
    return tuple(counts)


def unchecked(data: bytes) -> np.ndarray:
    """What a decoder shows that asks no questions."""
    frames = []
    try:
        with av.open(io.BytesIO(data)) as container:
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, ValueError):
        pass
    return np.stack(frames) if frames else np.empty((0, HEIGHT, WIDTH, 3), np.uint8)


def main(files: int) -> None:
    print(
        f"{'codec':<18}{'refused whole':>15}{'right, kept':>13}{'right, refused':>16}{'wrong, refused':>16}{'wrong, kept':>13}"
    )
    clip = scene()
    with SafeDecoder() as decoder:
        for name, spec in CODECS.items():
            counts = measure(decoder, encode(clip, *spec), files)
            print(
                f"{name:<18}{counts[0]:>15}{counts[1]:>13}{counts[2]:>16}{counts[3]:>16}{counts[4]:>13}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
