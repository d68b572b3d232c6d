"""The nano pipeline, small enough for tests: commands, a cluster file, results."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from landiff.configs.paths import IMPORT_ROOT
from landiff.launchers.cli import main

SITE: dict[str, Any] = {
    "default": {"nodes": 1, "tasks_per_node": 2, "cpus_per_task": 1, "memory": "2G", "time": "60"},
    "stages": {
        "precompute": {"array": 2},
        "lm": {"nodes": 2, "tasks_per_node": 1},
        "diffusion": {"nodes": 2, "tasks_per_node": 1},
    },
    "env": {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""},
    "max_restarts": 3,
    "signal_margin_s": 30,
    "preflight": False,
}
SMALL = ["sample.steps=2", "evaluate.samples=2", "evaluate.seeds=1"]


def landiff(*words: str) -> str:
    """What the command prints; it must end well."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = main(list(words))
    assert code == 0, said.getvalue()
    return said.getvalue()


def landiff_process(folder: Path, *words: str) -> None:
    """The same in a process of its own, for what imports torch."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(IMPORT_ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "landiff.launchers.cli", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


def write_site(path: Path, **changes: Any) -> str:
    """Write a cluster file. Returns its path, for --cluster."""
    path.write_text(yaml.safe_dump(SITE | changes))
    return str(path)


def last_job(run: Path) -> str:
    return json.loads((run / "job" / "job.json").read_text())["job_ids"][-1]


def logged_losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines]


def tree_hashes(folder: Path, skip: Sequence[str] = ()) -> Mapping[str, str]:
    """sha256 of every file below, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part in skip for part in path.parts)
    }


def exported_weights(folder: Path) -> Mapping[str, str]:
    """sha256 of the weights of every zoo entry, by name."""
    return {
        path.parent.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "zoo").glob("*/*/model.safetensors"))
    }
