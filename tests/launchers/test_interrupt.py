"""`landiff train` under Ctrl-C: what it leaves, and its exit code."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from landiff.launchers.local.children import environment
from landiff.training.checkpoint.run_folder import committed_steps, finished_step
from tests.training.tokenizer.test_train import write_config
from tests.training.tokenizer.tiny import write_data

STEPS = 1_000_000


def start(folder, ranks):
    """A run that would take hours."""
    write_data(folder / "data")
    loop = {"steps": STEPS, "log_every": 1, "save_every": STEPS}
    path = write_config(folder / "run", loop=loop)
    command = [
        sys.executable,
        "-m",
        "landiff.launchers.cli",
        "train",
        "tokenizer",
        "--config",
        str(path),
        "--nproc",
        str(ranks),
    ]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def wait_for_handlers(process):
    """Until the command catches SIGTERM, which it does after it has started the ranks."""
    while True:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught & 1 << signal.SIGTERM - 1:
            return
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ranks", "sign_of_life"),
    [(2, "metrics.jsonl"), (1, "resolved.yaml")],  # the second before a rank runs
)
def test_a_trainer_that_is_interrupted_saves_and_fails(tmp_path, ranks, sign_of_life):
    """SIGTERM is tested in test_stage_processes.py, where it does not fail."""
    process = start(tmp_path, ranks)
    wait_for(tmp_path / "run" / sign_of_life, process)
    wait_for_handlers(process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "interrupted" in error and "Traceback" not in error
    assert len(committed_steps(tmp_path / "run" / "checkpoints")) == 1
    assert finished_step(tmp_path / "run") is None
    assert not (tmp_path / "run" / "stop").exists()


def test_a_second_ctrl_c_ends_the_ranks_at_once_with_the_same_code(tmp_path):
    process = start(tmp_path, 1)
    wait_for(tmp_path / "run" / "resolved.yaml", process)
    wait_for_handlers(process)
    process.send_signal(signal.SIGINT)
    assert "stopping after this step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
