"""Scores of VBench (arXiv 2311.17982): normalization, weights, and published rows.

A dimension's result is normalized to (x - lowest) / (highest - lowest), weighted, and averaged over
the quality and the semantic dimensions. The total is (4 quality + semantic) / 5. Bounds and weights
are those of scripts/constant.py in the official repository. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from landiff.configs.base import ConfigError

QUALITY_WEIGHT = 4
SEMANTIC_WEIGHT = 1
ROUNDING = 0.01  # of published scores in percent, whose inputs are rounded


@dataclass(frozen=True)
class Dimension:
    """Bounds and weight of one dimension."""

    group: Literal["quality", "semantic"]
    lowest: float = 0.0
    highest: float = 1.0
    weight: float = 1.0

    def normalized(self, result: float) -> float:
        """A result from 0 to 1, relative to the bounds."""
        return (result - self.lowest) / (self.highest - self.lowest)


DIMENSIONS = {
    "subject_consistency": Dimension("quality", 0.1462),
    "background_consistency": Dimension("quality", 0.2615),
    "temporal_flickering": Dimension("quality", 0.6293),
    "motion_smoothness": Dimension("quality", 0.706, 0.9975),
    "dynamic_degree": Dimension("quality", weight=0.5),
    "aesthetic_quality": Dimension("quality"),
    "imaging_quality": Dimension("quality"),
    "object_class": Dimension("semantic"),
    "multiple_objects": Dimension("semantic"),
    "human_action": Dimension("semantic"),
    "color": Dimension("semantic"),
    "spatial_relationship": Dimension("semantic"),
    "scene": Dimension("semantic", highest=0.8222),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855),
    "temporal_style": Dimension("semantic", highest=0.364),
    "overall_consistency": Dimension("semantic", highest=0.364),
}
"""By the names of the official result files."""


@dataclass(frozen=True)
class Scores:
    """Scores in percent. A group with a missing dimension has none, and then there is no total."""

    quality: float | None
    semantic: float | None
    total: float | None


def aggregate(results: Mapping[str, float]) -> Scores:
    """The scores of results from 0 to 1 by dimension.

    Raises ConfigError for an unknown dimension or a result outside of 0 to 1.
    """
    for name, result in results.items():
        if name not in DIMENSIONS:
            raise ConfigError(f"{name!r} is no dimension of VBench; known: {', '.join(DIMENSIONS)}")
        if not 0 <= result <= 1:
            raise ConfigError(f"{name} = {result:g}: a result of VBench lies between 0 and 1")
    quality = _mean(results, "quality")
    semantic = _mean(results, "semantic")
    total = None
    if quality is not None and semantic is not None:
        total = total_of(quality, semantic)
    return Scores(quality, semantic, total)


def _mean(results: Mapping[str, float], group: str) -> float | None:
    """Weighted mean of the normalized results of a group in percent; None if one is missing."""
    weighted = 0.0
    weights = 0.0
    for name, dimension in DIMENSIONS.items():
        if dimension.group != group:
            continue
        if name not in results:
            return None
        weighted += dimension.weight * dimension.normalized(results[name])
        weights += dimension.weight
    return 100 * weighted / weights


def total_of(quality: float, semantic: float) -> float:
    """The total of two group scores."""
    weights = QUALITY_WEIGHT + SEMANTIC_WEIGHT
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / weights


@dataclass(frozen=True)
class PublishedRow:
    """A row of the public leaderboard, in percent.

    results: by dimension, in the order of `DIMENSIONS`.
    seconds: length of the videos, if the row states it.
    """

    model: str
    quality: float
    semantic: float
    total: float
    results: tuple[float, ...]
    seconds: float | None = None

    def by_dimension(self) -> dict[str, float]:
        """Results from 0 to 1 by dimension."""
        return {name: value / 100 for name, value in zip(DIMENSIONS, self.results, strict=True)}

    def inconsistencies(self) -> list[str]:
        """What does not follow from the row's own numbers within their rounding."""
        scores = aggregate(self.by_dimension())
        expected = {
            "quality": (scores.quality, self.quality),
            "semantic": (scores.semantic, self.semantic),
            "total": (total_of(self.quality, self.semantic), self.total),
        }
        found = []
        for name, (computed, published) in expected.items():
            assert computed is not None, name
            if abs(computed - published) > ROUNDING:
                found.append(f"{name}: {published} is published, {computed:.2f} follows")
        return found


# fmt: off
PUBLISHED = (
    PublishedRow("OpenSora V1.2", 80.71, 73.30, 79.23, (
        94.45, 97.90, 99.47, 98.20, 47.22, 56.18, 60.94,
        83.37, 58.41, 85.80, 87.49, 67.51, 42.47, 23.89, 24.55, 27.07)),
    PublishedRow("OpenSora V1.2 (8s)", 81.35, 73.39, 79.76, (
        96.75, 97.61, 99.53, 98.50, 42.39, 56.85, 63.34,
        82.22, 51.83, 91.20, 90.08, 68.56, 42.44, 23.95, 24.54, 26.85), seconds=8.0),
    PublishedRow("CogVideoX-5B", 82.75, 77.04, 81.61, (
        96.23, 96.52, 98.66, 96.92, 70.97, 61.98, 62.90,
        85.23, 62.11, 99.40, 82.81, 66.35, 53.20, 24.91, 25.38, 27.59)),
    PublishedRow("Kling", 83.39, 75.68, 81.85, (
        98.33, 97.60, 99.30, 99.40, 46.94, 61.21, 65.62,
        87.24, 68.05, 93.40, 89.90, 73.03, 50.86, 19.62, 24.17, 26.42)),
    PublishedRow("HunyuanVideo", 85.09, 75.82, 83.24, (
        97.37, 97.76, 99.44, 98.99, 70.83, 60.36, 67.56,
        86.10, 68.55, 94.40, 91.60, 68.68, 53.88, 19.80, 23.89, 26.44)),
    PublishedRow("Sora", 85.51, 79.35, 84.28, (
        96.23, 96.35, 98.87, 98.74, 79.91, 63.46, 68.28,
        93.93, 70.85, 98.20, 80.11, 74.29, 56.95, 24.76, 25.01, 26.26)),
)
# fmt: on
