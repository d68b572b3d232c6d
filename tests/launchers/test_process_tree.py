"""Each process of a training is killed in turn.

Nothing survives, what is reported is true, and starting again resumes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from landiff.configs.processes import is_running
from landiff.launchers.local.children import environment
from landiff.launchers.run.logs import show_logs
from landiff.launchers.run.status import RunStatus, statuses
from landiff.launchers.run.stop import stop
from landiff.launchers.slurm.client import Slurm
from tests.launchers.local_jobs import HERE, STEPS, write_light_config

SAVE_EVERY = 5  # steps of the light trainer
TORCHRUN = "landiff.launchers.local.torchrun"
RANK = "landiff.launchers.local.rank"
# What `landiff train` does, with a light trainer in the place of a real one.
TRAIN = """
import sys
from pathlib import Path
from types import SimpleNamespace
from landiff.launchers.local.children import follow_parent
from landiff.launchers.local.train import explain_exit, own_run, run_trainer
follow_parent()
run, config_file = map(Path, sys.argv[1:])
config = SimpleNamespace(run=run, loop=SimpleNamespace(steps=60))
try:
    with own_run(config, "lm", 2, "landiff train lm") as owned:
        code = run_trainer("light_trainer", config_file, run, 2, owned)
except ValueError as error:
    sys.exit(str(error))
sys.exit(f"{run} failed: {explain_exit(run, code)}" if code else 0)
"""
SUBMIT = """
import sys
from pathlib import Path
from landiff.launchers.local.children import follow_parent
from landiff.launchers.slurm.run_here import run_here
from tests.launchers.local_jobs import THREE_RESTARTS, light_training
follow_parent()
run, config_file = map(Path, sys.argv[1:])
sys.exit(run_here([light_training(run, config_file)], THREE_RESTARTS))
"""


def start(code: str, run: Path, config: Path) -> subprocess.Popen:
    env = environment()
    env["PYTHONPATH"] += f":{HERE}"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run), str(config)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command_line(pid: int) -> str:
    """Command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def tree(parent: int) -> dict[str, int]:
    """Ids of the processes below `parent`, by their role."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = {"command": parent}, [parent]
    while todo:
        for pid in children.get(todo.pop(), []):
            todo.append(pid)
            found[name_of(pid)] = pid
    return found


def name_of(pid: int) -> str:
    """Role of a process: for a rank or its helper with the number of the rank."""
    words = command_line(pid)
    if TORCHRUN in words:
        return "torchrun"
    if RANK not in words:
        return words.split(" ")[0]
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    rank = next(word for word in variables if word.startswith("RANK=")).removeprefix("RANK=")
    # The command line of torchrun holds that of the rank.
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    words = command_line(int(parent))
    if RANK in words and TORCHRUN not in words:
        return f"helper {rank}"
    return f"rank {rank}"


def steps_of(run: Path) -> list[int]:
    """Steps in the complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return [json.loads(line)["step"] for line in lines]


def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for a condition."""
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def training(code: str, run: Path, config: Path) -> tuple[subprocess.Popen, dict[str, int]]:
    """A started training that has taken a few steps, and its processes."""
    helpers = [run / f"helper_{rank}" for rank in range(2)]
    for path in helpers:
        path.unlink(missing_ok=True)
    newest = max(steps_of(run), default=0) // SAVE_EVERY * SAVE_EVERY
    command = start(code, run, config)
    until(
        lambda: (
            command.poll() is not None
            or (all(path.exists() for path in helpers) and max(steps_of(run), default=0) > newest)
        ),
        "no step was taken",
    )
    assert command.poll() is None, command.communicate()[0]
    return command, tree(command.pid)


def status(run: Path) -> RunStatus:
    (found,), _ = statuses(
        [run], Slurm(lambda words: pytest.fail(f"{words}: no SLURM is needed"), retry_waits_s=())
    )
    return found


def none_left(pids: dict[str, int]) -> None:
    until(
        lambda: not any(map(is_running, pids.values())),
        f"left: { {name: command_line(pid) for name, pid in pids.items() if is_running(pid)} }",
    )


KILLS = {
    "command": (-9, "interrupted", ""),
    "torchrun": (1, "failed", "torchrun, which starts the ranks, was ended by SIGKILL"),
    "rank 0": (1, "failed", "rank 0 was ended by SIGKILL"),
    "rank 1": (1, "failed", "rank 1 was ended by SIGKILL"),
}


def test_a_training_ends_with_any_of_its_processes_and_the_next_resumes(tmp_path):
    run = tmp_path / "lm"
    config = write_light_config(run)
    for name, (code, state, error) in KILLS.items():
        command, pids = training(TRAIN, run, config)
        assert pids.keys() == {"command", "torchrun", "rank 0", "rank 1", "helper 0", "helper 1"}
        running = status(run)
        assert (running.state, running.steps) == ("running", STEPS) and running.step in range(
            1, STEPS
        )
        os.kill(pids[name], signal.SIGKILL)
        said = command.communicate(timeout=120)[0]
        none_left(pids)
        assert command.returncode == code and error in said, said
        ended = status(run)
        assert ended.state == state and error in ended.error
    done = start(TRAIN, run, config)
    said = done.communicate(timeout=240)[0]
    assert done.returncode == 0, said
    assert status(run).state == "done" and steps_of(run) == list(range(1, STEPS + 1))
    assert not list(run.glob(".owner*"))


def test_landiff_stop_and_logs_know_a_training_that_was_not_submitted(tmp_path, capsys):
    run = tmp_path / "lm"
    command, pids = training(TRAIN, run, write_light_config(run))
    second = start(TRAIN, run, tmp_path / "lm.json")
    said = second.communicate(timeout=120)[0]
    assert (
        second.returncode == 1 and f"run folder {run} is in use by process {command.pid} of" in said
    )
    assert f"asked process {command.pid}" in stop(run, restart=False)
    text = command.communicate(timeout=120)[0]
    none_left(pids)
    assert (
        command.returncode == 0
        and "rank 0 starts at step 0" in text
        and "rank 1 starts at step 0" in text
    )
    assert (
        status(run).state == "stopped"
        and (run / "checkpoints" / f"step_{steps_of(run)[-1]:08d}").is_dir()
    )
    show_logs(run, None, 10, follow=False)
    assert "rank 0 starts at step 0" in capsys.readouterr().out
    assert "nothing of it is running" in stop(run, restart=False)


def test_a_submitted_training_restarts_after_a_crash_and_ends_with_each_of_its_shells(tmp_path):
    run = tmp_path / "lm"
    config = write_light_config(run)
    command, pids = training(SUBMIT, run, config)
    assert pids.keys() == {
        "command",
        "bash",
        "tee",
        "torchrun",
        "rank 0",
        "rank 1",
        "helper 0",
        "helper 1",
    }
    second = start(SUBMIT, run, config)
    assert "in use by process" in second.communicate(timeout=120)[0] and second.returncode != 0
    os.kill(pids["torchrun"], signal.SIGKILL)
    until(lambda: "starting again" in (run / "job" / "log" / "batch.log").read_text())

    def has_restarted() -> bool:
        newest = tree(command.pid)
        return "rank 0" in newest and newest.get("torchrun") not in (None, pids["torchrun"])

    until(has_restarted)
    none_left({name: pid for name, pid in pids.items() if name not in ("command", "bash", "tee")})
    assert status(run).state == "running"
    pids = tree(command.pid)
    endings = {"bash": (137, "failed"), "command": (-9, "interrupted"), "tee": (None, "done")}
    for name, (code, state) in endings.items():
        os.kill(pids[name], signal.SIGKILL)
        command.communicate(timeout=120)
        none_left(pids)
        assert command.returncode == code or code is None
        assert status(run).state == state
        if name != "tee":
            command, pids = training(SUBMIT, run, config)
    assert steps_of(run) == list(range(1, STEPS + 1)) and not list(run.glob(".owner*"))
