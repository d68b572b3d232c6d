"""Config and curves of runs, as `landiff compare` and `landiff report` read them. Torch-free."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landiff.configs.base import ConfigError
from landiff.configs.documents import read_yaml
from landiff.configs.secrets import redact
from landiff.training.checkpoint.resume import flat_keys
from landiff.training.checkpoint.run_folder import CONFIG, METRICS, RESOLVED, read_metrics

VALIDATION = ("val/", "val_ema/")
"""Beginnings of the tags of validation, on raw weights and on their moving average."""

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds for comparison.

    config: the resolved config by dotted key.
    curves: (step, value) by tag, ascending.
    """

    folder: Path
    config: dict[str, Any]
    curves: dict[str, Curve]

    @property
    def name(self) -> str:
        """The folder as it was given."""
        return str(self.folder)

    def final(self, prefixes: Sequence[str] = VALIDATION) -> dict[str, tuple[float, float]]:
        """The last (step, value) of each tag that begins with one of the prefixes."""
        found = {}
        for tag, curve in sorted(self.curves.items()):
            if tag.startswith(tuple(prefixes)):
                found[tag] = curve[-1]
        return found


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises ConfigError if it is none."""
    path = next((folder / name for name in (CONFIG, RESOLVED) if (folder / name).is_file()), None)
    if path is None and not (folder / METRICS).is_file():
        raise ConfigError(
            f"{folder} is not the folder of a run: it has neither {CONFIG} nor {METRICS}; "
            "landiff status --all lists the run folders"
        )
    config = {} if path is None else flat_keys(read_yaml(path))
    return RunRecord(folder, config, curves_by_tag(read_metrics(folder / METRICS)))


def curves_by_tag(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """The curves in the lines of a metrics.jsonl. Of several values of a step the last one counts.

    Values that are no numbers are left out.
    """
    found: dict[str, dict[float, float]] = {}
    for line in lines:
        for tag, value in line.items():
            if tag in ("step", "time") or isinstance(value, bool):
                continue
            if isinstance(value, int | float):
                found.setdefault(tag, {})[line["step"]] = float(value)
    return {tag: sorted(points.items()) for tag, points in found.items()}


def value_at(curve: Curve, step: float) -> float | None:
    """The last value up to a step, or None before the first."""
    position = bisect.bisect_right(curve, (step, math.inf))
    return curve[position - 1][1] if position else None


def shown_value(value: Any) -> str:
    """A value of a config as text, without secrets."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return redact(str(value))
