"""`landiff report`: an HTML page about a run: curves, previews, config and events. Torch-free.

The page is built from the run folder alone, so that it can be made of a run that runs, has failed,
or was copied from elsewhere.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from landiff.configs.base import ConfigError
from landiff.configs.durations import duration
from landiff.configs.loader import read_json_as
from landiff.configs.problems import check_output_file, require_none
from landiff.configs.secrets import redact
from landiff.launchers.pages import html
from landiff.launchers.pages.charts import Mark, Series, format_value, svg
from landiff.launchers.run.curves import VALIDATION, Curve, RunRecord, read_run, shown_value
from landiff.launchers.run.previews import read_previews
from landiff.launchers.run.status import RunStatus, statuses
from landiff.launchers.slurm.client import Slurm
from landiff.training.checkpoint.errors import error_paths, read_message
from landiff.training.checkpoint.files import CheckpointState, is_healthy
from landiff.training.checkpoint.run_folder import (
    CHECKPOINTS,
    EVENTS,
    PARENT,
    STATE,
    committed_steps,
    step_folder,
)
from landiff.training.observe.events import read_events

REPORT = "report.html"  # in the run folder
FIRST_GROUPS = ("train", "val", "codebook")
LAST_GROUPS = ("data", "throughput", "time", "start", "memory")
OPEN_GROUPS = ("train", "val")
EVENTS_SHOWN = 50
PREVIEW_STEPS = 3  # newest previews of each tag that are shown
PREVIEW_BYTES = 40 << 20  # of all previews together

CURVE_NAMES = {"val/": "raw weights", "val_ema/": "moving average"}


def report_command(args: argparse.Namespace) -> int:
    """Writes the report and prints its path. Returns the exit code."""
    run = Path(args.run)
    out = Path(args.out) if args.out else run / REPORT
    record = read_run(run)
    require_none(check_output_file("--out", out))
    html.write_page(out, f"Run {record.name}", *report_sections(record))
    print(f"report: {out}")
    return 0


def report_sections(record: RunRecord) -> list[html.Markup]:
    """The parts of the page, in order."""
    (status,), _ = statuses([record.folder], Slurm(retry_waits_s=(1.0,)))
    events = read_events(record.folder / EVENTS)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        html.element("p", f"Written {written}.", class_="dim"),
        summary(record, status),
        *curve_sections(record.curves, marks_of(events, record.config)),
        validation_section(record),
        preview_section(record.folder),
        phase_section(record.config),
        event_section(record.folder, status, events),
        config_section(record.config),
    ]
    return [section for section in sections if section]


# -------------------------------------------------------------------- summary


def summary(record: RunRecord, status: RunStatus) -> html.Markup:
    """State, progress and the last numbers of the run."""
    bad = status.state in ("failed", "interrupted", "cancelled")
    kind = "bad" if bad else "good" if status.state in ("done", "running") else None
    rows: list[list[str]] = [["state", html.element("span", status.state, class_=kind)]]
    total = status.steps or record.config.get("loop.steps")
    if status.step is not None:
        rows.append(["step", f"{status.step:,} of {total:,}" if total else f"{status.step:,}"])
    if status.seconds_left is not None:
        rows.append(["time left", duration(status.seconds_left)])
    names = {
        "train/loss": "loss",
        "throughput/steps_per_s": "steps a second",
        "throughput/mfu": "MFU",
        "throughput/tflops_per_device": "TFLOP/s a device",
        "memory/device_gib": "device memory, GiB",
        "data/wait_fraction": "waiting for data",
    }
    for tag, name in names.items():
        if tag in record.curves:
            value = record.curves[tag][-1][1]
            fraction = tag in ("throughput/mfu", "data/wait_fraction")
            rows.append([name, f"{value:.1%}" if fraction else format_value(value)])
    if status.checkpoint is not None:
        rows.append(["newest checkpoint", f"step {status.checkpoint:,}"])
    rows += origin(record.folder, status)
    return html.section("Summary", html.table([], rows))


def origin(run: Path, status: RunStatus) -> list[list[str]]:
    """Rows on ranks, versions and parent of the run, as far as they are recorded."""
    rows = []
    if status.checkpoint is not None:
        path = step_folder(run / CHECKPOINTS, status.checkpoint) / STATE
        try:
            state = read_json_as(CheckpointState, path)
        except (OSError, ConfigError):
            return []
        rows.append(["ranks", str(state.world_size)])
        rows.append(["versions", ", ".join(f"{k} {v}" for k, v in state.versions.items())])
    if (run / PARENT).is_file():
        rows.append(["parent", (run / PARENT).read_text(encoding="utf-8", errors="replace")])
    return rows


# -------------------------------------------------------------------- curves


def marks_of(events: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[Mark]:
    """Steps without an update and beginnings of phases, for the charts of training."""
    marks = []
    for event in events:
        if event.get("kind") in ("skip", "rollback"):
            marks.append(Mark(event["step"], str(event["kind"]), bad=True))
    for number, phase in enumerate(config.get("phases") or [], 1):
        if isinstance(phase, dict) and isinstance(phase.get("from_step"), int):
            marks.append(Mark(phase["from_step"], f"phase {number} begins"))
    return marks


def curve_sections(curves: Mapping[str, Curve], marks: Sequence[Mark]) -> list[html.Markup]:
    """The charts, one section for each group of tags. `marks`: for those of training."""
    groups: dict[str, list[html.Markup]] = {}
    for title, series in charts(curves).items():
        group = title.partition("/")[0]
        drawing = svg(series, f"{title} by step", marks if group == "train" else ())
        groups.setdefault(group, []).append(html.figure(drawing, title, last_values(series)))
    sections = []
    for name in sorted(groups, key=_group_order):
        body = html.grid(groups[name])
        sections.append(html.details(name, body, is_open=name in OPEN_GROUPS))
    if not sections:
        return []
    return [html.section("Curves", sections)]


def last_values(series: Sequence[Series]) -> str:
    """The last value of each curve, with the names of the curves if there are several."""
    values = [format_value(one.points[-1][1]) for one in series]
    if len(series) == 1:
        return f"last {values[0]}"
    named = [f"{one.name} {value}" for one, value in zip(series, values, strict=True)]
    return f"last: {', '.join(named)}"


def charts(curves: Mapping[str, Curve]) -> dict[str, list[Series]]:
    """The curves of each chart by title.

    Raw and averaged weights share a chart, and so do the parts of a step and of the start.
    """
    found: dict[str, list[Series]] = {}
    for tag, curve in sorted(curves.items(), key=lambda item: _chart_order(item[0])):
        prefix = next((prefix for prefix in VALIDATION if tag.startswith(prefix)), "")
        if prefix:
            title = f"val/{tag.removeprefix(prefix)}"
            found.setdefault(title, []).append(Series(CURVE_NAMES[prefix], curve))
        elif tag.startswith("time/") and tag.endswith("_s") and not tag.endswith("_lag_s"):
            name = tag.removeprefix("time/").removesuffix("_s").replace("_", " ")
            found.setdefault("time/seconds a step by part", []).append(Series(name, curve))
        elif tag.startswith("start/"):
            name = tag.removeprefix("start/").removesuffix("_s").replace("_", " ")
            found.setdefault("start/seconds of the start by part", []).append(Series(name, curve))
        else:
            found[tag] = [Series(tag, curve)]
    return found


def _chart_order(tag: str) -> tuple[bool, bool, str]:
    """Raw weights before averaged ones, and the loss first."""
    return tag.startswith("val_ema/"), not tag.endswith("/loss"), tag


def _group_order(name: str) -> tuple[int, str]:
    if name in FIRST_GROUPS:
        return FIRST_GROUPS.index(name), ""
    if name in LAST_GROUPS:
        return 100 + LAST_GROUPS.index(name), ""
    return 50, name


def validation_section(record: RunRecord) -> html.Markup:
    """The last numbers of validation. Empty without validation."""
    rows = []
    for tag, (step, value) in record.final().items():
        text = format_value(value) if math.isfinite(value) else str(value)
        rows.append([tag, text, f"{step:,.0f}"])
    if not rows:
        return html.Markup("")
    return html.section("Last validation", html.table(["metric", "value", "step"], rows, (1, 2)))


# -------------------------------------------------------------------- previews, config, events


def preview_section(run: Path) -> html.Markup:
    """The newest previews in the run's TensorBoard folder. Empty without previews."""
    figures = []
    left = PREVIEW_BYTES
    omitted = 0
    for preview in read_previews(run, PREVIEW_STEPS):
        if len(preview.data) > left:
            omitted += 1
            continue
        left -= len(preview.data)
        title = f"{preview.tag}, step {preview.step:,}"
        figures.append(
            html.figure(html.media(preview.data, preview.kind, title), title, preview.text)
        )
    if not figures:
        return html.Markup("")
    note = f"{omitted} previews are left out; TensorBoard has them." if omitted else ""
    return html.section("Previews", html.grid(figures), html.element("p", note, class_="dim"))


def phase_section(config: Mapping[str, Any]) -> html.Markup:
    """The phases of the config. Empty without phases."""
    phases = config.get("phases")
    if not isinstance(phases, list) or not phases:
        return html.Markup("")
    rows = []
    for number, phase in enumerate(phases, 1):  # phase 0 is the top level of the config
        rows.append([str(number), html.preformatted(_yaml(_without_null(phase)))])
    return html.section("Phases", html.table(["phase", "settings"], rows))


def _without_null(value: Any) -> Any:
    """A section without the keys that are null, which a phase does not change."""
    if not isinstance(value, dict):
        return value
    return {key: _without_null(item) for key, item in value.items() if item is not None}


def event_section(run: Path, status: RunStatus, events: Sequence[Mapping[str, Any]]) -> html.Markup:
    """Checkpoints, restarts, errors, and what the guard decided."""
    rows = []
    steps = committed_steps(run / CHECKPOINTS)
    if steps:
        rows.append(["checkpoints", ", ".join(f"{step:,}" for step in steps)])
    for step in steps:
        if not is_healthy(step_folder(run / CHECKPOINTS, step), unreadable=True):
            rows.append([f"checkpoint {step:,}", "not healthy: an earlier one is used"])
    if status.restarts:
        rows.append(["restarts", str(status.restarts)])
    if status.error:
        rows.append(["last error", redact(status.error)])
    for path in sorted(error_paths(run)):
        rows.append([path.stem.replace("_", " "), redact(read_message(path))])
    parts: list[html.Markup] = []
    if rows:
        parts.append(html.table([], rows))
    if events:
        title = f"Skipped steps, spikes, rollbacks and alarms: {len(events)}"
        parts.append(html.element("h3", title))
        parts.append(html.table(["step", "kind", "values"], event_rows(events), (0,)))
    if not parts:
        return html.Markup("")
    return html.section("Events", parts)


def event_rows(events: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The newest events as rows, the newest first."""
    rows = []
    for event in reversed(events[-EVENTS_SHOWN:]):
        values = []
        for key, value in event.items():
            if key not in ("step", "time", "kind"):
                text = format_value(value) if isinstance(value, float) else shown_value(value)
                values.append(f"{key.replace('_', ' ')} {text}")
        rows.append([f"{event['step']:,}", str(event.get("kind", "")), ", ".join(values)])
    return rows


def config_section(config: Mapping[str, Any]) -> html.Markup:
    """The resolved config, folded. Empty if there is none."""
    if not config:
        return html.Markup("")
    rows = []
    for key, value in config.items():
        text = _yaml(value) if isinstance(value, list | dict) else shown_value(value)
        rows.append([key, text])
    return html.section(
        "Config", html.details(f"{len(rows)} keys", html.table(["key", "value"], rows))
    )


def _yaml(value: Sequence[Any] | Mapping[str, Any]) -> str:
    """A list or section of a config as text, without secrets."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return redact(text).strip()
