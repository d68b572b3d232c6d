"""`landiff compare`: config keys, curves and final validation of runs side by side. Torch-free."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from landiff.configs.base import ConfigError
from landiff.configs.files import atomic_file
from landiff.launchers.pages.charts import Series, format_value, png
from landiff.launchers.run.curves import RunRecord, read_run, shown_value, value_at

DEFAULT_METRICS = ("train/loss", "val/loss", "val_ema/loss")
ROWS = 10  # steps of a table of curves
ABSENT = "-"
MISSING = object()
"""In place of the value of a key that a config does not have."""


def compare_command(args: argparse.Namespace) -> int:
    """Prints the comparison as text or JSON, and draws the curves. Returns the exit code."""
    if len(args.runs) < 2:
        raise ConfigError(f"{args.runs[0]} alone cannot be compared; name two or more run folders")
    runs = [read_run(Path(run)) for run in args.runs]
    tags = chosen_tags(runs, args.metric)
    if args.plot:
        charts = []
        for tag in tags:
            charts.append((tag, [Series(run.name, run.curves.get(tag, [])) for run in runs]))
        with atomic_file(Path(args.plot)) as file:
            file.write(png(charts))
    if args.json:
        print(json.dumps(as_json(runs, tags), indent=1, allow_nan=False))
    else:
        print(as_text(runs, tags))
    return 0


def chosen_tags(runs: Sequence[RunRecord], patterns: Sequence[str] | None) -> list[str]:
    """Tags of the curves to compare: those that match the patterns. Raises ConfigError for none."""
    known = sorted({tag for run in runs for tag in run.curves})
    if not known:
        raise ConfigError("none of the runs has logged a step yet; train them first")
    chosen: list[str] = []
    for pattern in patterns or DEFAULT_METRICS:
        found = [tag for tag in fnmatch.filter(known, pattern) if tag not in chosen]
        if patterns and not found:
            raise ConfigError(
                f"--metric {pattern}: no run has such a metric; there are {', '.join(known)}"
            )
        chosen += found
    return chosen or known[:1]


def different_keys(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Keys in which the configs differ, with the value of each run or MISSING.

    The run folder, which always differs, is left out.
    """
    keys = sorted({key for run in runs for key in run.config} - {"run"})
    found = {}
    for key in keys:
        values = [run.config.get(key, MISSING) for run in runs]
        if any(value != values[0] for value in values):
            found[key] = values
    return found


def aligned_steps(runs: Sequence[RunRecord], tag: str, rows: int = ROWS) -> list[float]:
    """Logged steps of a tag, evenly chosen, up to the last one of the longest run."""
    steps = sorted({step for run in runs for step, _ in run.curves.get(tag, [])})
    if len(steps) <= rows:
        return steps
    last = len(steps) - 1
    return [steps[round(number * last / (rows - 1))] for number in range(rows)]


def values_at(runs: Sequence[RunRecord], tag: str, step: float) -> list[float | None]:
    """The value of each run at a step: the last logged one, or None outside of its steps."""
    found = []
    for run in runs:
        curve = run.curves.get(tag, [])
        inside = bool(curve) and step <= curve[-1][0]
        found.append(value_at(curve, step) if inside else None)
    return found


# -------------------------------------------------------------------- output


def as_text(runs: Sequence[RunRecord], tags: Sequence[str]) -> str:
    """Human-readable comparison."""
    names = [run.name for run in runs]
    parts = []
    rows = []
    for key, values in different_keys(runs).items():
        rows.append([key, *map(_config_cell, values)])
    parts.append(_table(["config", *names], rows) if rows else "config: no differences")
    for tag in tags:
        rows = []
        for step in aligned_steps(runs, tag):
            rows.append([f"{step:g}", *map(_number, values_at(runs, tag, step))])
        parts.append(_table([tag, *names], rows))
    finals = [run.final() for run in runs]
    rows = []
    for tag in sorted({tag for final in finals for tag in final}):
        cells = []
        for final in finals:
            if tag in final:
                step, value = final[tag]
                cells.append(f"{_number(value)} (step {step:g})")
            else:
                cells.append(ABSENT)
        rows.append([tag, *cells])
    parts.append(_table(["final validation", *names], rows) if rows else "final validation: none")
    return "\n\n".join(parts)


def _config_cell(value: Any) -> str:
    return ABSENT if value is MISSING else shown_value(value)


def _number(value: float | None) -> str:
    return ABSENT if value is None else format_value(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def as_json(runs: Sequence[RunRecord], tags: Sequence[str]) -> dict[str, Any]:
    """The comparison as a JSON document. Numbers that are not finite and missing ones are null."""
    config = {}
    for key, values in different_keys(runs).items():
        config[key] = [None if value is MISSING else shown_value(value) for value in values]
    curves = {}
    for tag in tags:
        steps = sorted({step for run in runs for step, _ in run.curves.get(tag, [])})
        values = []
        for run in runs:
            by_step = dict(run.curves.get(tag, []))
            values.append([_finite(by_step.get(step)) for step in steps])
        curves[tag] = {"steps": steps, "values": values}
    final: dict[str, list[dict[str, float | None] | None]] = {}
    for number, run in enumerate(runs):
        for tag, (step, value) in run.final().items():
            row = final.setdefault(tag, [None] * len(runs))
            row[number] = {"step": step, "value": _finite(value)}
    names = [run.name for run in runs]
    return {"runs": names, "config": config, "curves": curves, "final_validation": final}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
