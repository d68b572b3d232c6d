"""Pixel judge of the second tier: reads the attributes of two objects from a video.

Ground: median colour. A pixel belongs to the object colour from which, mixed with the ground, it
could have come. An object is a colour that covers enough of the frame; its shape and motion are
measured as in `judge.py`, in the frames in which the other object does not cover it.

Shape letters: T frames, H, W height and width in pixels, C colours of the palette.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from landiff.data_pipeline.synthetic.judge import (
    AREAS,
    MAX_GROUND_DISTANCE,
    MIN_CONTRAST,
    center,
    direction_of,
    nearest,
    shape_overlaps,
    speed_of,
)
from landiff.data_pipeline.synthetic.world import ATTRIBUTES, COLORS, FPS, GROUNDS, Label

MIN_SHARE = 0.5  # of the object's colour in a mixture with the ground
MAX_RESIDUAL = 60  # distance of a pixel to the nearest mixture
WHOLE = 0.9  # of an object's largest area, from which its shape is compared
SEEN = 0.7  # of an object's largest area, from which its centre is followed
MIN_FRAMES = 4  # of which motion can be said
MAX_STEP = 0.12  # frame heights per frame, twice that of quick objects
STEP_WIDTH = 0.0005

Found = dict[str, str | None]
"""Value of each attribute, None where nothing can be said."""


@dataclass(frozen=True)
class _Object:
    """One object: its share of the frame, averaged over frames, and what can be said of it."""

    area: float
    found: Found


def judge_pair(frames_THWC: np.ndarray, fps: float = FPS) -> list[Found]:
    """The objects of a video, uint8 [T, H, W, 3], the largest first, each with its ground."""
    pixels = frames_THWC.astype(np.float32)
    ground_rgb = np.median(pixels.reshape(-1, 3), axis=0)
    ground = nearest(ground_rgb, GROUNDS, MAX_GROUND_DISTANCE)
    colors_THW = nearest_mixture(pixels, ground_rgb)
    objects = []
    for number, color in enumerate(COLORS):
        object_THW = colors_THW == number
        area = float(object_THW.mean())
        if not AREAS[0] < area < AREAS[1]:
            continue
        found: Found = dict.fromkeys(ATTRIBUTES)
        found |= {"color": color, "ground": ground}
        found |= _shape_and_motion(object_THW, fps)
        objects.append(_Object(area, found))
    objects.sort(key=lambda one: -one.area)
    return [one.found for one in objects]


def nearest_mixture(pixels_THW3: np.ndarray, ground_rgb: np.ndarray) -> np.ndarray:
    """Number of the object colour of each pixel, -1 for the ground, int64 [T, H, W]."""
    palette_C3 = np.array(list(COLORS.values()), np.float32) - ground_rgb
    offsets_THW3 = pixels_THW3 - ground_rgb
    residuals = []
    shares = []
    for color_rgb in palette_C3:
        share_THW = (offsets_THW3 @ color_rgb / (color_rgb @ color_rgb)).clip(0, 1)
        residual_THW3 = offsets_THW3 - share_THW[..., None] * color_rgb
        residuals.append(np.linalg.norm(residual_THW3, axis=-1))
        shares.append(share_THW)
    residuals_CTHW = np.stack(residuals)
    best_THW = residuals_CTHW.argmin(axis=0)
    share_THW = np.take_along_axis(np.stack(shares), best_THW[None], axis=0)[0]
    far_THW = np.linalg.norm(offsets_THW3, axis=-1) > MIN_CONTRAST
    clear_THW = residuals_CTHW.min(axis=0) < MAX_RESIDUAL
    return np.where(far_THW & clear_THW & (share_THW > MIN_SHARE), best_THW, -1)


def _shape_and_motion(object_THW: np.ndarray, fps: float) -> Found:
    """Shape, direction and speed, from the frames in which little or nothing covers the object."""
    area_T = object_THW.mean(axis=(1, 2))
    largest = np.quantile(area_T, 0.9)
    whole_T = area_T > WHOLE * largest
    seen_T = area_T > SEEN * largest
    overlap = shape_overlaps(object_THW[whole_T])
    found: Found = {"shape": max(overlap, key=lambda shape: overlap[shape])}
    if seen_T.sum() >= MIN_FRAMES:
        x, y = (step * fps for step in steps(object_THW, seen_T))
        found["direction"] = direction_of(x, y)
        found["speed"] = speed_of(float(np.hypot(x, y)))
    return found


def steps(object_THW: np.ndarray, usable_T: np.ndarray) -> tuple[float, float]:
    """Motion of the object along x and y, in frame heights per frame.

    The steps at which the usable centres agree best on the torus. Frames may be missing between
    them, in which a following of the object from frame to frame would lose it.
    """
    times_T = np.flatnonzero(usable_T)
    centers_T2 = np.array([center(object_THW[time]) for time in times_T])
    height, width = object_THW.shape[1:]
    tried_N = np.arange(-MAX_STEP, MAX_STEP, STEP_WIDTH)
    found = []
    for axis, period in ((0, width / height), (1, 1.0)):
        places_T = centers_T2[:, axis] / height
        turns_NT = (places_T - tried_N[:, None] * times_T) / period
        agreement_N = np.abs(np.exp(2j * np.pi * turns_NT).sum(axis=1))
        found.append(float(tried_N[agreement_N.argmax()]))
    return found[0], found[1]


def match(wanted: Sequence[Label], found: Sequence[Mapping[str, str | None]]) -> list[Found]:
    """For each wanted object the found one of its colour, else one of no wanted colour.

    An object that is missing has None for every attribute.
    """
    by_color = {one["color"]: one for one in found}
    colors = [label["color"] for label in wanted]
    others = [one for one in found if one["color"] not in colors]
    matched: list[Found] = []
    for color in colors:
        if color in by_color:
            matched.append(dict(by_color[color]))
        elif others:
            matched.append(dict(others.pop(0)))
        else:
            matched.append(dict.fromkeys(ATTRIBUTES))
    return matched


def both_right(
    wanted: Sequence[Label], matched: Sequence[Mapping[str, str | None]], num_found: int
) -> bool:
    """Whether a video shows the wanted objects with all attributes, and no further one."""
    if num_found != len(wanted):
        return False
    for label, values in zip(wanted, matched, strict=True):
        if any(values[name] != label[name] for name in ATTRIBUTES):
            return False
    return True
