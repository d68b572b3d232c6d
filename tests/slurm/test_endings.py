"""What happens when: every disturbance of docs/disturbances.md on a real SLURM, with a trainer that is quick."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers.submit import stop
from tests.slurm.conftest import Sandbox, until
from tests.slurm.jobs import CLUSTER, batch_log, light, losses, rank_log, start, undisturbed

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def runs(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Jobs that need no hand from outside run at the same time; each test looks at its own."""
    root = tmp_path_factory.mktemp("runs")
    jobs = {}
    for name, fault in {
        "straight": None, "crash": "1:25:exit", "killed": "3:15:kill", "config": "2:5:config", "always": "1:15:always",
    }.items():
        jobs[name] = start(sandbox, light(root / name, fault=fault))
    jobs["next"] = start(sandbox, light(root / "next", steps=5), after=(jobs["crash"],))
    jobs["lost"] = start(sandbox, light(root / "lost", steps=5), after=(jobs["config"],))
    jobs["lost too"] = start(sandbox, light(root / "lost too", steps=5), after=(jobs["lost"],))
    return root, jobs


def test_an_undisturbed_run_ends_well_on_two_nodes(sandbox, runs):
    root, jobs = runs
    assert sandbox.wait(jobs["straight"]) == "COMPLETED"
    assert losses(root / "straight") == undisturbed(40)
    logs = [rank_log(root / "straight", rank) for rank in range(4)]
    assert ["on node" in log and f"rank {rank} of 4" in log for rank, log in enumerate(logs)] == [True] * 4
    nodes = [log.split(" on ")[1].split()[0] for log in logs]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert all(f"master {nodes[0]}" in log for log in logs)


def test_ranks_run_the_snapshot(sandbox, runs):
    root, jobs = runs
    sandbox.wait(jobs["straight"])
    assert f"code {root / 'straight' / 'job' / 'code' / 'light.py'}" in rank_log(root / "straight")


@pytest.mark.parametrize("name", ["crash", "killed"])
def test_a_failed_rank_costs_one_restart_and_no_step(sandbox, runs, name):
    root, jobs = runs
    assert sandbox.wait(jobs[name]) == "COMPLETED"
    assert sandbox.field(jobs[name], "Restarts") == "1"
    assert losses(root / name) == undisturbed(40)
    assert batch_log(root / name).count("requeueing") == 1


def test_the_failing_rank_is_shown(sandbox, runs):
    root, jobs = runs
    sandbox.wait(jobs["crash"])
    assert "RuntimeError: exit: broken on purpose" in batch_log(root / "crash")


def test_a_config_error_is_not_tried_again_and_costs_what_depends_on_it(sandbox, runs):
    root, jobs = runs
    assert sandbox.wait(jobs["config"]) == "FAILED"
    assert sandbox.field(jobs["config"], "ExitCode") == "2:0"
    assert sandbox.field(jobs["config"], "Restarts") == "0"
    assert "data.manifest = gone" in (root / "config" / "job" / "given_up").read_text()
    assert [sandbox.wait(jobs[name]) for name in ("lost", "lost too")] == ["CANCELLED", "CANCELLED"]


def test_a_crash_that_comes_back_is_given_up(sandbox, runs):
    root, jobs = runs
    assert sandbox.wait(jobs["always"]) == "FAILED"
    assert sandbox.field(jobs["always"], "Restarts") == "1"
    assert "without a new checkpoint since the last restart (step_00000010)" in (root / "always" / "job" / "given_up").read_text()


def test_a_dependent_job_waits_for_the_restart(sandbox, runs):
    root, jobs = runs
    assert sandbox.wait(jobs["next"]) == "COMPLETED"
    assert (root / "next" / "metrics.jsonl").stat().st_mtime > (root / "crash" / "done").stat().st_mtime


def test_a_signal_saves_and_requeues(sandbox, tmp_path):
    run = tmp_path / "signal"
    job = start(sandbox, light(run))
    until(lambda: (run / "metrics.jsonl").exists())
    sandbox.slurm.signal(job)  # as --signal=B:USR1@... sends it
    assert sandbox.wait(job) == "COMPLETED" and sandbox.field(job, "Restarts") == "1"
    assert losses(run) == undisturbed(40)
    assert "and leaves" in rank_log(run) and "crashes=0" in (run / "job" / "state").read_text()


def test_landiff_stop_saves_and_ends(sandbox, tmp_path):
    run = tmp_path / "stopped"
    job = start(sandbox, light(run))
    until(lambda: (run / "metrics.jsonl").exists())
    assert "saves and ends" in stop(run, restart=False, slurm=sandbox.slurm)
    assert sandbox.wait(job) == "FAILED" and sandbox.field(job, "ExitCode") == "75:0" and sandbox.field(job, "Restarts") == "0"
    job = start(sandbox, light(run))  # submitting again goes on
    assert sandbox.wait(job) == "COMPLETED" and losses(run) == undisturbed(40)


def test_scancel_saves_and_stays_cancelled(sandbox, tmp_path):
    run = tmp_path / "cancelled"
    job = start(sandbox, light(run))
    until(lambda: (run / "metrics.jsonl").exists())
    sandbox.slurm.cancel(job)
    assert sandbox.wait(job) == "CANCELLED"
    until(lambda: "no requeue" in batch_log(run))
    assert not (run / "done").exists()


def test_scontrol_requeue_saves_and_goes_on(sandbox, tmp_path):
    run = tmp_path / "requeued"
    job = start(sandbox, light(run))
    until(lambda: (run / "metrics.jsonl").exists())
    sandbox.slurm.ask("scontrol", "requeue", job)
    assert sandbox.wait(job) == "COMPLETED" and sandbox.field(job, "Restarts") == "1"
    assert losses(run) == undisturbed(40)


def test_preemption_saves_and_goes_on(sandbox, tmp_path):
    run, other = tmp_path / "spot", tmp_path / "urgent"
    spot = CLUSTER.model_copy(update={"default": CLUSTER.default.model_copy(update={"partition": "spot", "nodes": 4}), "options": ("--exclusive",)})
    main = CLUSTER.model_copy(update={"default": CLUSTER.default.model_copy(update={"nodes": 4}), "options": ("--exclusive",)})
    job = start(sandbox, light(run, cluster=spot), spot)
    until(lambda: (run / "metrics.jsonl").exists())
    urgent = start(sandbox, light(other, steps=2, cluster=main), main)
    assert sandbox.wait(urgent) == "COMPLETED"
    assert sandbox.wait(job) == "COMPLETED" and sandbox.field(job, "Restarts") == "1"
    assert losses(run) == undisturbed(40)


def test_a_node_that_dies_costs_the_steps_since_the_checkpoint(sandbox, tmp_path):
    run = tmp_path / "node"
    job = start(sandbox, light(run, steps=30))
    until(lambda: (run / "checkpoints" / "step_00000010").exists())
    node = sandbox.field(job, "BatchHost")
    sandbox.crash(node)
    sandbox.boot(node)
    assert sandbox.wait(job) == "COMPLETED" and sandbox.field(job, "Restarts") == "1"
    assert losses(run) == undisturbed(30)


def test_a_controller_that_dies_is_waited_for(sandbox, tmp_path):
    run = tmp_path / "controller"
    job = start(sandbox, light(run, steps=20, fault="1:15:exit"))
    until(lambda: (run / "metrics.jsonl").exists())
    sandbox.crash("slurmctld")
    until(lambda: "ended with" in batch_log(run))  # wants to requeue, and nobody answers
    sandbox.boot("slurmctld")
    assert sandbox.wait(job) == "COMPLETED" and losses(run) == undisturbed(20)
