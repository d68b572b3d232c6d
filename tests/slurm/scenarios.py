"""Jobs with a quick trainer, each with its disturbance.

A scenario takes the sandbox and a run folder and returns the id of its last job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from landiff.launchers.run.status import statuses
from landiff.launchers.run.stop import stop
from landiff.launchers.slurm.script import BatchJob
from landiff.launchers.slurm.stage_jobs import SubmitPlan
from tests.slurm.conftest import HERE, Sandbox, full, until
from tests.slurm.jobs import cluster, light, ready, start

Scenario = Callable[[Sandbox, Path], str]
NODE_3 = cluster("--nodelist=node3", nodes=1)
NODE_4 = cluster("--nodelist=node4", "--exclusive", nodes=1)
NOTE = """two words, $HOME and 'a quote'"""
FIRST = "first.json"  # what a scenario of two submissions saw of the first
LONG = 150  # steps of 0.1 s: time enough for a disturbance
LONGER = 400  # the same, for one that SLURM itself decides on
SPOT = cluster("--nodelist=node4", "--exclusive", nodes=1, partition="spot")


def alone(steps: int = 40, fault: str | None = None) -> Scenario:
    return lambda sandbox, run: start(sandbox, light(run, steps, fault))


def disturbed(hand: Callable[[Sandbox, str, Path], object], steps: int = LONG) -> Scenario:
    """A job that something is done to once it has taken steps."""

    def scenario(sandbox: Sandbox, run: Path) -> str:
        job = start(sandbox, light(run, steps))
        until(lambda: (run / "metrics.jsonl").exists())
        hand(sandbox, job, run)
        return job

    return scenario


def config_error(sandbox: Sandbox, run: Path) -> str:
    job = start(sandbox, light(run, 40, "2:5:config"))
    lost = start(sandbox, light(run.parent / "lost", 5), after=(job,))
    last = start(sandbox, light(run.parent / "lost too", 5), after=(lost,))
    (run / "dependents").write_text(f"{lost} {last}")
    return job


def crash_before_dependent(sandbox: Sandbox, run: Path) -> str:
    job = start(sandbox, light(run, 20, "1:5:exit"))
    (run / "dependents").write_text(start(sandbox, light(run.parent / "next", 5), after=(job,)))
    return job


def preemption(sandbox: Sandbox, run: Path) -> str:
    job = start(sandbox, light(run, LONGER, site=SPOT), SPOT)
    until(lambda: (run / "metrics.jsonl").exists())
    assert (
        sandbox.wait(start(sandbox, light(run.parent / "urgent", 2, site=NODE_4), NODE_4))
        == "COMPLETED"
    )
    return job


def node_crash(sandbox: Sandbox, run: Path) -> str:
    job = start(sandbox, light(run, LONG, site=NODE_3), NODE_3)
    until(lambda: (run / "checkpoints" / "step_00000010").exists())
    sandbox.crash("node3")
    sandbox.boot("node3")
    return job


def stop_and_submit_again(sandbox: Sandbox, run: Path) -> str:
    job = start(sandbox, light(run, LONG))
    until(lambda: (run / "metrics.jsonl").exists())
    stop(run, restart=False, slurm=sandbox.slurm)
    states = [
        sandbox.wait(job),
        sandbox.field(job, "ExitCode"),
        sandbox.field(job, "Restarts"),
        (run / "done").exists(),
    ]
    (run / FIRST).write_text(json.dumps(states))
    return start(sandbox, light(run, LONG))


def early_signal(sandbox: Sandbox, run: Path) -> str:
    """It comes while modules load, before there is a rank."""
    loading = run.parent / "loading"
    site = cluster(
        "--exclude=node3,node4",
        setup=[
            f"touch {loading}",
            # Loading lasts until the signal is there.
            'until [ -n "$asked${SLURM_RESTART_COUNT:-}" ]; do sleep 0.1; done',
        ],
    )
    job = start(sandbox, light(run, 20, site=site), site)
    until(loading.exists)
    sandbox.slurm.signal(job)
    return job


def chain(sandbox: Sandbox, run: Path) -> str:
    site = cluster("--exclude=node3,node4", restart="chain", chain_length=3)
    return start(sandbox, light(run, 40, "1:25:exit", site=site), site)


def array_of_tasks(sandbox: Sandbox, run: Path) -> str:
    """An array of tasks that are no trainers; number 3 is killed once, number 5 gives up."""
    site = cluster("--exclude=node3,node4", max_restarts=1)
    resources = site.resources("precompute").model_copy(update={"array": 8, "nodes": 1})
    job = BatchJob(
        name="array",
        run=run,
        workdir=run.parent,
        module="light_task",
        arguments=(str(run),),
        resources=resources,
        trainer=False,
        array=True,
        python=light(run).job.python,
    )
    return start(sandbox, SubmitPlan("precompute", job, None), site)


def full_disk(sandbox: Sandbox, run: Path) -> str:
    (run / "checkpoints" / ".step_00000020").mkdir(parents=True)
    (run / "checkpoints" / ".step_00000020" / "state.json").symlink_to("/dev/full")
    job = start(sandbox, light(run))
    saw = [
        sandbox.wait(job),
        sandbox.field(job, "Restarts"),
        [path.name for path in (run / "checkpoints").glob("step_*")],
    ]
    (run / FIRST).write_text(json.dumps(saw))
    (run / "checkpoints" / ".step_00000020" / "state.json").unlink()  # room again: submit again
    return start(sandbox, light(run))


def brimful_disk(sandbox: Sandbox, run: Path) -> str:
    """Not a byte is free: neither for a checkpoint nor for what the job script has to remember."""
    small = sandbox.disk / run.name
    job = start(sandbox, light(small, LONG))
    until(lambda: (small / "checkpoints" / "step_00000010").exists())
    with full(sandbox.disk):
        state = sandbox.wait(job)
    (status,), _ = statuses([small], sandbox.slurm)
    saved = {
        path.name: json.loads((path / "state.json").read_text())[0]
        for path in (small / "checkpoints").glob("step_*")
    }
    run.mkdir()
    (run / FIRST).write_text(
        json.dumps([state, sandbox.field(job, "Restarts"), status.state, saved])
    )
    return start(sandbox, light(small, LONG))


def by_hand(sandbox: Sandbox, run: Path) -> str:
    """After a config error that was fixed."""
    first = start(sandbox, light(run, 20, "1:5:config"))
    sandbox.wait(first)
    (run / FIRST).write_text(json.dumps(first))
    return sandbox.slurm.submit(run / "job" / "job.sbatch")


def allocation(sandbox: Sandbox, run: Path) -> str:
    """The script inside salloc; returns no job but what it said."""
    site = cluster()
    script = ready(light(run, 20, "1:15:exit", site=site, here=True), site)
    words = [
        "salloc",
        "-Q",
        "-N",
        "2",
        "--exclude=node3,node4",
        "--ntasks-per-node=2",
        "--mem=1G",
        "bash",
        str(script),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    return f"exit code {done.returncode}\n{done.stdout}{done.stderr}"


def in_a_container(fault: str) -> Scenario:
    """Ranks see nothing but what is mounted; a folder is the image."""

    def scenario(sandbox: Sandbox, run: Path) -> str:
        image = run / "image"
        image.mkdir(parents=True)
        (image / "image.txt").write_text(f"of {run.name}")
        mounts = [
            "/usr",
            "/bin",
            "/lib",
            "/lib64",
            "/etc",
            sys.prefix,
            f"{sys.base_prefix}:{sys.base_prefix}",
        ]
        site = cluster(
            "--exclude=node3,node4",
            preflight=True,
            container={"runtime": "apptainer", "image": str(image), "mounts": mounts},
            env={"NOTE": NOTE, "PATH": f"{os.environ['PATH']}:{HERE}"},
        )
        return start(sandbox, light(run, 20, fault, site=site), site)

    return scenario


def failing_preflight(sandbox: Sandbox, run: Path) -> str:
    """nvidia-smi finds two good GPUs on one node, and a broken one on the other."""
    tools = run / "tools"
    tools.mkdir(parents=True)
    (tools / "nvidia-smi").write_text(
        '#!/bin/sh\n[ "$(hostname)" = node2 ] && bad=7 || bad=0\n'
        'echo "0, H100, 81559, 1, 0"\necho "1, H100, 81559, 1, $bad"\n'
    )
    (tools / "nvidia-smi").chmod(0o755)
    site = cluster(
        "--exclude=node3,node4", preflight=True, env={"PATH": f"{tools}:{os.environ['PATH']}"}
    )
    site = site.model_copy(
        update={
            "default": site.default.model_copy(update={"gpus_per_node": 1, "tasks_per_node": None})
        }
    )
    return start(sandbox, light(run, 5, site=site), site)


def through_torchrun(sandbox: Sandbox, run: Path) -> str:
    site = cluster("--exclude=node3,node4", launcher="torchrun")
    return start(sandbox, light(run, 20, "3:15:exit", site=site), site)


SCENARIOS: dict[str, Scenario] = {
    "straight": alone(),
    "crash": crash_before_dependent,
    "killed": alone(20, "3:15:kill"),
    "config": config_error,
    "always": alone(40, "1:15:always"),
    "hang": alone(20, "0:15:hang"),
    "node": node_crash,
    "preempted": preemption,
    "signalled": disturbed(lambda sandbox, job, run: sandbox.slurm.signal(job)),
    "stopped": stop_and_submit_again,
    "early": early_signal,
    "restarted": disturbed(lambda sandbox, job, run: stop(run, restart=True, slurm=sandbox.slurm)),
    "cancelled": disturbed(lambda sandbox, job, run: sandbox.slurm.cancel(job)),
    "requeued": disturbed(lambda sandbox, job, run: sandbox.slurm.ask("scontrol", "requeue", job)),
    "full": full_disk,
    "brimful": brimful_disk,
    "container": in_a_container("1:15:exit"),
    "container config": in_a_container("2:5:config"),
    "preflight": failing_preflight,
    "torchrun": through_torchrun,
    "chain": chain,
    "array": array_of_tasks,
    "by hand": by_hand,
    "allocation": allocation,
}
