"""`landiff status` and `landiff logs`: what they read from run folders and from SLURM."""

from __future__ import annotations

import json
import threading

import pytest

from landiff.configs.files import write_text
from landiff.launchers.run.logs import growth
from landiff.launchers.run.records import read_attempt_states, read_last_errors, read_record
from landiff.launchers.run.status import format_status_table, last_error, statuses
from landiff.launchers.slurm.client import Answer, Slurm
from landiff.launchers.slurm.prepare import prepare_run
from landiff.launchers.slurm.run_here import run_here
from landiff.training.observe.events import EventLog
from tests.launchers.local_jobs import ONE_RESTART, landiff, one_process


def test_a_damaged_job_record_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs" / "lm" / "job" / "job.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "lm", "job_ids": [')
    code, _, err = landiff(capsys, "status", "runs/lm")
    assert code == 2 and "job.json is not valid JSON" in err and "submit the run again" in err


def test_status_reads_run_folders_with_slurm_away(tmp_path):
    plan = one_process(tmp_path / "task", "pass")
    prepare_run(plan, ONE_RESTART)
    record = read_record(plan.job.run) | {"job_ids": ["7"], "steps": 100}
    (plan.job.folder / "job.json").write_text(json.dumps(record))
    (plan.job.folder / "state").write_text("crashes=1 stalls=0 from= phase=running\n")
    lines = [{"step": step, "time": 1000.0 + step, "train/loss": 2.0} for step in range(1, 51)]
    (plan.job.run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 51, "ti'
    )
    away = Slurm(
        lambda words: Answer(1, "", "Unable to contact slurm controller"), retry_waits_s=()
    )
    (status,), why = statuses([plan.job.run], away)
    assert (
        "Unable to contact" in why
        and status.state == "running, when last seen"
        and (status.step, status.steps, status.loss) == (50, 100, 2.0)
    )
    running = Slurm(lambda words: Answer(0, "7|RUNNING|None|node1|1:00\n", ""))
    (status,), _ = statuses([plan.job.run], running)
    assert (
        status.state == "running"
        and status.steps_per_s == pytest.approx(1.0)
        and status.seconds_left == pytest.approx(50.0)
    )


def test_logs_show_the_failing_rank_first(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "job" / "log").mkdir(parents=True)
    (run / "errors").mkdir()
    (run / "errors" / "rank_0003.txt").write_text(
        "time: 2026-01-01T00:00:02\n\nRuntimeError: the cause\n"
    )
    (run / "errors" / "rank_0001.txt").write_text(
        "time: 2026-01-01T00:00:03\n\nConnectionError: a consequence\n"
    )
    (run / "job" / "log" / "rank_0003.log").write_text("the last words of rank 3\n")
    (run / "job" / "log" / "batch.log").write_text("ended with 143\n")
    code, out, _ = landiff(capsys, "logs", str(run))
    assert (
        code == 0
        and out.index("the cause")
        < out.index("the last words of rank 3")
        < out.index("ended with 143")
        and "a consequence" not in out
    )
    code, out, _ = landiff(capsys, "logs", str(run), "--rank", "3")
    assert code == 0 and "the last words" in out and "the cause" not in out
    (run / "job" / "log" / "rank_0003.log").write_text("first\nsecond\nthird\n")
    code, out, _ = landiff(capsys, "logs", str(run), "--rank", "3", "--lines", "2")
    assert code == 0 and "first" not in out and "second\nthird" in out
    code, _, err = landiff(capsys, "logs", str(run), "--rank", "9")
    assert code == 2 and "rank_0003.log" in err


def test_a_followed_log_shows_what_is_appended(tmp_path):
    path = tmp_path / "batch.log"
    path.write_text("old\n")
    lines = growth(path, every_s=0.01)
    writer = threading.Timer(0.2, lambda: path.open("a").write("new\n"))
    writer.start()
    assert next(lines) == "new\n"


def test_status_for_scripts_is_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here([one_process(tmp_path / "runs" / "task", "pass")], ONE_RESTART) == 0
    capsys.readouterr()
    code, out, _ = landiff(capsys, "status", "--all", "--json")
    document = json.loads(out)
    assert code == 0 and [
        (run["run"], run["state"], run["restarts"]) for run in document["runs"]
    ] == [("runs/task", "done", 0)]


def test_restarts_are_read_from_the_state_of_the_job(tmp_path):
    folder = tmp_path / "run" / "job"
    folder.mkdir(parents=True)
    (folder / "state.0").write_text(
        "crashes=1 crashed_at= restarted_at= stalls=0 restarts=2 phase=ended\n"
    )
    (folder / "state.1").write_text("crashes=3 crashed_at=- stalls=0 phase=running\n")
    first, second = read_attempt_states(tmp_path / "run")
    assert (first.restarts, first.running) == (2, False)
    assert (second.restarts, second.running) == (3, True)  # written by an earlier version
    (status,), _ = statuses([tmp_path / "run"], Slurm(lambda words: pytest.fail("SLURM was asked")))
    assert status.restarts == 5


def test_errors_of_a_job_are_read_with_the_rank_that_failed(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "last_error.1").write_text("")  # of a full disk
    (folder / "last_error.2").write_text("rank_0002: RuntimeError: broken\n")
    (folder / "last_error.3").write_text("srun: error: node1: launch failed\n")
    (folder / "given_up.2").write_text("crashed 2 times, max_restarts = 1\n")
    found = [(error.rank, error.text) for error in read_last_errors(tmp_path)]
    assert found == [
        (2, "rank_0002: RuntimeError: broken"),
        (None, "srun: error: node1: launch failed"),
    ]
    assert last_error(tmp_path) == (
        "rank_0002: RuntimeError: broken; given up: crashed 2 times, max_restarts = 1"
    )


def test_status_counts_skips_and_rollbacks_and_names_alarms(tmp_path):
    log = EventLog(tmp_path / "runs" / "x", rank=0)
    write_text(tmp_path / "runs" / "x" / "config.yaml", "run: x\n")
    for step in (3, 4):
        log.add(step, {"kind": "skip", "cause": "not finite", "loss": "nan"})
    log.add(5, {"kind": "rollback", "cause": "spike", "to": 2})
    log.add(6, {"kind": "spike", "cause": "spike"})
    for name in ("code usage", "dead codes"):
        log.add(7, {"kind": "alarm", "name": name})
    log.add(9, {"kind": "alarm over", "name": "code usage"})
    (status,), _ = statuses([tmp_path / "runs" / "x"], Slurm(retry_waits_s=()))
    assert str(status.events) == "3 skipped, 1 rollback, 2 spikes, alarm: dead codes"
    assert "1 rollback, 2 spikes, alarm: dead codes" in format_status_table([status])
