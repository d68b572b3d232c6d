"""Small synthetic videos with captions: coloured shapes that move over a plain background.

For tests and benchmarks. A video is a function of (seed, index) and its size.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from landiff.configs.files import write_text
from landiff.data_pipeline.video.codec import write_mp4

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
    "orange": (240, 140, 40),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
SPEEDS = {"slowly": 0.15, "quickly": 0.5}  # frame heights per second


@dataclass(frozen=True)
class LabelledVideo:
    """RGB frames, uint8 [T, H, W, 3], and a caption."""

    frames: np.ndarray
    fps: float
    caption: str


def moving_shape(
    index: int, *, num_frames: int, height: int, width: int, fps: float = 8.0, seed: int = 0
) -> LabelledVideo:
    """A shape that moves at constant speed and wraps around at the borders."""
    generator = np.random.default_rng([seed, index])
    ground, color = generator.choice(sorted(COLORS), 2, replace=False)
    shape = generator.choice(sorted(SHAPES))
    direction = generator.choice(sorted(DIRECTIONS))
    speed = generator.choice(sorted(SPEEDS))
    x, y = generator.uniform(0.0, 1.0, 2) * (width, height)
    radius = generator.uniform(0.15, 0.25) * min(height, width)
    step = np.array(DIRECTIONS[direction]) * SPEEDS[speed] * height / fps
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:] = COLORS[ground]
        center = (np.array([x, y]) + number * step) % (width, height)
        for offset in itertools.product((-width, 0, width), (-height, 0, height)):
            _draw(frame, shape, center + offset, radius, COLORS[color])
    return LabelledVideo(
        frames, fps, f"A {color} {shape} moves {direction} {speed} over a {ground} ground."
    )


def write_videos(
    folder: Path,
    count: int,
    *,
    num_frames: int = 24,
    height: int = 64,
    width: int = 96,
    fps: float = 8.0,
    seed: int = 0,
) -> Path:
    """Write `count` MP4 files and their captions.jsonl to `folder`. Returns the captions file."""
    rows = []
    for index in range(count):
        video = moving_shape(
            index, num_frames=num_frames, height=height, width=width, fps=fps, seed=seed
        )
        name = f"shape_{index:05d}.mp4"
        write_mp4(folder / name, video.frames, fps)
        rows.append(json.dumps({"file": name, "caption": video.caption}))
    write_text(folder / "captions.jsonl", "".join(f"{row}\n" for row in rows))
    return folder / "captions.jsonl"


def _draw(
    frame: np.ndarray, shape: str, center: np.ndarray, radius: float, color: tuple[int, int, int]
) -> None:
    """Draw a shape of a radius in pixels around `center` (x, y) into a frame."""
    shift = 4  # fractional bits of coordinates, so that slow shapes move smoothly
    if shape == "circle":
        x, y = np.round(center * 2**shift).astype(int).tolist()
        cv2.circle(frame, (x, y), round(radius * 2**shift), color, cv2.FILLED, cv2.LINE_AA, shift)
        return
    corners = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
    }[shape]
    points = np.round((center + radius * np.array(corners)) * 2**shift).astype(np.int32)
    cv2.fillPoly(frame, [points], color, cv2.LINE_AA, shift)
