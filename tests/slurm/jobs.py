"""Light jobs for the tests: the real script around a trainer without torch."""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path

from launchers.cluster_config import ClusterConfig
from launchers.slurm_script import Job
from launchers.stage_jobs import Planned
from launchers.submit import prepare, submit_one
from tests.slurm.conftest import HERE, Sandbox

CLUSTER = ClusterConfig.model_validate({
    "default": {"nodes": 2, "tasks_per_node": 2, "memory": "1G", "time": "10"}, "signal_margin_s": 30, "preflight": False,
})


def light(run: Path, steps: int = 40, fault: str | None = None, cluster: ClusterConfig = CLUSTER, here: bool = False) -> Planned:
    """A trainer of `steps` steps of 0.1 s, which may break on purpose."""
    job = Job(name=run.name, run=run, workdir=run.parent, module="light", arguments=(str(run), str(steps), *([fault] if fault else [])),
              resources=cluster.resources("lm"), trainer=True, python=sys.executable, here=here)
    return Planned("lm", job, None, steps=steps)


def ready(plan: Planned, cluster: ClusterConfig = CLUSTER) -> Path:
    script = prepare(plan, cluster)
    shutil.copy(HERE / "light.py", plan.job.folder / "code" / "light.py")
    return script


def start(sandbox: Sandbox, plan: Planned, cluster: ClusterConfig = CLUSTER, after: tuple[str, ...] = ()) -> str:
    """Queue it; returns the id of its last job."""
    return submit_one(plan, cluster, sandbox.slurm, ready(plan, cluster), after)[-1]


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
