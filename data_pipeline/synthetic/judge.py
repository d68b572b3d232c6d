"""Pixel judge of the shapes world: reads the five attributes from a video, without any model.

Ground: median colour, compared with the three grounds. Object: pixels far from the ground. Colour:
median of the farthest ones, compared with the five colours. Shape: best overlap with drawn shapes
of the same area. Direction and speed: slope of the object's centre, measured on the torus, so that
an object that leaves on one side and enters on the other is followed.

An attribute of which nothing can be said is None and counts as wrong. Distances and speeds are
relative to the height of the frame, so that videos of every size are judged alike.

Shape letters: T frames, H, W height and width in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from landiff.data_pipeline.synthetic.world import (
    ATTRIBUTES,
    COLORS,
    FPS,
    GROUNDS,
    SHAPES,
    SPEEDS,
    VALUES,
    Label,
    coverage,
)

MAX_GROUND_DISTANCE = 90  # between RGB colours; grounds are at least 190 apart
MAX_COLOR_DISTANCE = 110
MIN_CONTRAST = 50  # of the object to the ground
AREAS = (0.01, 0.45)  # parts of the frame that an object can cover
STRAIGHT = 2.0  # times as fast along one axis as along the other
SHAPE_FRAMES = 6  # frames whose shape is compared
KEPT = ("color", "shape", "direction")  # attributes that are compared over a long video
UNIT_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # of radius 1


@dataclass(frozen=True)
class Verdict:
    """What a video shows.

    found: value of each attribute, None where nothing can be said.
    velocity: of the object along x and y, in frame heights per second; None without an object.
    overlap: of the object with each shape, intersection over union; empty without an object.
    """

    found: Mapping[str, str | None]
    velocity: tuple[float, float] | None
    overlap: Mapping[str, float]


def judge(frames_THWC: np.ndarray, fps: float = FPS) -> Verdict:
    """Judges a video, uint8 [T, H, W, 3]."""
    pixels = frames_THWC.astype(np.float32)
    found: dict[str, str | None] = dict.fromkeys(ATTRIBUTES)
    ground_rgb = np.median(pixels.reshape(-1, 3), axis=0)
    found["ground"] = nearest(ground_rgb, GROUNDS, MAX_GROUND_DISTANCE)
    distance_THW = np.linalg.norm(pixels - ground_rgb, axis=-1)
    strongest = float(np.quantile(distance_THW, 0.99))
    if strongest < MIN_CONTRAST:
        return Verdict(found, None, {})
    object_THW = distance_THW > max(0.45 * strongest, 35)
    area_T = object_THW.mean(axis=(1, 2))
    usable_T = (area_T > AREAS[0]) & (area_T < AREAS[1])
    if usable_T.mean() < 0.5:
        return Verdict(found, None, {})
    inside_THW = object_THW & usable_T[:, None, None]
    rim = np.quantile(distance_THW[inside_THW], 0.3)
    color_rgb = np.median(pixels[inside_THW & (distance_THW >= rim)], axis=0)
    found["color"] = nearest(color_rgb, COLORS, MAX_COLOR_DISTANCE)
    overlap = shape_overlaps(object_THW[usable_T])
    found["shape"] = max(overlap, key=lambda shape: overlap[shape])
    height = frames_THWC.shape[1]
    x, y = (slope * fps / height for slope in slopes(object_THW, usable_T))
    found["direction"] = direction_of(x, y)
    found["speed"] = speed_of(float(np.hypot(x, y)))
    return Verdict(found, (x, y), overlap)


def keeps(frames_THWC: np.ndarray, parts: int, fps: float = FPS) -> dict[str, bool]:
    """Whether every part of a video shows the colour, shape and direction of its first part.

    parts: number of parts of nearly equal length, the chunks of a long video for instance.
    """
    seen = [judge(part_THWC, fps).found for part_THWC in np.array_split(frames_THWC, parts)]
    kept = {}
    for name in KEPT:
        values = {found[name] for found in seen}
        kept[name] = len(values) == 1 and None not in values
    return kept


def nearest(
    rgb: np.ndarray, palette: Mapping[str, tuple[int, int, int]], limit: float
) -> str | None:
    """Name of the nearest colour; None if it is farther than `limit`."""
    distances = {name: float(np.linalg.norm(rgb - np.array(c))) for name, c in palette.items()}
    name = min(distances, key=lambda key: distances[key])
    return name if distances[name] < limit else None


def direction_of(x: float, y: float) -> str | None:
    """Direction of a velocity in frame heights per second; None if it is along no axis."""
    fast = max(abs(x), abs(y))
    slow = min(abs(x), abs(y))
    if fast < 0.06 or fast < STRAIGHT * slow:
        return None
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def speed_of(speed: float) -> str | None:
    """Name of a speed in frame heights per second; None if it is far from both."""
    slow = SPEEDS["slowly"]
    quick = SPEEDS["quickly"]
    if not slow / 2 < speed < quick * 1.5:
        return None
    return "slowly" if speed < np.sqrt(slow * quick) else "quickly"


def center(mask_HW: np.ndarray) -> tuple[float, float]:
    """Centre of mass (x, y) in pixels on the torus, from -H/2 to H/2."""
    found = []
    for axis in (0, 1):
        profile = mask_HW.sum(axis=axis)
        size = len(profile)
        wave = np.exp(2j * np.pi * np.arange(size) / size)
        found.append(float(np.angle((profile * wave).sum()) / (2 * np.pi) * size))
    return found[0], found[1]


def slopes(object_THW: np.ndarray, usable_T: np.ndarray) -> tuple[float, float]:
    """Pixels per frame of the object's centre along x and y, by least squares."""
    times = np.flatnonzero(usable_T)
    centers_T2 = np.array([center(object_THW[time]) for time in times])
    periods = np.array([object_THW.shape[2], object_THW.shape[1]])
    path_T2 = np.unwrap(centers_T2, axis=0, period=periods[0])
    if periods[0] != periods[1]:
        path_T2[:, 1] = np.unwrap(centers_T2[:, 1], period=periods[1])
    slope_x, slope_y = np.polyfit(times, path_T2, 1)[0]
    return float(slope_x), float(slope_y)


def shape_overlaps(object_THW: np.ndarray) -> dict[str, float]:
    """Mean over frames of the best overlap with each shape, intersection over union."""
    size = object_THW.shape[1]
    scores: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    for mask_HW in object_THW[:: max(1, len(object_THW) // SHAPE_FRAMES)]:
        x, y = center(mask_HW)
        shift = (round(size / 2 - y), round(size / 2 - x))
        middle_HW = np.roll(mask_HW, shift, axis=(0, 1))
        for shape in SHAPES:
            scores[shape].append(best_overlap(middle_HW, shape))
    return {shape: float(np.mean(values)) for shape, values in scores.items()}


def best_overlap(middle_HW: np.ndarray, shape: str) -> float:
    """Best overlap of a centred object with a shape of about the same area."""
    size = len(middle_HW)
    radius = float(np.sqrt(middle_HW.sum() / UNIT_AREAS[shape]))
    # The centre of mass of a triangle lies a third of its radius below its middle.
    drop = round(-radius / 3) if shape == "triangle" else 0
    best = 0.0
    for factor, dx, dy in itertools.product((0.92, 1.0, 1.08), (-1, 0, 1), (-1, 0, 1)):
        place = (size / 2 + dx, size / 2 + dy + drop)
        drawn_HW = coverage(shape, place, radius * factor, size, samples=1) > 0.5
        union = (middle_HW | drawn_HW).sum()
        best = max(best, float((middle_HW & drawn_HW).sum() / union))
    return best


@dataclass(frozen=True)
class Rates:
    """How often videos show what their labels say.

    right: fraction of videos with the right value, by attribute.
    all_right: fraction of videos with all five right.
    unsaid: fraction of videos of which nothing can be said, by attribute.
    confusion: attribute -> label's value -> found value ("nothing" for None) -> videos.
    shuffled: `right` of the same videos against labels of other videos, which shows what a model
        reaches that ignores its text. `all` holds the fraction with all five right.
    """

    videos: int
    right: Mapping[str, float]
    all_right: float
    unsaid: Mapping[str, float]
    confusion: Mapping[str, Mapping[str, Mapping[str, int]]]
    shuffled: Mapping[str, float]


def rates(wanted: Sequence[Label], found: Sequence[Mapping[str, str | None]]) -> Rates:
    """Rates of videos with labels `wanted` that show `found`."""
    right, all_right = _right(wanted, found)
    order = np.random.default_rng(0).permutation(len(wanted))
    shuffled, shuffled_all = _right([wanted[index] for index in order], found)
    unsaid = {}
    confusion = {}
    for name in ATTRIBUTES:
        unsaid[name] = sum(values[name] is None for values in found) / len(found)
        table = {value: dict.fromkeys([*VALUES[name], "nothing"], 0) for value in VALUES[name]}
        for label, values in zip(wanted, found, strict=True):
            table[label[name]][values[name] or "nothing"] += 1
        confusion[name] = table
    return Rates(
        len(wanted), right, all_right, unsaid, confusion, {**shuffled, "all": shuffled_all}
    )


def _right(
    wanted: Sequence[Label], found: Sequence[Mapping[str, str | None]]
) -> tuple[dict[str, float], float]:
    """Fraction of right values by attribute, and of videos with all right."""
    hits = {name: np.zeros(len(wanted), bool) for name in ATTRIBUTES}
    for index, (label, values) in enumerate(zip(wanted, found, strict=True)):
        for name in ATTRIBUTES:
            hits[name][index] = values[name] == label[name]
    every = np.stack(list(hits.values())).all(axis=0)
    return {name: float(hit.mean()) for name, hit in hits.items()}, float(every.mean())


def chance() -> dict[str, float]:
    """Rates of random answers."""
    found = {name: 1 / len(VALUES[name]) for name in ATTRIBUTES}
    return {**found, "all": float(np.prod(list(found.values())))}


def interval(rate: float, videos: int) -> tuple[float, float]:
    """95 % Wilson interval of a rate."""
    z = 1.96
    middle = (rate + z * z / (2 * videos)) / (1 + z * z / videos)
    spread = z / (1 + z * z / videos)
    spread *= np.sqrt(rate * (1 - rate) / videos + z * z / (4 * videos * videos))
    return float(middle - spread), float(middle + spread)
