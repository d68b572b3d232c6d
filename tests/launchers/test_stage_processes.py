"""Commands that wait for each other, run as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from landiff.launchers.cli import main
from landiff.launchers.local.children import environment
from landiff.launchers.local.stage_processes import Command, run_commands
from landiff.launchers.pipeline import PipelineStage, run_pipeline
from landiff.training.checkpoint.run_folder import committed_steps, read_metrics
from tests.launchers.test_interrupt import wait_for
from tests.training.tokenizer.test_train import write_config
from tests.training.tokenizer.tiny import write_data

PIPELINE = """
import sys
from pathlib import Path
from landiff.launchers.pipeline import PipelineStage, run_pipeline
train = ("train", "tokenizer", "--config", sys.argv[1], "--nproc", "1")
stages = [
    PipelineStage("tokenizer", "semantic tokenizer", train, run="run"),
    PipelineStage("next", "explains a key", ("config", "explain", "loop.steps"), ("tokenizer",)),
]
sys.exit(run_pipeline("quickstart", stages, Path.cwd(), False, at_once=int(sys.argv[2])))
"""


def show(name: str, after: tuple[str, ...] = (), key: str = "loop.steps") -> Command:
    return Command(name, f"explains {key}", ("config", "explain", key), after)


def test_commands_run_side_by_side_and_in_order(tmp_path: Path, capfd):
    commands = [show("a"), show("b"), show("c", ("a", "b", "left out"))]
    finished = list(run_commands(commands, tmp_path, at_once=2))
    assert [each.exit_code for each in finished] == [0, 0, 0]
    assert {finished[0].name, finished[1].name} == {"a", "b"} and finished[2].name == "c"
    assert all(each.cpu_seconds > 0 for each in finished)
    out = capfd.readouterr().out
    assert "== 3/3 c: explains loop.steps" in out
    assert "\na | " in out and "\nb | " in out and "\nc | " in out


@pytest.mark.parametrize(("at_once", "threads"), [(1, "<>"), (2, "<4>"), (16, "<1>")])
def test_commands_that_run_side_by_side_share_the_cores(
    tmp_path: Path, monkeypatch, capfd, at_once: int, threads: str
):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "<$OMP_NUM_THREADS>"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (finished,) = run_commands([show("a")], tmp_path, at_once)
    assert finished.exit_code == 0
    assert threads in capfd.readouterr().out


def test_nothing_starts_after_a_failure(tmp_path: Path, capfd):
    commands = [show("bad", key="no.such"), show("next", ("bad",))]
    finished = list(run_commands(commands, tmp_path, at_once=1))
    assert [each.name for each in finished] == ["bad"] and finished[0].exit_code != 0
    assert "no.such" in capfd.readouterr().err


def start_pipeline(folder: Path, at_once: int = 1) -> subprocess.Popen[str]:
    """A trainer that would run for hours, and a stage after it, in a session of their own."""
    if not (folder / "data").exists():
        write_data(folder / "data")
    loop = {"steps": 1_000_000, "log_every": 1, "save_every": 1_000_000}
    path = write_config(folder / "run", loop=loop)
    return subprocess.Popen(
        [sys.executable, "-c", PIPELINE, str(path), str(at_once)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_pipeline_that_is_stopped_saves_and_resumes_from_there(tmp_path: Path):
    first = start_pipeline(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(metrics, first)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 128 + signal.SIGTERM, output
    assert "landiff quickstart: stopped by SIGTERM; run the same command again" in output
    assert "== 2/2" not in output
    (stage,) = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert stage["exit_code"] == 0 and stage["unfinished"]
    steps = read_metrics(metrics)
    saved = committed_steps(tmp_path / "run" / "checkpoints")
    assert saved == [int(steps[-1]["step"])]

    os.remove(metrics)
    again = start_pipeline(tmp_path, at_once=2)
    wait_for(metrics, again)
    assert main(["stop", str(tmp_path / "run")]) == 0
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 1, output
    assert "landiff quickstart: stage 'tokenizer' was stopped before its last step" in output
    assert "== 2/2" not in output
    assert read_metrics(metrics)[0]["step"] == saved[0] + 1
    (both,) = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert both["seconds"] > stage["seconds"] + 1 and both["cpu_seconds"] > stage["cpu_seconds"] + 1


def test_the_summary_keeps_stages_that_only_an_earlier_run_reached(tmp_path: Path, capfd):
    def run(*keys: str) -> dict[str, dict]:
        stages = []
        for number, key in enumerate(keys):
            after = (stages[-1].name,) if stages else ()
            command = ("config", "explain", key)
            stages.append(PipelineStage(f"stage {number}", "explains a key", command, after))
        run_pipeline("quickstart", stages, tmp_path, False)
        found = json.loads((tmp_path / "summary.json").read_text())["stages"]
        return {stage["name"]: stage for stage in found}

    key = "loop.steps"
    first = run(key, key)
    assert not any(stage["earlier_run"] for stage in first.values())
    failed = run("no.such", key)
    assert failed["stage 0"]["exit_code"] != 0 and not failed["stage 0"]["earlier_run"]
    assert failed["stage 1"] == first["stage 1"] | {"earlier_run": True}
    capfd.readouterr()
    last = run(key)
    assert list(last) == ["stage 0", "stage 1"] and last["stage 0"]["exit_code"] == 0
    times = [run["stage 0"]["cpu_seconds"] for run in (first, failed, last)]
    assert times[0] < times[1] < times[2]
    (row,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("stage 1")]
    assert row.endswith("(earlier run)")


@pytest.mark.long
def test_ctrl_c_in_a_terminal_reaches_the_trainer_once(tmp_path: Path):
    process = start_pipeline(tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "stopped by SIGINT" in output and "Traceback" not in output
    assert len(committed_steps(tmp_path / "run" / "checkpoints")) == 1
