"""The disturbances of docs/disturbances.md on a real SLURM, with a quick trainer.

All jobs run side by side, each with its own disturbance. The tests check how they ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from landiff.configs import ConfigError
from landiff.launchers.run.records import read_record
from landiff.launchers.run.status import statuses
from landiff.launchers.slurm.queueing import queue
from tests.slurm.conftest import Sandbox, until
from tests.slurm.jobs import (
    CLUSTER,
    batch_log,
    cluster,
    light,
    losses,
    rank_log,
    start,
    undisturbed,
)
from tests.slurm.scenarios import FIRST, LONG, LONGER, NOTE, SCENARIOS

pytestmark = pytest.mark.slurm


@dataclass
class Runs:
    """Running scenarios, by name."""

    sandbox: Sandbox
    root: Path
    futures: dict[str, Future[str]]

    def ended(self, name: str) -> tuple[Path, str, str]:
        """(run folder, job id, final state)."""
        job = self.futures[name].result(timeout=300)
        return self.root / name, job, self.sandbox.wait(job)

    def restarts(self, job: str) -> int:
        return int(self.sandbox.field(job, "Restarts"))


@pytest.fixture(scope="module")
def runs(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield Runs(
            sandbox,
            root,
            {
                name: pool.submit(scenario, sandbox, root / name)
                for name, scenario in SCENARIOS.items()
            },
        )


def test_an_undisturbed_run_ends_well_on_two_nodes(runs):
    run, _, state = runs.ended("straight")
    assert state == "COMPLETED" and losses(run) == undisturbed(40)
    logs = [rank_log(run, rank) for rank in range(4)]
    assert ["on node" in log and f"rank {rank} of 4" in log for rank, log in enumerate(logs)] == [
        True
    ] * 4
    nodes = [log.split(" on ")[1].split()[0] for log in logs]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert all(f"master {nodes[0]}" in log for log in logs)


def test_ranks_run_the_snapshot(runs):
    run, _, _ = runs.ended("straight")
    assert f"code {run / 'job' / 'code' / 'light.py'}" in rank_log(run)


@pytest.mark.parametrize(("name", "steps"), [("crash", 20), ("killed", 20)])
def test_a_failed_rank_costs_one_restart_and_no_step(runs, name, steps):
    run, job, state = runs.ended(name)
    assert state == "COMPLETED" and runs.restarts(job) == 1
    assert losses(run) == undisturbed(steps)
    assert (
        batch_log(run).count("requeueing") == 1
        and "crashes=1" in (run / "job" / "state").read_text()
    )


def test_the_failing_rank_is_shown_first(runs):
    run, _, _ = runs.ended("crash")
    log = batch_log(run)
    assert "first to fail: rank_0001: RuntimeError: exit: broken on purpose" in log and log.index(
        "rank_0001.txt"
    ) < log.index("requeueing")


def test_a_rank_that_is_killed_is_named_though_it_could_not_say_so(runs):
    run, _, _ = runs.ended("killed")
    assert "first to fail: rank_0003: srun: error: node2: task 3: Killed" in batch_log(run)


def test_a_dependent_job_waits_for_the_restart(runs):
    run, _, _ = runs.ended("crash")
    assert runs.sandbox.wait((run / "dependents").read_text()) == "COMPLETED"
    assert (run.parent / "next" / "metrics.jsonl").stat().st_mtime > (run / "done").stat().st_mtime


def test_a_config_error_is_not_tried_again_and_costs_what_depends_on_it(runs):
    run, job, state = runs.ended("config")
    assert state == "FAILED" and runs.restarts(job) == 0
    assert runs.sandbox.field(job, "ExitCode") == "2:0"
    assert "data.manifest = gone" in (run / "job" / "given_up").read_text()
    assert [runs.sandbox.wait(other) for other in (run / "dependents").read_text().split()] == [
        "CANCELLED",
        "CANCELLED",
    ]


def test_a_crash_that_comes_back_is_given_up(runs):
    run, job, state = runs.ended("always")
    assert state == "FAILED" and runs.restarts(job) == 1
    assert (
        "without a new checkpoint since the last crash (step_00000010)"
        in (run / "job" / "given_up").read_text()
    )


def test_a_hanging_rank_is_found_shown_and_restarted(runs):
    run, job, state = runs.ended("hang")
    assert state == "COMPLETED" and runs.restarts(job) == 1 and losses(run) == undisturbed(20)
    log = batch_log(run)
    assert "HangError: no step for 8 s after step 14" in log and "light.py" in log
    (kept,) = run.glob("hangs.*/rank_0000.txt")
    assert (
        "break_down" in kept.read_text() and len(list(run.glob("hangs.*/rank_*.txt"))) == 4
    )  # all ranks waited


@pytest.mark.parametrize("name", ["signalled", "requeued", "preempted", "restarted"])
def test_a_stop_request_saves_and_resumes_at_the_next_step(runs, name):
    run, job, state = runs.ended(name)
    assert state == "COMPLETED" and runs.restarts(job) == 1
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = int((run / "done").read_text())
    assert last == (LONGER if name == "preempted" else LONG)
    assert steps == list(range(1, last + 1)), "no step was done twice"
    assert losses(run) == undisturbed(last)
    assert "and leaves" in rank_log(run) and "crashes=0" in (run / "job" / "state").read_text()


def test_a_signal_before_the_ranks_start_is_not_lost(runs):
    run, job, state = runs.ended("early")
    assert state == "COMPLETED" and runs.restarts(job) == 1 and losses(run) == undisturbed(20)
    assert "ended with 75 after signal USR1" in batch_log(run)


def test_landiff_stop_saves_and_ends_and_submitting_again_resumes(runs):
    run, _, state = runs.ended("stopped")
    assert json.loads((run / FIRST).read_text()) == ["FAILED", "75:0", "0", False]
    assert state == "COMPLETED" and losses(run) == undisturbed(LONG)


def test_scancel_saves_and_stays_cancelled(runs):
    run, job, state = runs.ended("cancelled")
    assert state == "CANCELLED" and runs.restarts(job) == 0
    until(lambda: "no requeue" in batch_log(run))
    assert not (run / "done").exists() and "saved step" in rank_log(run)


def test_a_node_that_dies_costs_the_steps_since_the_checkpoint(runs):
    run, job, state = runs.ended("node")
    assert state == "COMPLETED" and runs.restarts(job) == 1
    assert losses(run) == undisturbed(LONG)


def test_a_full_disk_costs_no_checkpoint_and_is_given_up(runs):
    run, _, state = runs.ended("full")
    assert json.loads((run / FIRST).read_text()) == [
        "FAILED",
        "1",
        ["step_00000010"],
    ] and "No space left on device" in batch_log(run)
    assert state == "COMPLETED" and losses(run) == undisturbed(40)


def test_a_disk_without_a_free_byte_ends_the_run_at_once_and_costs_no_checkpoint(runs):
    run, _, state = runs.ended("brimful")
    first, restarts, shown, saved = json.loads((run / FIRST).read_text())
    assert (first, restarts, shown) == (
        "FAILED",
        "0",
        "failed",
    )  # who cannot count must not start again for ever
    assert saved and all(name == f"step_{step:08d}" for name, step in saved.items())
    assert state == "COMPLETED" and losses(runs.sandbox.disk / run.name) == undisturbed(LONG)


def test_a_container_holds_the_ranks_and_hides_nothing_of_them(runs):
    run, job, state = runs.ended("container")
    assert state == "COMPLETED" and runs.restarts(job) == 1 and losses(run) == undisturbed(20)
    assert all(
        f"rank {rank} of 4 on node" in rank_log(run, rank)
        and f"image of container, note {NOTE}" in rank_log(run, rank)
        for rank in range(4)
    )
    assert "first to fail: rank_0001: RuntimeError: exit: broken on purpose" in batch_log(run)
    assert len(list((run / "job" / "preflight").glob("node*.ok"))) == 2
    run, job, state = runs.ended("container config")
    assert (
        state == "FAILED"
        and runs.sandbox.field(job, "ExitCode") == "2:0"
        and runs.restarts(job) == 0
    )


def test_a_failing_preflight_names_the_node_and_starts_no_rank(runs):
    run, job, state = runs.ended("preflight")
    assert state == "FAILED" and runs.restarts(job) == 0
    assert "on node2; leave it out with  exclude: node2" in (run / "job" / "given_up").read_text()
    assert "GPU 1 (H100) has 7 uncorrected memory errors" in batch_log(run) and rank_log(run) == ""


def test_torchrun_on_every_node_does_the_same(runs):
    run, job, state = runs.ended("torchrun")
    assert state == "COMPLETED" and runs.restarts(job) == 1 and losses(run) == undisturbed(20)
    assert all(f"rank {rank} of 4" in rank_log(run, rank) for rank in range(4))
    assert "RuntimeError: exit: broken on purpose" in batch_log(run)


def test_a_chain_of_jobs_takes_the_place_of_requeueing(runs):
    run, _, state = runs.ended("chain")
    states = [runs.sandbox.wait(job) for job in (run / "job" / "chain").read_text().split()]
    assert states == ["FAILED", "COMPLETED", "COMPLETED"] and state == "COMPLETED"
    assert losses(run) == undisturbed(40) and "already done" in batch_log(run)


def test_status_knows_all_endings(runs):
    names = {
        "straight": "done",
        "config": "failed",
        "always": "failed",
        "cancelled": "cancelled",
        "killed": "done",
    }
    folders = [runs.ended(name)[0] for name in names]
    found, away = statuses(folders, runs.sandbox.slurm)
    assert away == "" and {Path(s.run).name: s.state for s in found} == names
    by_name = {Path(s.run).name: s for s in found}
    assert (
        by_name["straight"].step == 40
        and by_name["straight"].checkpoint == 40
        and by_name["killed"].restarts == 1
    )
    assert "data.manifest = gone" in by_name["config"].error


def test_a_script_can_be_submitted_again_by_hand(runs):
    run, job, state = runs.ended("by hand")
    assert state == "COMPLETED" and losses(run) == undisturbed(20)
    assert read_record(run)["job_ids"] == [json.loads((run / FIRST).read_text()), job]
    (status,), _ = statuses([run], runs.sandbox.slurm)
    assert (status.state, status.error) == ("done", "")


def test_tasks_of_an_array_restart_one_by_one(runs):
    run, _, _ = runs.ended("array")
    until(
        lambda: (
            sum((run / f"done.{task}").exists() for task in range(8)) == 7
            and (run / "job" / "given_up.5").exists()
        )
    )
    assert (
        not (run / "done.5").exists()
        and "crashed 2 times" in (run / "job" / "given_up.5").read_text()
    )
    starts = {
        task: (run / "job" / "log" / f"batch_{task}.log").read_text().count(" restart ")
        for task in range(8)
    }
    assert starts == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 2, 6: 1, 7: 1}


def test_an_allocation_runs_the_same_job_and_restarts_it_in_place(runs):
    said = runs.futures["allocation"].result(timeout=300)
    assert said.startswith("exit code 0\n") and said.count(" restart ") == 2, said
    assert losses(runs.root / "allocation") == undisturbed(20)


def test_submit_refuses_what_would_never_run(sandbox, tmp_path):
    site = cluster(nodes=9)
    with pytest.raises(ConfigError, match="change the cluster file"):
        queue([light(tmp_path / "large", site=site)], site, sandbox.slurm)
    assert read_record(tmp_path / "large")["job_ids"] == []


def test_a_run_that_is_queued_is_not_queued_twice(sandbox, tmp_path):
    plan = light(tmp_path / "once")
    job = start(sandbox, plan)
    with pytest.raises(ConfigError, match=f"has job {job} in the queue already"):
        queue([plan], CLUSTER, sandbox.slurm)
    sandbox.slurm.cancel(job)
    sandbox.wait(job)


def test_what_would_be_left_behind_is_seen(sandbox, tmp_path):
    code = (
        f"import fcntl, socket, sys; file = open({str(tmp_path / 'lock')!r}, 'w'); "
        "fcntl.flock(file, fcntl.LOCK_EX); server = socket.create_server(('', 4321)); "
        "sys.stdin.read()"
    )
    words = [
        "nsenter",
        "--target",
        str(sandbox.nodes()["node4"]),
        "--pid",
        "--mount",
        "--net",
        sys.executable,
        "-c",
        code,
    ]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as stray:
        until(lambda: any("node4: port 4321" in text for text in sandbox.left_behind()), 30)
        found = sandbox.left_behind()
        assert any(text.startswith("node4: process") and "4321" in text for text in found) and any(
            text.startswith("node4: lock") for text in found
        )
        stray.stdin.close()


def test_no_process_port_or_lock_is_left_on_any_node(runs):
    for name in SCENARIOS.keys() - {"allocation"}:
        runs.ended(name)
    until(lambda: not runs.sandbox.left_behind(), 60, lambda: str(runs.sandbox.left_behind()))


@pytest.mark.long
def test_a_time_limit_saves_and_resumes(sandbox, tmp_path):
    """A minute is the shortest limit. SLURM checks for signals every 30 s and is rather early."""
    site = cluster("--exclude=node3,node4", time="1")
    run = tmp_path / "limit"
    job = start(sandbox, light(run, 600, site=site), site)
    assert sandbox.wait(job, 400) == "COMPLETED" and int(sandbox.field(job, "Restarts")) >= 1
    assert "signal USR1: asking for a stop" in batch_log(run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 601))  # not one was done twice


def test_a_controller_that_dies_is_waited_for(sandbox, tmp_path):
    run = tmp_path / "controller"
    job = start(sandbox, light(run, steps=20, fault="1:15:exit"), CLUSTER)
    until(lambda: (run / "metrics.jsonl").exists())
    sandbox.crash("slurmctld")
    until(lambda: "ended with" in batch_log(run))  # wants to requeue, and nobody answers
    sandbox.boot("slurmctld")
    assert sandbox.wait(job) == "COMPLETED" and losses(run) == undisturbed(20)
