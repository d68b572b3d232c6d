"""Real trainers over several nodes compute the same numbers as on one machine.

Also through restarts, and with tasks of arrays that are killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from landiff.configs.paths import IMPORT_ROOT
from landiff.launchers.run.status import last_error
from landiff.training.checkpoint.files import latest_whole
from landiff.training.checkpoint.run_folder import committed_steps
from tests.slurm.conftest import Sandbox, full, until
from tests.slurm.jobs import batch_log, processes_of
from tests.slurm.pipeline import (
    landiff,
    landiff_process,
    last_job,
    logged_losses,
    tree_hashes,
    write_site,
)

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(3600)]
LM = [
    "lm",
    "--config",
    "nano/lm",
    "loop.steps=30",
    "loop.log_every=1",
    "loop.save_every=5",
    "data.micro_batch_size=8",
    "parallel.tensor=2",
]
DIFFUSION = [
    "diffusion",
    "--config",
    "nano/diffusion-main",
    "loop.steps=3",
    "loop.log_every=1",
    "loop.preview_every=0",
    "zero.stage=2",
    "data.global_batch_size=4",
    "data.micro_batch_size=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Columns and a tokenizer, made here."""
    folder = tmp_path_factory.mktemp("data")
    for words in (
        ["shards", "--config", "nano/shards", "max_spans=1"],
        ["precompute", "--config", "nano/features"],
        ["train", "tokenizer", "--config", "nano/tokenizer", "--nproc", "1", "loop.steps=2"],
        ["convert", "runs/tokenizer", "--name", "tokenizer"],
        ["precompute", "--config", "nano/precompute"],
    ):
        landiff_process(folder, *words)
    return folder


@pytest.fixture
def here(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(data)
    return data


def submitted(sandbox: Sandbox, folder: Path, words: list[str], run: str, nodes: int) -> Path:
    """The trainer over `nodes` nodes, to its end."""
    site = write_site(
        folder / f"{run}.yaml", stages={words[0]: {"nodes": nodes, "tasks_per_node": 4 // nodes}}
    )
    landiff("submit", *words, f"run=runs/{run}", "--cluster", site)
    assert sandbox.wait(last_job(folder / "runs" / run), 1500) == "COMPLETED"
    return folder / "runs" / run


def run_local(folder: Path, words: list[str], run: str) -> Path:
    """The same four ranks on this machine."""
    site = folder / f"{run}.yaml"
    site.write_text(
        yaml.safe_dump(
            {
                "scheduler": "local",
                "launcher": "torchrun",
                "default": {"tasks_per_node": 4},
                "env": {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""},
            }
        )
    )
    landiff("submit", *words, f"run=runs/{run}", "--cluster", str(site))
    return folder / "runs" / run


@pytest.fixture(scope="module")
def lm_here(data: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data)
        return run_local(data, LM, "lm-here")


def test_a_language_model_over_two_nodes_trains_as_on_one_machine(sandbox, here, lm_here):
    run = submitted(sandbox, here, LM, "lm-nodes", nodes=2)  # tensor 2 x data 2
    assert logged_losses(run) == logged_losses(lm_here) and len(logged_losses(run)) == 30


def test_zero_2_over_four_nodes_trains_as_on_one_machine(sandbox, here):
    run = submitted(sandbox, here, DIFFUSION, "diffusion-nodes", nodes=4)
    assert (
        logged_losses(run) == logged_losses(run_local(here, DIFFUSION, "diffusion-here"))
        and len(logged_losses(run)) == 3
    )


def test_a_signal_a_killed_rank_and_a_dead_node_leave_no_trace_in_the_losses(
    sandbox, here, lm_here
):
    run, site = (
        here / "runs" / "lm-troubled",
        write_site(here / "troubled.yaml", stages={"lm": {"nodes": 2, "tasks_per_node": 2}}),
    )
    landiff("submit", *LM, "run=runs/lm-troubled", "--cluster", site)
    job = last_job(run)
    until(lambda: (run / "metrics.jsonl").exists(), 400)
    sandbox.slurm.signal(job)
    until(lambda: sandbox.field(job, "Restarts") == "1" and len(processes_of(run)) == 4, 400)
    time.sleep(1)
    os.kill(processes_of(run)[2], signal.SIGKILL)
    until(lambda: sandbox.field(job, "Restarts") == "2" and len(processes_of(run)) == 4, 400)
    node = sandbox.field(job, "BatchHost")
    sandbox.crash(node)
    sandbox.boot(node)
    assert sandbox.wait(job, 1500) == "COMPLETED" and int(sandbox.field(job, "Restarts")) == 3
    assert logged_losses(run) == logged_losses(lm_here)


def test_a_frozen_rank_is_found_by_its_peers_and_the_run_resumes(sandbox, here, lm_here):
    run, site = (
        here / "runs" / "lm-frozen",
        write_site(here / "frozen.yaml", stages={"lm": {"nodes": 2, "tasks_per_node": 2}}),
    )
    landiff("submit", *LM, "run=runs/lm-frozen", "loop.hang_timeout_s=60", "--cluster", site)
    until(lambda: (run / "metrics.jsonl").exists(), 400)
    os.kill(processes_of(run)[1], signal.SIGSTOP)
    assert (
        sandbox.wait(last_job(run), 900) == "COMPLETED"
        and sandbox.field(last_job(run), "Restarts") == "1"
    )
    assert "HangError: no step for 60 s" in batch_log(run)
    # three waited for the fourth, which is woken to be ended and may still say where it was
    assert (
        len(list(run.glob("hangs.*/rank_*.txt"))) in (3, 4)
        and len(list(run.glob("hangs.*/gloo_rank_*.json"))) >= 3
    )
    assert logged_losses(run) == logged_losses(lm_here)


@pytest.mark.parametrize(
    ("stage", "words", "leave"),
    [
        ("lm", LM, 5 << 20),
        ("diffusion", [*DIFFUSION, "loop.steps=8", "loop.save_every=2"], 12 << 20),
    ],
)
def test_a_disk_that_fills_up_in_a_checkpoint_costs_no_earlier_one(
    sandbox, here, stage, words, leave
):
    """About half a checkpoint fits. With a free disk the run resumes, bit by bit as undisturbed."""
    run, straight = sandbox.disk / stage, here / "runs" / f"{stage}-straight"
    site = write_site(
        here / "disk.yaml",
        stages={stage: {"nodes": 2, "tasks_per_node": 2 if stage == "lm" else 1}},
    )
    submit = ["submit", *words, "loop.on_save_failure=fatal", "--cluster", site]
    landiff(*submit, f"run={run}")
    until(lambda: committed_steps(run / "checkpoints"), 600)
    with full(sandbox.disk, leave):
        assert sandbox.wait(last_job(run), 900) == "FAILED"
        assert sandbox.field(
            last_job(run), "Restarts"
        ) == "1" and "MiB were free on the disk" in last_error(run)
        newest = committed_steps(run / "checkpoints")[-1]
        assert latest_whole(run / "checkpoints").name == f"step_{newest:08d}"
        assert not list((run / "checkpoints").glob(".*"))  # what was half written is gone
    for folder in (run, straight):
        landiff(*submit, f"run={folder}")
        assert sandbox.wait(last_job(folder), 900) == "COMPLETED"
    assert logged_losses(run) == logged_losses(straight)
    shutil.rmtree(run)


def test_landiff_submit_inside_an_allocation_trains_over_its_nodes(sandbox, here, lm_here):
    site = write_site(here / "here.yaml", stages={"lm": {"nodes": 2, "tasks_per_node": 2}})
    words = [
        sys.executable,
        "-m",
        "landiff.launchers.cli",
        "submit",
        *LM,
        "run=runs/lm-allocated",
        "--cluster",
        site,
        "--here",
    ]
    environment = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    done = subprocess.run(
        ["salloc", "-Q", "-N", "2", "--ntasks-per-node=2", "--mem=2G", *words],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = here / "runs" / "lm-allocated"
    assert logged_losses(run) == logged_losses(lm_here) and "on node" in batch_log(run)


def test_fifty_tasks_with_random_kills_make_the_same_bytes(sandbox, here):
    landiff_process(
        here, "shards", "--config", "nano/shards", "samples_per_shard=1", "data=data-killed"
    )
    shutil.copytree(here / "data-killed", here / "data-straight")
    for name in ("killed", "straight"):
        (here / f"{name}.yaml").write_text(
            yaml.safe_dump(
                {
                    "data": f"data-{name}",
                    "zoo": "zoo",
                    "columns": {"latents": {"encoder": {"kind": "dct"}}},
                }
            )
        )
    landiff_process(here, "precompute", "--config", "straight.yaml")
    site = write_site(
        here / "array.yaml",
        stages={"precompute": {"array": 50, "array_limit": 6, "tasks_per_node": 1}},
        max_restarts=10,
    )
    landiff("submit", "precompute", "--config", "killed.yaml", "--cluster", site)
    run, draw, kills = here / "runs" / "precompute-latents", random.Random(3), 0
    finalize = last_job(here / "runs" / "precompute")
    while sandbox.state(finalize) == "PENDING":
        victims = processes_of(run)
        if victims and kills < 15:
            os.kill(draw.choice(victims), signal.SIGKILL)
            kills += 1
        time.sleep(draw.uniform(1, 4))
    assert sandbox.wait(finalize, 1500) == "COMPLETED" and kills == 15
    assert tree_hashes(here / "data-killed") == tree_hashes(here / "data-straight")
