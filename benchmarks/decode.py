"""Decoding and resizing foreign video, per core: what `SafeDecoder` costs over the bare decoder.

    python -m benchmarks.decode [rounds]

bare: PyAV decodes the same frames in this process and keeps nothing. bare + resize: and makes the wanted pictures
by the same filter. SafeDecoder: child process, limits, exact times, damage noticed, pictures through shared memory.
Seconds are of CPU, children included; the smallest of all rounds. Speed is bare + resize over SafeDecoder.
"""

from __future__ import annotations

import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from data_pipeline import video_child
from data_pipeline.video import SafeDecoder, VideoFile, Wanted

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
        stream = output.add_stream("libx264", rate=RATE, options={"preset": "medium", "crf": "23", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(int(RATE * SECONDS)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(large[number : number + height, 2 * number : 2 * number + width]), format="rgb24")
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
        picture = video_child.Picture(stream, *size, max_pixels=1 << 30) if size else None
        for number, frame in enumerate(container.decode(stream)):
            if picture and number in times:
                picture(frame)
            if number == max(times):
                return number + 1
    raise AssertionError("the film is too short")


def cpu_seconds(work: Callable[[], object], child: int | None = None) -> float:
    """CPU time of this process, and of a living child."""
    begin = time.process_time() + (_cpu_of(child) if child else 0.0)
    work()
    return time.process_time() + (_cpu_of(child) if child else 0.0) - begin


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:  # nanoseconds, where the kernel counts them
        nanoseconds = int(file.read().split()[0])
    return nanoseconds / 1e9 if nanoseconds else (int(fields[11]) + int(fields[12])) / 100


def main(rounds: int) -> None:
    print(f"{'clip':<24}{'bare ms':>9}{'+ resize':>10}{'SafeDecoder':>13}{'frames/s':>10}{'speed':>7}")
    with tempfile.TemporaryDirectory() as folder, SafeDecoder() as decoder:
        for name, shape in SIZES.items():
            path = Path(folder) / f"{name}.mp4"
            path.write_bytes(film(*shape))
            for wish, size in WANTED.items():
                wanted = Wanted(NUM_FRAMES, FPS, *size)
                decoder.decode(VideoFile(path), [0.0], wanted)  # starts the child
                measured = np.array([[
                    cpu_seconds(lambda path=path: bare(path, None)),
                    cpu_seconds(lambda path=path, size=size: bare(path, size)),
                    cpu_seconds(lambda path=path, wanted=wanted: decoder.decode(VideoFile(path), [0.0], wanted), decoder.pid),
                ] for _ in range(rounds)]).min(0)
                milliseconds = measured * 1000
                print(f"{name + ' -> ' + wish:<24}{milliseconds[0]:>9.0f}{milliseconds[1]:>10.0f}{milliseconds[2]:>13.0f}"
                      f"{NUM_FRAMES / measured[2]:>10.0f}{measured[1] / measured[2]:>7.2f}", flush=True)
    print(f"peak memory of a child: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
