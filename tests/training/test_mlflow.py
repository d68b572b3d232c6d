"""Metrics in MLflow, with the real library, offline.

The other tests do without MLflow, whose 45 packages take about a minute to install. This test
installs them into a folder of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from landiff.training.checkpoint.run_folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ["mlflow-skinny", "sqlalchemy", "alembic"]


@pytest.mark.long
def test_a_resumed_run_continues_its_run_in_mlflow(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    site = tmp_path / "site"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "--target", str(site), *constraints, *PACKAGES], check=True)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "tests.training.mlflow_run", str(run)]
    environment = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=600
    )
    assert done.stderr.count("the trackers do not answer") == 1
    found = json.loads((run / "found.json").read_text())
    assert found["silent_step"] == 3
    assert found["status"] == "FINISHED"
    assert found["params"]["optim.lr"] == "0.1" and found["params"]["loop.steps"] == "3"
    steps = [step for step, _ in found["metrics"]["train/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    for line in read_metrics(run / "metrics.jsonl"):
        step = line.pop("step")
        line.pop("time")
        if step != 4:
            assert {tag: dict(found["metrics"][tag])[step] for tag in line} == line
