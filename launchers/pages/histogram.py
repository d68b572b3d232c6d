"""Histograms as inline SVG for pages. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from landiff.launchers.pages.charts import format_value, ticks
from landiff.launchers.pages.html import Markup, element

WIDTH = 420.0  # in the units of the SVG
HEIGHT = 200.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 16.0, 10.0, 24.0  # margins around the bars
BINS = 30
GAP = 1.0  # between bars


def histogram(values: Sequence[float], description: str, bins: int = BINS) -> Markup:
    """Counts of values in equal bins. Whole numbers get bins of whole width.

    Values that are not finite are left out; the note below the chart says how many.
    """
    finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
    if not finite.size:
        return element("p", "no finite values", class_="dim")
    edges = bin_edges(finite, bins)
    counts = np.histogram(finite, edges)[0]
    bottom = HEIGHT - BOTTOM
    low = float(edges[0])
    high = float(edges[-1])
    most = float(counts.max())

    def across(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def up(count: float) -> float:
        return round(bottom - count / most * (bottom - TOP), 1)

    shapes: list[str] = []
    for count in ticks(0, most, 4, whole=True):
        y = up(count)
        shapes.append(element("line", x1=LEFT, y1=y, x2=WIDTH - RIGHT, y2=y, stroke="var(--line)"))
        shapes.append(element("text", f"{count:,.0f}", x=LEFT - 6, y=y + 4, text_anchor="end"))
    for number, count in enumerate(counts.tolist()):
        first = across(float(edges[number]))
        last = across(float(edges[number + 1]))
        words = f"{format_value(edges[number])} to {format_value(edges[number + 1])}: {count:,}"
        box = {"x": first, "y": up(count), "width": max(0.5, last - first - GAP)}
        box["height"] = round(bottom - up(count), 1)
        shapes.append(element("rect", element("title", words), **box, fill="var(--s0)"))
    for value in ticks(low, high, 5):
        label = format_value(value)
        shapes.append(element("text", label, x=across(value), y=bottom + 18, text_anchor="middle"))
    view = f"0 0 {WIDTH:g} {HEIGHT:g}"
    return element("svg", shapes, viewBox=view, role="img", aria_label=description)


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Edges of at most `bins` equal bins around finite values, float64 [bins + 1]."""
    low = float(values.min())
    high = float(values.max())
    if bool((values == values.round()).all()):
        width = max(1.0, math.ceil((high - low + 1) / bins))
        count = math.ceil((high - low + 1) / width)
        return low - 0.5 + width * np.arange(count + 1)
    if high - low < 1e-12 * max(abs(low), abs(high)):
        return np.array([low - abs(low) / 10, high + abs(high) / 10])
    return np.linspace(low, high, bins + 1)


def note_of(values: Sequence[float]) -> str:
    """Mean and quantiles of the finite values, and how many values are not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, median, high = np.quantile(finite, [0.05, 0.5, 0.95]).tolist()
    text = (
        f"mean {format_value(float(np.mean(finite)))}, median {format_value(median)}, "
        f"90 % within {format_value(low)} to {format_value(high)}"
    )
    if len(finite) < len(values):
        text += f"; {len(values) - len(finite)} not finite"
    return text
