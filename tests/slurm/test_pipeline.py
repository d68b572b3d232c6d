"""The nano walk as a graph of dependent jobs on a real SLURM: real trainers on two nodes, arrays, exports, a sample."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from launchers.cli import main
from launchers.submit import read_record
from tests.slurm.conftest import Sandbox

pytestmark = [pytest.mark.slurm, pytest.mark.long]

SITE = {
    "default": {"nodes": 1, "tasks_per_node": 2, "cpus_per_task": 1, "memory": "2G", "time": "20"},
    "stages": {"precompute": {"array": 2}, "lm": {"nodes": 2, "tasks_per_node": 1}, "diffusion": {"nodes": 2, "tasks_per_node": 1}},
    "env": {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}, "max_restarts": 2, "signal_margin_s": 30,
}
QUICK = ["tokenizer.loop.steps=4", "lm.loop.steps=4", "diffusion-main.loop.steps=2", "diffusion-control.loop.steps=2",
         "sample.steps=2", "evaluate.samples=2", "evaluate.seeds=1"]


def landiff(*words: str) -> str:
    """What the command prints; it must end well."""
    said = io.StringIO()
    with redirect_stdout(said):
        assert main(list(words)) == 0, said.getvalue()
    return said.getvalue()


def test_the_walk_runs_as_a_graph_and_is_skipped_the_second_time(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE))
    words = ["submit", "pipeline", "--cluster", "site.yaml", "--prompt", "a rabbit", *QUICK]
    landiff(*words)
    runs = sorted((tmp_path / "runs").glob("*/job/job.json"))
    jobs = {path.parent.parent.name: read_record(path.parent.parent)["job_ids"][-1] for path in runs}
    states = {name: sandbox.wait(job, 900) for name, job in jobs.items()}
    assert set(states.values()) == {"COMPLETED"}, {name: state for name, state in states.items() if state != "COMPLETED"}
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 1
    assert {"shards", "features", "columns-tokens", "columns-latents", "lm", "diffusion-main", "export-diffusion", "sample"} <= set(jobs)
    again = landiff(*words)
    assert again.count("done already") == len(jobs) and "job " not in again.replace("done already", "")
