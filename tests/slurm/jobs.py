"""Light jobs for the tests: the real script around a trainer without torch."""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.launchers.slurm.prepare import prepare_run
from landiff.launchers.slurm.queueing import submit_one
from landiff.launchers.slurm.script import BatchJob
from landiff.launchers.slurm.stage_jobs import SubmitPlan
from tests.slurm.conftest import HERE, Sandbox


def cluster(
    *options: str, nodes: int = 2, partition: str | None = None, time: str = "10", **more: Any
) -> ClusterConfig:
    """Two ranks a node, no pre-flight, and the options of a test."""
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


CLUSTER = cluster("--exclude=node3,node4")  # tests crash and block those two


def light(
    run: Path,
    steps: int = 40,
    fault: str | None = None,
    site: ClusterConfig = CLUSTER,
    here: bool = False,
) -> SubmitPlan:
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
    return SubmitPlan("lm", job, None, steps=steps)


def ready(plan: SubmitPlan, site: ClusterConfig = CLUSTER) -> Path:
    script = prepare_run(plan, site)
    for name in ("light.py", "light_task.py"):
        shutil.copy(HERE / name, plan.job.folder / "code" / name)
    return script


def start(
    sandbox: Sandbox, plan: SubmitPlan, site: ClusterConfig = CLUSTER, after: tuple[str, ...] = ()
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


def processes_of(run: Path) -> list[int]:
    """Ranks of a run, on whatever node: a node's processes are seen from outside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"landiff.launchers.local.rank" in words
            and str(run).encode() in words
            and b"srun" not in words[0]
            and b"bash" not in words[0]
        ):
            found.append(int(path.parent.name))
    return found
