"""Groups of rows of a benchmark, each measured in a process of its own.

An error in one group, such as a lack of memory or a lost CUDA context, leaves the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.support.rows import Row


@dataclass(frozen=True)
class Report:
    """Rows of some groups. title: sizes and device that they were measured on."""

    title: str
    rows: Sequence[Row]


def write_report(path: Path, report: Report) -> None:
    """Writes the report of a process."""
    rows = [asdict(row) for row in report.rows]
    path.write_text(json.dumps({"title": report.title, "rows": rows}))


def read_report(path: Path) -> Report:
    """Reads what `write_report` has written."""
    data = json.loads(path.read_text())
    return Report(data["title"], [Row(**row) for row in data["rows"]])


def run_groups(
    module: str, command: Sequence[str], names: Sequence[str]
) -> tuple[list[Report], dict[str, str]]:
    """Runs `module` for each group. Returns the reports, and how the other groups ended.

    command: options of the command line, to which `--only` and `--report` are added.
    """
    reports = []
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / f"{name}.json"
            options = [*command, "--only", name, "--report", str(path)]
            ended = subprocess.run([sys.executable, "-m", module, *options], check=False)
            if ended.returncode == 0 and path.exists():
                reports.append(read_report(path))
            else:
                failed[name] = f"exit code {ended.returncode}, see the messages above"
    return reports, failed
