"""Decoding per core: the cost of child processes, limits and exactness over the bare decoders.

    python -m benchmarks.decode [rounds]

Foreign video. bare: PyAV decodes the same frames in this process and drops them. bare + resize: it
also makes the requested pictures with the same filter. safe: `SafeDecoder`, with exact times,
detection of damage, and frames through shared memory.

Our clips. bare: decord's `get_batch` of all frames, or PyAV's frames as RGB, in one process. safe:
`ClipDecoder`, which also checks the sha256 and, with decord, corrects its colours.

Milliseconds are CPU time including children, the minimum of all rounds. Speed is bare (+ resize)
divided by safe.
"""

from __future__ import annotations

import hashlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np

from landiff.data_pipeline.video.codec import (
    ClipDecoder,
    SafeDecoder,
    VideoFile,
    Wanted,
    encode_clip,
)
from landiff.data_pipeline.video.frames import Video
from landiff.data_pipeline.video.picture import Picture
from landiff.data_pipeline.video.process import DecoderProcess

RATE = 24
SECONDS = 6.5
SIZES = {"720p": (720, 1280), "360p": (360, 640)}
WANTED = {"128x128": (128, 128), "480x720": (480, 720)}
NUM_FRAMES = 49
FPS = 8.0


def film(height: int, width: int) -> bytes:
    """Six and a half seconds of a view that moves over a detailed picture, x264."""
    small = np.random.default_rng(0).integers(0, 255, (height // 6, width // 6, 3), dtype=np.uint8)
    large = cv2.resize(small, (width * 3 // 2, height * 3 // 2), interpolation=cv2.INTER_CUBIC)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream(
            "libx264", rate=RATE, options={"preset": "medium", "crf": "23", "threads": "1"}
        )
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        for number in range(int(RATE * SECONDS)):
            view = large[number : number + height, 2 * number : 2 * number + width]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(view), format="rgb24")
            frame.pts = number
            frame.time_base = Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def bare(path: Path, size: tuple[int, int] | None) -> int:
    """Decodes up to the last requested frame. Returns the number of decoded frames.

    size: height and width of the pictures to make of the requested frames; None makes none.
    """
    times = {round(k * RATE / FPS) for k in range(NUM_FRAMES)}
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        picture = None
        if size is not None:
            video = Video(container, stream, stream.codec_context)
            picture = Picture(video, *size, max_pixels=1 << 30)
        for number, frame in enumerate(container.decode(stream)):
            if picture is not None and number in times:
                picture(frame)
            if number == max(times):
                return number + 1
    raise AssertionError("the film is too short")


BARE_DECORD = """
import sys, time, decord
least = 1e9
for _ in range(int(sys.argv[2])):
    begin = time.process_time()
    reader = decord.VideoReader(sys.argv[1], num_threads=1)
    reader.get_batch(range(len(reader))).asnumpy()
    del reader
    least = min(least, time.process_time() - begin)
print(least)
"""


def bare_decord(path: Path, rounds: int) -> float:
    """CPU seconds in a process of its own, because PyAV and decord bring different FFmpegs."""
    command = [sys.executable, "-c", BARE_DECORD, str(path), str(rounds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def bare_clip(clip: bytes) -> np.ndarray:
    """All frames of a clip as RGB."""
    with av.open(io.BytesIO(clip)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        context = stream.codec_context
        video = Video(container, stream, context)
        picture = Picture(video, context.height, context.width, max_pixels=1 << 30)
        return np.stack([picture(frame) for frame in container.decode(stream)])


def cpu_seconds(work: Callable[[], object], child: DecoderProcess | None = None) -> float:
    """CPU seconds of this process during `work`, and of the child's answers."""
    begin = _cpu_s(child)
    work()
    return _cpu_s(child) - begin


def _cpu_s(child: DecoderProcess | None) -> float:
    if child is None:
        return time.process_time()
    return time.process_time() + child.cpu_s


def main(rounds: int) -> None:
    """Measures and prints both tables."""
    foreign(rounds)
    ours(rounds)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak memory of a child: {peak:.0f} MB")


def foreign(rounds: int) -> None:
    """Prints the table of foreign videos."""
    print(
        f"{'foreign video':<24}{'bare ms':>9}{'+ resize':>10}{'safe':>8}"
        f"{'frames/s':>10}{'speed':>7}"
    )
    with tempfile.TemporaryDirectory() as folder, SafeDecoder() as decoder:
        for name, shape in SIZES.items():
            path = Path(folder) / f"{name}.mp4"
            path.write_bytes(film(*shape))
            for target, size in WANTED.items():
                plain, resized, safe = foreign_seconds(decoder, path, size, rounds)
                print(
                    f"{name + ' -> ' + target:<24}{1000 * plain:>9.0f}{1000 * resized:>10.0f}"
                    f"{1000 * safe:>8.0f}{NUM_FRAMES / safe:>10.0f}{resized / safe:>7.2f}",
                    flush=True,
                )


def foreign_seconds(
    decoder: SafeDecoder, path: Path, size: tuple[int, int], rounds: int
) -> tuple[float, float, float]:
    """CPU seconds of bare decoding, with resizing, and of the safe decoder."""
    wanted = Wanted(NUM_FRAMES, FPS, *size)
    video = VideoFile(path)
    decoder.decode(video, [0.0], wanted)  # starts the child
    plain = []
    resized = []
    safe = []
    for _ in range(rounds):
        plain.append(cpu_seconds(lambda: bare(path, None)))
        resized.append(cpu_seconds(lambda: bare(path, size)))
        safe.append(cpu_seconds(lambda: decoder.decode(video, [0.0], wanted), decoder.process))
    return min(plain), min(resized), min(safe)


def ours(rounds: int) -> None:
    """Prints the table of our own clips."""
    print(
        f"{'our clips, 49 frames':<24}{'bare ms':>9}{'':>10}{'safe':>8}{'frames/s':>10}{'speed':>7}"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for height, width in ((128, 128), (480, 720)):
            path.write_bytes(moving_clip(height, width))
            for backend in ("decord", "pyav"):
                plain, safe = clip_seconds(backend, path, rounds)
                print(
                    f"{f'{backend} {width}x{height}':<24}{1000 * plain:>9.1f}{'':>10}"
                    f"{1000 * safe:>8.1f}{NUM_FRAMES / safe:>10.0f}{plain / safe:>7.2f}",
                    flush=True,
                )


def moving_clip(height: int, width: int) -> bytes:
    """A clip of blurred squares that move to the left."""
    squares = np.random.default_rng(0).integers(0, 255, (height // 8, width // 4, 3))
    wide = np.kron(squares, np.ones((8, 8, 1))).astype(np.uint8)
    blurred = cv2.blur(wide, (5, 5))
    frames = [blurred[:, 2 * k : 2 * k + width] for k in range(NUM_FRAMES)]
    return encode_clip(np.stack(frames), FPS)


def clip_seconds(
    backend: Literal["pyav", "decord"], path: Path, rounds: int
) -> tuple[float, float]:
    """CPU seconds of bare decoding and of `ClipDecoder`."""
    clip = path.read_bytes()
    digest = hashlib.sha256(clip).hexdigest()
    plain = []
    safe = []
    with ClipDecoder(backend) as decoder:
        decoder.decode(clip)  # starts the child
        for _ in range(rounds):
            if backend == "decord":
                plain.append(bare_decord(path, 1))
            else:
                plain.append(cpu_seconds(lambda: bare_clip(clip)))
            safe.append(cpu_seconds(lambda: decoder.decode(clip, sha256=digest), decoder.process))
    return min(plain), min(safe)


if __name__ == "__main__":
    rounds = 5
    if len(sys.argv) > 1:
        rounds = int(sys.argv[1])
    main(rounds)
