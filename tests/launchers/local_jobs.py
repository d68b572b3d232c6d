"""Commands and jobs that run on this machine, as `landiff submit --cluster local` plans them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from landiff.configs.ownership import this_process
from landiff.launchers.cli import main
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.launchers.slurm.script import BatchJob
from landiff.launchers.slurm.stage_jobs import SubmitPlan

HERE = Path(__file__).resolve().parent
STEPS = 60  # of the light trainer
ONE_RESTART = ClusterConfig(scheduler="local", launcher="torchrun", preflight=False, max_restarts=1)
THREE_RESTARTS = ONE_RESTART.model_copy(update={"max_restarts": 3})


def landiff(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a `landiff` command. Returns exit code, standard output and standard error."""
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def write_foreign_lock(path: Path) -> None:
    """Writes a lock that a process of another machine holds, and has just renewed."""
    owner = replace(this_process(), machine="elsewhere/boot/pid:[1]", token="theirs")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(owner)))


def one_process(
    run: Path, code: str, name: str = "task", after: tuple[str, ...] = ()
) -> SubmitPlan:
    """A job that runs a few lines of Python.

    Its module is timeit, which takes the lines as an argument.
    """
    job = BatchJob(
        name=name,
        run=run,
        workdir=run.parent,
        module="timeit",
        arguments=("-n", "1", "-r", "1", code),
        resources=ONE_RESTART.resources("shards"),
        trainer=False,
        python=sys.executable,
    )
    return SubmitPlan("shards", job, None, after)


def write_light_config(run: Path) -> Path:
    """Write the config of light_trainer.py beside the run folder."""
    path = run.with_name(f"{run.name}.json")
    path.write_text(json.dumps({"run": str(run), "steps": STEPS}))
    return path


def light_training(run: Path, config: Path) -> SubmitPlan:
    """The light trainer on two ranks.

    The snapshot of the code holds no tests, so its interpreter finds the trainer by PYTHONPATH.
    """
    python = run.with_name("python")
    python.write_text(f'#!/bin/sh\nPYTHONPATH=$PYTHONPATH:{HERE} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    resources = THREE_RESTARTS.resources("lm").model_copy(update={"tasks_per_node": 2})
    job = BatchJob(
        name="lm",
        run=run,
        workdir=run.parent,
        module="light_trainer",
        arguments=(str(config),),
        resources=resources,
        trainer=True,
        python=str(python),
    )
    return SubmitPlan("lm", job, None, steps=STEPS)
