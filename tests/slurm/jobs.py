"""Light jobs for the tests: the real script around a trainer without torch."""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.launchers.slurm.script import BatchJob
from landiff.launchers.slurm.stage_jobs import PlannedJob
from landiff.launchers.slurm.submit import prepare_run, submit_one
from tests.slurm.conftest import HERE, Sandbox


def cluster(
    *options: str, nodes: int = 2, partition: str | None = None, time: str = "10", **more: Any
) -> ClusterConfig:
    """Two ranks a node, no pre-flight, and whatever a test wants besides."""
    return ClusterConfig.model_validate(
        {
            "default": {
                "nodes": nodes,
                "tasks_per_node": 2,
                "memory": "1G",
                "time": time,
                "partition": partition,
            },
            "signal_margin_s": 30,
            "preflight": False,
            "options": options,
            **more,
        }
    )


CLUSTER = cluster("--exclude=node3,node4")  # those two die and are fought for


def light(
    run: Path,
    steps: int = 40,
    fault: str | None = None,
    site: ClusterConfig = CLUSTER,
    here: bool = False,
) -> PlannedJob:
    """A trainer of `steps` steps of 0.1 s, which may break on purpose."""
    job = BatchJob(
        name=run.name,
        run=run,
        workdir=run.parent,
        module="light",
        arguments=(str(run), str(steps), *([fault] if fault else [])),
        resources=site.resources("lm"),
        trainer=True,
        python=sys.executable,
        here=here,
    )
    return PlannedJob("lm", job, None, steps=steps)


def ready(plan: PlannedJob, site: ClusterConfig = CLUSTER) -> Path:
    script = prepare_run(plan, site)
    for name in ("light.py", "light_task.py"):
        shutil.copy(HERE / name, plan.job.folder / "code" / name)
    return script


def start(
    sandbox: Sandbox, plan: PlannedJob, site: ClusterConfig = CLUSTER, after: tuple[str, ...] = ()
) -> str:
    """Queue it; returns the id of its last job."""
    return submit_one(plan, site, sandbox.slurm, ready(plan, site), after)[-1]


def losses(run: Path) -> dict[int, int]:
    """The last logged loss of every step: what a reader of the run sees."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["train/loss"] for line in map(json.loads, lines)}


def undisturbed(steps: int) -> dict[int, int]:
    """The losses of a run that nothing happened to."""
    found, loss = {}, 1
    for step in range(1, steps + 1):
        loss = zlib.crc32(f"{loss}:{step}".encode())
        found[step] = loss
    return found


def batch_log(run: Path) -> str:
    return (run / "job" / "log" / "batch.log").read_text()


def rank_log(run: Path, rank: int = 0) -> str:
    path = run / "job" / "log" / f"rank_{rank:04d}.log"
    return path.read_text() if path.exists() else ""
