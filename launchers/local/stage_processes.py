"""Runs commands that wait for each other as processes, several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from landiff.launchers.local.children import environment


@dataclass(frozen=True)
class Command:
    """A `landiff` command line, and the names of the commands that must have succeeded before."""

    name: str
    title: str
    words: Sequence[str]  # after `landiff`
    after: Sequence[str] = ()


@dataclass(frozen=True)
class Finished:
    """How a command ended. `cpu_seconds` includes the processes that it has started."""

    name: str
    seconds: float
    cpu_seconds: float
    exit_code: int


@dataclass
class _Process:
    """A running command, with the thread that prints its output."""

    name: str
    process: subprocess.Popen[str]
    started: float = field(default_factory=time.monotonic)
    printer: threading.Thread | None = None


def run_commands(commands: Sequence[Command], folder: Path, at_once: int) -> Iterator[Finished]:
    """Runs commands in `folder`, at most `at_once` at a time, and yields each when it has ended.

    Commands start in the order given, as soon as those that they wait for have succeeded. Output
    goes to the terminal; where several run at once, each line begins with the command's name. If a
    command fails, the others are asked to stop (SIGTERM) and no further one is started.
    """
    waiting = list(commands)
    running: dict[int, _Process] = {}  # by process id
    stopped = False
    while running or (waiting and not stopped):
        if not stopped:
            for command in _ready(waiting, running, at_once):
                waiting.remove(command)
                number = commands.index(command) + 1
                print(f"\n== {number}/{len(commands)} {command.name}: {command.title}", flush=True)
                started = _start(command, folder, labelled=at_once > 1)
                running[started.process.pid] = started
        finished = _wait(running)
        if finished.exit_code and not stopped:
            stopped = True
            for other in running.values():
                other.process.terminate()
        yield finished


def _ready(
    waiting: Sequence[Command], running: Mapping[int, _Process], at_once: int
) -> list[Command]:
    """The commands that can start now."""
    unfinished = {command.name for command in waiting}
    unfinished |= {process.name for process in running.values()}
    ready = [command for command in waiting if unfinished.isdisjoint(command.after)]
    return ready[: at_once - len(running)]


def _start(command: Command, folder: Path, *, labelled: bool) -> _Process:
    """Starts a command."""
    words = [sys.executable, "-m", "landiff.launchers.cli", *command.words]
    output = subprocess.PIPE if labelled else None
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=environment(),
        stdout=output,
        stderr=subprocess.STDOUT if labelled else None,
        text=True,
        errors="replace",
    )
    if process.stdout is None:
        return _Process(command.name, process)
    printer = threading.Thread(target=_print_lines, args=(command.name, process.stdout))
    printer.start()
    return _Process(command.name, process, printer=printer)


def _print_lines(name: str, lines: IO[str]) -> None:
    """Prints lines as they come, each after the name of its command."""
    with lines:
        for line in lines:
            print(f"{name} | {line.rstrip()}", flush=True)


def _wait(running: dict[int, _Process]) -> Finished:
    """Waits for one of the processes to end and removes it."""
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid in running:
            break
    ended = running.pop(pid)
    ended.process.returncode = os.waitstatus_to_exitcode(status)
    if ended.printer is not None:
        ended.printer.join()
    return Finished(
        ended.name,
        round(time.monotonic() - ended.started, 1),
        round(usage.ru_utime + usage.ru_stime, 1),
        ended.process.returncode,
    )
