"""The nano pipeline as a graph of dependent jobs on a real SLURM.

It has real trainers on two nodes, arrays, exports and a sample.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from landiff.launchers.run.records import read_record
from tests.slurm.conftest import Sandbox
from tests.slurm.jobs import processes_of
from tests.slurm.pipeline import SMALL, exported_weights, landiff, last_job, write_site

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(3600)]
STEPS = [
    "tokenizer.loop.steps=12",
    "lm.loop.steps=12",
    "diffusion-main.loop.steps=6",
    "diffusion-control.loop.steps=6",
    *(
        f"{stage}.loop.save_every=2"
        for stage in ("tokenizer", "lm", "diffusion-main", "diffusion-control")
    ),
]
DISTURBANCES = 20


def submit_pipeline(folder: Path, *more: str) -> str:
    return landiff(
        "submit",
        "pipeline",
        "--cluster",
        write_site(folder / "site.yaml"),
        "--prompt",
        "a rabbit",
        *SMALL,
        *STEPS,
        *more,
    )


def run_folders(folder: Path) -> list[Path]:
    return sorted(path.parent.parent for path in (folder / "runs").glob("*/job/job.json"))


@pytest.fixture(scope="module")
def undisturbed(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, run once without disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        submit_pipeline(folder)
        states = {run.name: sandbox.wait(last_job(run), 1800) for run in run_folders(folder)}
    assert set(states.values()) == {"COMPLETED"}, states
    return folder


def test_the_pipeline_runs_as_a_graph(undisturbed):
    names = {run.name for run in run_folders(undisturbed)}
    assert {
        "shards",
        "features",
        "columns-tokens",
        "columns-latents",
        "enter-latents",
        "lm",
        "diffusion-main",
        "export-diffusion",
        "sample",
    } <= names
    assert len(list((undisturbed / "samples").glob("*.mp4"))) == 1
    assert set(exported_weights(undisturbed)) == {"tokenizer", "lm", "main", "diffusion"}


def test_submitting_again_skips_what_is_done(undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed)
    again = submit_pipeline(undisturbed)
    assert again.count("done already") == len(run_folders(undisturbed)) and "; /" not in again


def test_an_edited_stage_alone_runs_again(sandbox, undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed)
    again = submit_pipeline(undisturbed, "sample.seed=7")
    assert (
        again.count("done already") == len(run_folders(undisturbed)) - 1 and "sample: job" in again
    )
    assert sandbox.wait(last_job(undisturbed / "runs" / "sample"), 600) == "COMPLETED"


@pytest.mark.timeout(5400)
def test_twenty_disturbances_end_in_the_same_weights(sandbox, undisturbed, tmp_path, monkeypatch):
    """Signals, requeues, killed ranks and dead nodes, in an order drawn by seed, until the end."""
    monkeypatch.chdir(tmp_path)
    draw, said = random.Random(5), []
    submit_pipeline(tmp_path)
    while True:
        active = []
        for run in run_folders(tmp_path):
            jobs = sandbox.slurm.queue(read_record(run)["job_ids"])
            active += [(run, job) for job in jobs if job.active]
        running = [(run, job) for run, job in active if job.state == "RUNNING"]
        if not active:
            if (
                len(said) >= DISTURBANCES
                and exported_weights(tmp_path).keys() == exported_weights(undisturbed).keys()
                and (tmp_path / "samples").exists()
            ):
                break
            if "; /" not in submit_pipeline(tmp_path):  # what was given up resumes
                break
            continue
        if running and len(said) < DISTURBANCES:
            run, job = draw.choice(running)
            kind = disturb(sandbox, draw, run, job.id, job.nodes)
            if kind:
                said.append(f"{kind} {run.name}")
        time.sleep(draw.uniform(2, 8))
    assert len(said) == DISTURBANCES and {kind.split()[0] for kind in said} == {
        "signal",
        "requeue",
        "kill",
        "node",
    }, said
    assert exported_weights(tmp_path) == exported_weights(undisturbed), said


def disturb(sandbox: Sandbox, draw: random.Random, run: Path, job: str, nodes: str) -> str:
    """One disturbance of a running job. Returns its kind, or "" if the job had ended before."""
    kind = draw.choice(["signal", "requeue", "kill", "kill", "node"])
    commands = {
        "signal": ["scancel", "--batch", "--signal=USR1", job],
        "requeue": ["scontrol", "requeue", job],
    }
    if kind in commands:
        return kind if sandbox.slurm.runner(commands[kind]).code == 0 else ""
    if kind == "kill":
        ranks = processes_of(run)
        try:
            os.kill(draw.choice(ranks), signal.SIGKILL)
        except (IndexError, ProcessLookupError):  # not started yet, or ended
            return ""
    else:
        node = f"node{draw.choice([digit for digit in nodes if digit.isdigit()])}"
        sandbox.crash(node)
        sandbox.boot(node)
    return kind
