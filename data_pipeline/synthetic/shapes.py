"""Small labelled videos made from numbers: coloured shapes that move over a plain ground, and say so.

For tests and benchmarks. A video is a function of (seed, index) and its size; nothing is random besides.
"""

from __future__ import annotations

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
    """uint8 frames [T, H, W, 3] and what they show."""

    frames: np.ndarray
    fps: float
    caption: str


def moving_shape(
    index: int, *, num_frames: int, height: int, width: int, fps: float = 8.0, seed: int = 0
) -> LabelledVideo:
    """One shape that moves at an even speed and comes back on the other side, as on a torus."""
    generator = np.random.default_rng([seed, index])
    ground, color = generator.choice(sorted(COLORS), 2, replace=False)
    shape, direction, speed = (
        generator.choice(sorted(names)) for names in (SHAPES, DIRECTIONS, SPEEDS)
    )
    x, y = generator.uniform(0.0, 1.0, 2) * (width, height)
    radius = generator.uniform(0.15, 0.25) * min(height, width)
    step = np.array(DIRECTIONS[direction]) * SPEEDS[speed] * height / fps
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:] = COLORS[ground]
        center = (np.array([x, y]) + number * step) % (width, height)
        for copy in ((dx, dy) for dx in (-width, 0, width) for dy in (-height, 0, height)):
            _draw(frame, shape, center + copy, radius, COLORS[color])
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
    """Write `count` MP4 files and their captions.jsonl into `folder`; -> the captions file."""
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
    shift = 4  # bits of a pixel's fraction, so that slow shapes move evenly
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
