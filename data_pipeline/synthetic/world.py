"""The shapes world: one coloured shape that moves evenly over a plain ground, with a caption.

5 colours, 3 shapes, 4 directions, 2 speeds and 3 grounds make 360 captions of one form. The nine
combinations in `HELD_OUT` never occur in training data, while every value and every pair of values
does: a model that makes them right has learned the parts of a caption and not the captions.

A video is a function of (seed, part, index), its label and its size. Shapes move on a torus: what
leaves the frame on one side enters on the other. `judge.py` reads the labels from the pixels.

The second tier shows two objects of different colours over one ground (`draw_pairs`).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from landiff.configs.base import ConfigError
from landiff.configs.documents import read_json
from landiff.configs.files import write_text
from landiff.data_pipeline.video.codec import write_mp4

Label = dict[str, str]
"""Values of `ATTRIBUTES` by name."""

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 190),
}
GROUNDS = {"white": (240, 240, 240), "grey": (128, 128, 128), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
SPEEDS = {"slowly": 0.15, "quickly": 0.5}  # frame heights per second
ATTRIBUTES = ("color", "shape", "direction", "speed", "ground")
VALUES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
    "ground": tuple(GROUNDS),
}
HELD_OUT = (
    ("blue", "triangle", "up"),
    ("green", "triangle", "right"),
    ("purple", "square", "down"),
    ("red", "circle", "down"),
    ("red", "circle", "left"),
    ("red", "circle", "up"),
    ("red", "triangle", "left"),
    ("red", "triangle", "up"),
    ("yellow", "square", "down"),
)
"""(colour, shape, direction) of the videos that training data never shows."""

FPS = 8.0
NUM_FRAMES = 17
SIZE = 64
RADII = (0.15, 0.25)  # smallest and largest, in frame heights
SAMPLES = 4  # of a pixel along one side, for smooth edges
CRF = 8.0  # nearly lossless
# Parts of the world with random numbers of their own.
TRAIN, TRUE_HELD_OUT, TRUE_SEEN = range(2, 5)


def labels(held_out: bool) -> list[Label]:
    """All labels of training data, or with `held_out` all that training data never shows."""
    found = []
    for values in itertools.product(*VALUES.values()):
        if (values[:3] in HELD_OUT) == held_out:
            found.append(dict(zip(ATTRIBUTES, values, strict=True)))
    return found


def caption(label: Mapping[str, str]) -> str:
    """The caption of a label."""
    return (
        f"A {label['color']} {label['shape']} moves {label['direction']} {label['speed']} "
        f"over a {label['ground']} ground."
    )


def parse_caption(text: str) -> Label | None:
    """The label that a caption states; None for any other text."""
    words = text.rstrip(".").split()
    if len(words) != 10:
        return None
    picked = (words[1], words[2], words[4], words[5], words[8])
    label = dict(zip(ATTRIBUTES, picked, strict=True))
    if any(label[name] not in VALUES[name] for name in ATTRIBUTES) or caption(label) != text:
        return None
    return label


def balanced(kinds: Sequence[Label], count: int, seed: int) -> list[Label]:
    """`count` labels in random order, each kind as often as the others, up to one."""
    generator = np.random.default_rng([seed, 1])
    drawn: list[Label] = []
    while len(drawn) < count:
        drawn.extend(kinds[index] for index in generator.permutation(len(kinds)))
    return drawn[:count]


def coverage(
    shape: str, center: tuple[float, float], radius: float, size: int, samples: int = SAMPLES
) -> np.ndarray:
    """Part of each pixel that a shape covers on the torus, float64 [size, size].

    center: (x, y) in pixels. A square has sides of twice the radius. A triangle stands on a side of
    that length and has that height.
    """
    points = (np.arange(size * samples) + 0.5) / samples
    half = size / 2
    x = np.remainder(points - center[0] + half, size)[None, :] - half
    y = np.remainder(points - center[1] + half, size)[:, None] - half
    if shape == "circle":
        inside = x * x + y * y <= radius**2
    elif shape == "square":
        inside = (np.abs(x) <= radius) & (np.abs(y) <= radius)
    else:
        inside = (np.abs(y) <= radius) & (2 * np.abs(x) <= y + radius)
    rows = inside.reshape(size, samples, -1).sum(axis=1, dtype=np.uint8)
    return rows.reshape(size, size, samples).sum(axis=2) / samples**2


def draw(
    objects: Sequence[Mapping[str, str]],
    ground: str,
    generator: np.random.Generator,
    *,
    size: int = SIZE,
    num_frames: int = NUM_FRAMES,
) -> np.ndarray:
    """A video of objects over a ground, uint8 [T, size, size, 3]. Places and sizes are random."""
    paths = []
    for label in objects:
        start = generator.uniform(0, size, 2)
        radius = generator.uniform(*RADII) * size
        step = np.array(DIRECTIONS[label["direction"]]) * SPEEDS[label["speed"]] * size / FPS
        paths.append((label, start, radius, step))
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    for number in range(num_frames):
        picture = np.broadcast_to(np.array(GROUNDS[ground], float), (size, size, 3))
        for label, start, radius, step in paths:
            x, y = (start + number * step).tolist()
            covered = coverage(label["shape"], (x, y), radius, size)[..., None]
            picture = covered * np.array(COLORS[label["color"]], float) + (1 - covered) * picture
        frames[number] = np.round(picture)
    return frames


def video(
    label: Mapping[str, str],
    key: Sequence[int],
    *,
    size: int = SIZE,
    num_frames: int = NUM_FRAMES,
) -> np.ndarray:
    """The video of a label, uint8 [T, size, size, 3]. `key` seeds place and size."""
    generator = np.random.default_rng(list(key))
    return draw([label], label["ground"], generator, size=size, num_frames=num_frames)


def draw_pairs(count: int, seed: int) -> list[tuple[Label, Label]]:
    """Labels of the second tier: two objects of different colours over the same ground."""
    generator = np.random.default_rng([seed, 5])
    kinds = labels(held_out=False)
    pairs: list[tuple[Label, Label]] = []
    while len(pairs) < count:
        first, second = (kinds[index] for index in generator.integers(len(kinds), size=2))
        if first["color"] != second["color"]:
            pairs.append((first, {**second, "ground": first["ground"]}))
    return pairs


def pair_caption(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """The caption of two objects."""
    parts = []
    for label in (first, second):
        parts.append(
            f"a {label['color']} {label['shape']} moves {label['direction']} {label['speed']}"
        )
    return f"A{parts[0][1:]} and {parts[1]} over a {first['ground']} ground."


def write_world(
    folder: Path,
    *,
    clips: int,
    true_clips: int = 108,
    size: int = SIZE,
    num_frames: int = NUM_FRAMES,
    seed: int = 0,
) -> None:
    """Writes training clips, true clips that nothing is trained on, their labels, and prompts.

    train/: clips and captions.jsonl. true-heldout/, true-seen/: clips to check the judge and each
    stage with. labels-*.jsonl: their labels. prompts-*.jsonl: captions with labels to sample from,
    prompts-*.txt: the captions alone.

    A folder that is complete is left as it is. Raises ConfigError if it was written with other
    numbers.
    """
    done = folder / "world.json"
    numbers = {"clips": clips, "true_clips": true_clips, "size": size, "seed": seed}
    if num_frames != NUM_FRAMES:
        numbers["num_frames"] = num_frames
    if done.exists():
        if read_json(done) != numbers:
            raise ConfigError(f"{folder} holds another world ({done}); choose another folder")
        return
    seen = labels(held_out=False)
    held_out = labels(held_out=True)
    parts = (
        ("train", TRAIN, balanced(seen, clips, seed)),
        ("true-heldout", TRUE_HELD_OUT, balanced(held_out, true_clips, seed)),
        ("true-seen", TRUE_SEEN, balanced(seen, true_clips, seed + 1)),
    )
    for name, part, part_labels in parts:
        rows = []
        writes = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, label in enumerate(part_labels):
                file = f"{index:05d}.mp4"
                path = folder / name / file
                key = (seed, part, index)
                writes.append(pool.submit(_write_clip, path, label, key, size, num_frames))
                rows.append({"file": file, "caption": caption(label), **label})
            for write in writes:
                write.result()
        captions = [{"file": row["file"], "caption": row["caption"]} for row in rows]
        write_rows(folder / name / "captions.jsonl", captions)
        write_rows(folder / f"labels-{name}.jsonl", rows)
    prompts = (("heldout", held_out * 4), ("seen", balanced(seen, 4 * len(held_out), seed + 2)))
    for name, prompt_labels in prompts:
        rows = [{"caption": caption(label), **label} for label in prompt_labels]
        write_rows(folder / f"prompts-{name}.jsonl", rows)
        lines = [f"{row['caption']}\n" for row in rows]
        write_text(folder / f"prompts-{name}.txt", "".join(lines))
    write_text(done, json.dumps(numbers))


def _write_clip(path: Path, label: Label, key: Sequence[int], size: int, num_frames: int) -> None:
    """Write the video of a label."""
    write_mp4(path, video(label, key, size=size, num_frames=num_frames), FPS, crf=CRF)


def write_pairs(folder: Path, *, clips: int, size: int = SIZE, seed: int = 0) -> None:
    """Writes clips of the second tier, captions.jsonl and labels.jsonl."""
    captions = []
    rows = []
    for index, (first, second) in enumerate(draw_pairs(clips, seed)):
        file = f"{index:05d}.mp4"
        generator = np.random.default_rng([seed, 6, index])
        frames = draw([first, second], first["ground"], generator, size=size)
        write_mp4(folder / file, frames, FPS, crf=CRF)
        captions.append({"file": file, "caption": pair_caption(first, second)})
        rows.append({"file": file, "objects": [first, second]})
    write_rows(folder / "captions.jsonl", captions)
    write_rows(folder / "labels.jsonl", rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes a JSONL file."""
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
