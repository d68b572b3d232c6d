"""Curves as inline SVG for pages, and as PNG. Torch-free."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from landiff.launchers.pages.html import Markup, element, join

WIDTH = 420.0  # of a chart, in the units of its SVG
HEIGHT = 230.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 24.0, 10.0, 24.0  # margins around the curves
MAX_POINTS = 300  # of a curve; of more, the least and the largest of each bucket are drawn
LOG_RANGE = 50.0  # positive values that differ by more are drawn on a logarithmic axis
COLORS = 8  # of the style sheet; further curves repeat them with dashes
PNG_COLORS = (
    "#1f6feb",
    "#d9480f",
    "#2b8a3e",
    "#9c36b5",
    "#0b7285",
    "#a61e4d",
    "#7a5b00",
    "#495057",
)
PNG_SCALE = 2
PNG_TITLE = 26.0  # height of the title above a chart
PNG_COLUMNS = 2

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One curve: values by step, ascending. Values that are not finite leave a gap."""

    name: str
    points: Points


@dataclass(frozen=True)
class Mark:
    """A step at which something happened, drawn as a line. `bad`: something that went wrong."""

    step: float
    label: str
    bad: bool = False


@dataclass(frozen=True)
class Tick:
    """A label of an axis, at a position in the chart."""

    position: float
    label: str


@dataclass(frozen=True)
class Layout:
    """Positions of everything in a chart of WIDTH x HEIGHT."""

    curves: list[list[list[tuple[float, float]]]]  # by series, its parts between gaps
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[tuple[float, Mark]]  # with positions; those outside of the curves are left out


def lay_out(series: Sequence[Series], marks: Sequence[Mark] = ()) -> Layout | None:
    """The positions of curves, axes and labels. None if no value is finite."""
    finite = [point for one in series for point in one.points if math.isfinite(point[1])]
    if not finite:
        return None
    x_low, x_high = _range([x for x, _ in finite])
    values = [y for _, y in finite]
    logarithmic = min(values) > 0 and max(values) > LOG_RANGE * min(values)
    if logarithmic:
        values = [math.log10(y) for y in values]
    y_low, y_high = _range(values)

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        width = WIDTH - LEFT - RIGHT
        height = HEIGHT - TOP - BOTTOM
        return round(LEFT + along * width, 1), round(TOP + (1 - up) * height, 1)

    curves = []
    for one in series:
        parts = []
        for part in _parts(one.points):
            placed = []
            for x, y in thin_out(part):
                placed.append(place(x, math.log10(y) if logarithmic else y))
            parts.append(placed)
        curves.append(parts)
    x_ticks = [Tick(place(x, y_low)[0], f"{x:,.0f}") for x in ticks(x_low, x_high, 5, whole=True)]
    y_ticks = []
    if logarithmic:
        for value in logarithmic_ticks(10**y_low, 10**y_high):
            y_ticks.append(Tick(place(x_low, math.log10(value))[1], format_value(value)))
    else:
        for y in ticks(y_low, y_high, 5):
            y_ticks.append(Tick(place(x_low, y)[1], format_value(y)))
    inside = [mark for mark in marks if x_low <= mark.step <= x_high]
    placed_marks = [(place(mark.step, y_low)[0], mark) for mark in inside]
    return Layout(curves, x_ticks, y_ticks, placed_marks)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest value, apart if they are equal."""
    low = min(values)
    high = max(values)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin


def _parts(points: Points) -> Iterator[list[tuple[float, float]]]:
    """The curve between the values that are not finite."""
    part: list[tuple[float, float]] = []
    for x, y in points:
        if math.isfinite(y):
            part.append((x, y))
        elif part:
            yield part
            part = []
    if part:
        yield part


def thin_out(points: Points, most: int = MAX_POINTS) -> Points:
    """At most about `most` points: of each bucket the least and the largest value, in order."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    kept = [points[0]]
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        least = min(bucket, key=lambda point: point[1])
        largest = max(bucket, key=lambda point: point[1])
        kept.extend(sorted({least, largest}))
    kept.append(points[-1])
    return kept


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` on a logarithmic axis, at most about ten."""
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = max(1, (last - first) // 8)
    found = []
    for power in range(first, last + 1, every):
        for factor in factors:
            value = factor * 10.0**power
            if low <= value <= high:
                found.append(value)
    return found


def format_value(value: float) -> str:
    """A number in few characters."""
    return f"{value:.4g}"


# ---------------------------------------------------------------- SVG


def svg(series: Sequence[Series], description: str, marks: Sequence[Mark] = ()) -> Markup:
    """The curves with axes and, if there are several, a legend. A text if no value is finite."""
    layout = lay_out(series, marks)
    if layout is None:
        return element("p", "no finite values", class_="dim")
    bottom = HEIGHT - BOTTOM
    shapes: list[str] = []
    for tick in layout.y_ticks:
        y = tick.position
        shapes.append(_line(LEFT, y, WIDTH - RIGHT, y))
        shapes.append(element("text", tick.label, x=LEFT - 6, y=y + 4, text_anchor="end"))
    for tick in layout.x_ticks:
        x = tick.position
        shapes.append(_line(x, bottom, x, bottom + 4))
        shapes.append(element("text", tick.label, x=x, y=bottom + 18, text_anchor="middle"))
    shapes.append(_line(LEFT, bottom, WIDTH - RIGHT, bottom))
    for x, mark in layout.marks:
        shapes.append(_line(x, TOP, x, bottom, "var(--bad)" if mark.bad else "var(--dim)"))
        shapes.append(_tooltip(x, f"step {mark.step:,.0f}: {mark.label}"))
    for number, parts in enumerate(layout.curves):
        for part in parts:
            shapes.append(_curve(number, part))
    chart = element(
        "svg",
        shapes,
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=description,
    )
    return join([chart, legend(series) if len(series) > 1 else ""])


def _line(x1: float, y1: float, x2: float, y2: float, color: str = "var(--line)") -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=color)


def _tooltip(x: float, text: str) -> Markup:
    """An invisible strip around a line that shows a text under the pointer."""
    strip = {"x": x - 4, "y": TOP, "width": 8, "height": HEIGHT - TOP - BOTTOM}
    return element("rect", element("title", text), **strip, fill="transparent")


def _curve(number: int, points: Points) -> Markup:
    """A polyline, or a dot if there is one point."""
    color = f"var(--s{number % COLORS})"
    if len(points) == 1:
        return element("circle", cx=points[0][0], cy=points[0][1], r=3, fill=color)
    dash = "5 3" if number // COLORS % 2 else None
    text = " ".join(f"{x:g},{y:g}" for x, y in points)
    return element(
        "polyline",
        points=text,
        fill="none",
        stroke=color,
        stroke_width=1.5,
        stroke_dasharray=dash,
        stroke_linejoin="round",
    )


def legend(series: Sequence[Series]) -> Markup:
    """The names of the curves beside their colors."""
    names = []
    for number, one in enumerate(series):
        swatch = element("svg", _curve(number, [(0, 5), (24, 5)]), viewBox="0 0 24 10")
        names.append(element("span", swatch, one.name))
    return element("div", names, class_="legend")


# ---------------------------------------------------------------- PNG


def png(charts: Sequence[tuple[str, Sequence[Series]]]) -> bytes:
    """Charts with their titles as one picture, two in a row, and the legend of the first below."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(PNG_COLUMNS, len(charts))
    rows = math.ceil(len(charts) / columns)
    names = charts[0][1]
    size = (columns * WIDTH, rows * (HEIGHT + PNG_TITLE) + len(names) * 18 + 10)
    image = Image.new("RGB", (round(size[0] * PNG_SCALE), round(size[1] * PNG_SCALE)), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12 * PNG_SCALE)

    def at(x: float, y: float) -> tuple[float, float]:
        return x * PNG_SCALE, y * PNG_SCALE

    for number, (title, series) in enumerate(charts):
        left = number % columns * WIDTH
        top = number // columns * (HEIGHT + PNG_TITLE)
        draw.text(at(left + LEFT, top + 6), title, fill="black", font=font)
        top += PNG_TITLE
        layout = lay_out(series)
        if layout is None:
            draw.text(at(left + LEFT, top + 40), "no finite values", fill="#5f6670", font=font)
            continue
        for tick in layout.y_ticks:
            y = top + tick.position
            draw.line([at(left + LEFT, y), at(left + WIDTH - RIGHT, y)], fill="#d8dce1", width=2)
            draw.text(at(left + LEFT - 6, y), tick.label, fill="#5f6670", font=font, anchor="rm")
        for tick in layout.x_ticks:
            place = at(left + tick.position, top + HEIGHT - BOTTOM + 6)
            draw.text(place, tick.label, fill="#5f6670", font=font, anchor="mt")
        for color, parts in enumerate(layout.curves):
            for part in parts:
                points = [at(left + x, top + y) for x, y in part]
                fill = PNG_COLORS[color % COLORS]
                if len(points) == 1:
                    draw.circle(points[0], 3 * PNG_SCALE, fill=fill)
                else:
                    draw.line(points, fill=fill, width=3, joint="curve")
    for number, one in enumerate(names):
        y = rows * (HEIGHT + PNG_TITLE) + number * 18 + 8
        color_name = PNG_COLORS[number % COLORS]
        draw.line([at(LEFT, y), at(LEFT + 24, y)], fill=color_name, width=6)
        draw.text(at(LEFT + 32, y), one.name, fill="black", font=font, anchor="lm")
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()
