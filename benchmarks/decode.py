"""Decoding per core: what child processes, limits and exactness cost over the bare decoders.

    python -m benchmarks.decode [rounds]

Foreign video. bare: PyAV decodes the same frames in this process and keeps nothing. bare + resize: and makes the
wanted pictures by the same filter. safe: `SafeDecoder`, with exact times, damage noticed, frames through shared memory.
Our clips. bare: decord's `get_batch` of all frames, or PyAV's frames as RGB, in one process. safe: `ClipDecoder`, which
also checks the sha256 and, with decord, corrects its colours.
Milliseconds are of CPU, children included; the smallest of all rounds. Speed is bare (+ resize) over safe.
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

RATE, SECONDS = 24, 6.5
SIZES = {"720p": (720, 1280), "360p": (360, 640)}
WANTED = {"128x128": (128, 128), "480x720": (480, 720)}
NUM_FRAMES, FPS = 49, 8.0


def film(height: int, width: int) -> bytes:
    """Six and a half seconds of a view that wanders over a detailed picture, x264."""
    small = np.random.default_rng(0).integers(0, 255, (height // 6, width // 6, 3), dtype=np.uint8)
    large = cv2.resize(small, (width * 3 // 2, height * 3 // 2), interpolation=cv2.INTER_CUBIC)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream(
            "libx264", rate=RATE, options={"preset": "medium", "crf": "23", "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(int(RATE * SECONDS)):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(
                    large[number : number + height, 2 * number : 2 * number + width]
                ),
                format="rgb24",
            )
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def bare(path: Path, size: tuple[int, int] | None) -> int:
    """Decode up to the last wanted frame; picture what is wanted when there is a size. -> frames decoded."""
    times = {round(k * RATE / FPS) for k in range(NUM_FRAMES)}
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        picture = (
            Picture(Video(container, stream, stream.codec_context), *size, max_pixels=1 << 30)
            if size
            else None
        )
        for number, frame in enumerate(container.decode(stream)):
            if picture and number in times:
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
    """CPU seconds, in a process of its own: two FFmpegs do not go together."""
    return float(
        subprocess.run(
            [sys.executable, "-c", BARE_DECORD, str(path), str(rounds)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )


def bare_clip(clip: bytes) -> np.ndarray:
    with av.open(io.BytesIO(clip)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        context = stream.codec_context
        picture = Picture(
            Video(container, stream, context), context.height, context.width, max_pixels=1 << 30
        )
        return np.stack([picture(frame) for frame in container.decode(stream)])


def cpu_seconds(work: Callable[[], object], child: DecoderProcess | None = None) -> float:
    """CPU time of this process, and of a child's answers."""
    begin = time.process_time() + (child.cpu_s if child else 0.0)
    work()
    return time.process_time() + (child.cpu_s if child else 0.0) - begin


def main(rounds: int) -> None:
    foreign(rounds)
    ours(rounds)
    print(
        f"peak memory of a child: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB"
    )


def foreign(rounds: int) -> None:
    print(
        f"{'foreign video':<24}{'bare ms':>9}{'+ resize':>10}{'safe':>8}{'frames/s':>10}{'speed':>7}"
    )
    with tempfile.TemporaryDirectory() as folder, SafeDecoder() as decoder:
        for name, shape in SIZES.items():
            path = Path(folder) / f"{name}.mp4"
            path.write_bytes(film(*shape))
            for wish, size in WANTED.items():
                wanted = Wanted(NUM_FRAMES, FPS, *size)
                decoder.decode(VideoFile(path), [0.0], wanted)  # starts the child
                measured = np.array(
                    [
                        [
                            cpu_seconds(lambda path=path: bare(path, None)),
                            cpu_seconds(lambda path=path, size=size: bare(path, size)),
                            cpu_seconds(
                                lambda path=path, wanted=wanted: decoder.decode(
                                    VideoFile(path), [0.0], wanted
                                ),
                                decoder.process,
                            ),
                        ]
                        for _ in range(rounds)
                    ]
                ).min(0)
                milliseconds = measured * 1000
                print(
                    f"{name + ' -> ' + wish:<24}{milliseconds[0]:>9.0f}{milliseconds[1]:>10.0f}{milliseconds[2]:>8.0f}"
                    f"{NUM_FRAMES / measured[2]:>10.0f}{measured[1] / measured[2]:>7.2f}",
                    flush=True,
                )


def ours(rounds: int) -> None:
    print(
        f"{'our clips, 49 frames':<24}{'bare ms':>9}{'':>10}{'safe':>8}{'frames/s':>10}{'speed':>7}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for height, width in ((128, 128), (480, 720)):
            wide = np.kron(
                np.random.default_rng(0).integers(0, 255, (height // 8, width // 4, 3)),
                np.ones((8, 8, 1)),
            ).astype(np.uint8)
            clip = encode_clip(
                np.stack(
                    [cv2.blur(wide, (5, 5))[:, 2 * k : 2 * k + width] for k in range(NUM_FRAMES)]
                ),
                FPS,
            )
            path, digest = Path(folder) / "clip.mp4", hashlib.sha256(clip).hexdigest()
            path.write_bytes(clip)
            for backend in ("decord", "pyav"):
                with ClipDecoder(backend) as decoder:
                    decoder.decode(clip)  # starts the child
                    pairs = [
                        (
                            (
                                bare_decord(path, 1)
                                if backend == "decord"
                                else cpu_seconds(lambda clip=clip: bare_clip(clip))
                            ),
                            cpu_seconds(
                                lambda clip=clip, decoder=decoder, digest=digest: decoder.decode(
                                    clip, sha256=digest
                                ),
                                decoder.process,
                            ),
                        )
                        for _ in range(rounds)
                    ]
                    before, after = np.array(pairs).min(0)
                print(
                    f"{f'{backend} {width}x{height}':<24}{before * 1000:>9.1f}{'':>10}{after * 1000:>8.1f}{NUM_FRAMES / after:>10.0f}{before / after:>7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
