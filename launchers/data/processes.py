"""One process per GPU for a task of `landiff precompute`. Torch-free."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from landiff.configs import ConfigError
from landiff.launchers.cli import CONFIG_ERROR
from landiff.launchers.commands import JobFailed
from landiff.launchers.local.children import environment, share_cores
from landiff.launchers.local.gpus import one_gpu


def divide_task(task: tuple[int, int], processes: int) -> list[tuple[int, int]]:
    """Tasks that together compute the shards of `task` (number, count), and no others.

    A shard belongs to the task whose number is its hash modulo the count, see
    `units.task_of_shard`.
    """
    number, count = task
    return [(number + count * part, count * processes) for part in range(processes)]


def run_in_processes(words: Sequence[str], task: tuple[int, int], processes: int) -> None:
    """Runs a `landiff` command that computes columns in several processes.

    Each has a part of the task's shards, and a GPU of its own if there are GPUs. A process that
    fails does not end the others. SIGTERM is passed on to all of them. `words`: the command
    without `--task`. Raises ConfigError or JobFailed, which name the processes that failed.
    """
    children: list[subprocess.Popen[bytes]] = []
    stopped = False

    def stop(signal_number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        for child in children:
            child.terminate()

    signal.signal(signal.SIGTERM, stop)
    for process, (number, count) in enumerate(divide_task(task, processes)):
        env = environment() | one_gpu(process)
        share_cores(env, processes)
        command = [sys.executable, "-m", "landiff.launchers.cli", *words]
        command += ["--task", f"{number}/{count}", "--no-finalize"]
        children.append(subprocess.Popen(command, env=env))
        if stopped:  # perhaps after it had started and before `stop` knew it
            children[-1].terminate()
    try:
        codes = [child.wait() for child in children]
    except KeyboardInterrupt:  # of the terminal, which interrupts the children too
        for child in children:
            child.wait()
        raise
    if stopped:
        raise KeyboardInterrupt
    failed = {process: code for process, code in enumerate(codes) if code}
    if not failed:
        return
    endings = [f"{process + 1} ended with exit code {code}" for process, code in failed.items()]
    message = (
        f"of {processes} processes, one per GPU, {', '.join(endings)}; their messages are above. "
        "Finished units are kept: fix the cause and run the same command again"
    )
    if CONFIG_ERROR in failed.values():
        raise ConfigError(message)
    raise JobFailed(message)
