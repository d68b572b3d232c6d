"""Runs commands that wait for each other as processes, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from landiff.launchers.local.children import environment, share_cores, stop_signals
from landiff.training.checkpoint.run_folder import finished_step


@dataclass(frozen=True)
class Command:
    """A `landiff` command line, and the names of the commands that must have succeeded before.

    run: run folder of a trainer, relative to the working folder.
    """

    name: str
    title: str
    words: Sequence[str]  # after `landiff`
    after: Sequence[str] = ()
    run: str | None = None


@dataclass(frozen=True)
class Finished:
    """How a command ended.

    cpu_seconds: includes the processes that the command has started.
    unfinished: a trainer was asked to stop and saved a checkpoint before its last step.
    """

    name: str
    seconds: float
    cpu_seconds: float
    exit_code: int
    unfinished: bool = False


class StoppedBySignal(Exception):
    """Raised when a signal has asked the commands to stop and all of them have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _Process:
    """A running command, with the thread that prints its output."""

    command: Command
    process: subprocess.Popen[str]
    started: float = field(default_factory=time.monotonic)
    printer: threading.Thread | None = None

    def send(self, number: int) -> None:
        """Send a signal. Popen.send_signal would collect the exit code that `_wait` waits for."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


def run_commands(commands: Sequence[Command], folder: Path, at_once: int) -> Iterator[Finished]:
    """Runs commands in `folder`, at most `at_once` at a time, and yields each when it has ended.

    Commands start in the order given, as soon as those that they wait for have succeeded. Output
    goes to the terminal; where several run at once, each line begins with the command's name. If a
    command fails, or if a trainer stops before its last step, the others are asked to stop
    (SIGTERM) and no further one is started.

    Signals that ask this process to stop are passed on to the commands. When all of them have
    ended, StoppedBySignal is raised.
    """
    waiting = list(commands)
    running: dict[int, _Process] = {}  # by process id
    stopped = False
    with _signals_passed_on(running) as received:
        while running or (waiting and not stopped and not received):
            for command in _ready(waiting, running, at_once):
                if stopped or received:
                    break
                waiting.remove(command)
                number = commands.index(command) + 1
                print(f"\n== {number}/{len(commands)} {command.name}: {command.title}", flush=True)
                started = _start(command, folder, at_once)
                running[started.process.pid] = started
                if received:  # while it was started
                    started.send(signal_to_pass_on(received[-1]))
            if not running:
                break
            finished = _wait(running, folder)
            if (finished.exit_code or finished.unfinished) and not stopped:
                stopped = True
                for other in running.values():
                    other.send(signal.SIGTERM)
            yield finished
    if received:
        raise StoppedBySignal(received[0])


@contextmanager
def _signals_passed_on(running: Mapping[int, _Process]) -> Iterator[list[int]]:
    """Context in which signals that ask to stop are sent to `running`. Yields those received."""
    received: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        for process in running.values():
            process.send(signal_to_pass_on(number))

    previous = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def signal_to_pass_on(number: int) -> int:
    """SIGINT, and SIGTERM for all others: not every command handles SIGHUP and SIGUSR1."""
    return signal.SIGINT if number == signal.SIGINT else signal.SIGTERM


def _ready(
    waiting: Sequence[Command], running: Mapping[int, _Process], at_once: int
) -> list[Command]:
    """The commands that can start now."""
    unfinished = {command.name for command in waiting}
    unfinished |= {process.command.name for process in running.values()}
    ready = [command for command in waiting if unfinished.isdisjoint(command.after)]
    return ready[: at_once - len(running)]


def _start(command: Command, folder: Path, at_once: int) -> _Process:
    """Starts one of `at_once` commands, among which the cores are divided, in its own session.

    Ctrl-C in a terminal thus reaches this process only, which passes it on once: a second one makes
    a trainer end without a checkpoint.
    """
    words = [sys.executable, "-m", "landiff.launchers.cli", *command.words]
    env = environment()
    labelled = at_once > 1
    if labelled:
        share_cores(env, at_once)
    output = subprocess.PIPE if labelled else None
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=env,
        stdout=output,
        stderr=subprocess.STDOUT if labelled else None,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    if process.stdout is None:
        return _Process(command, process)
    printer = threading.Thread(target=_print_lines, args=(command.name, process.stdout))
    printer.start()
    return _Process(command, process, printer=printer)


def _print_lines(name: str, lines: IO[str]) -> None:
    """Prints lines as they come, each after the name of its command."""
    with lines:
        for line in lines:
            print(f"{name} | {line.rstrip()}", flush=True)


def _wait(running: dict[int, _Process], folder: Path) -> Finished:
    """Waits for one of the processes to end and removes it."""
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid in running:
            break
    ended = running.pop(pid)
    ended.process.returncode = os.waitstatus_to_exitcode(status)
    if ended.printer is not None:
        ended.printer.join()
    run = ended.command.run
    code = ended.process.returncode
    return Finished(
        ended.command.name,
        round(time.monotonic() - ended.started, 1),
        round(usage.ru_utime + usage.ru_stime, 1),
        code,
        unfinished=run is not None and code == 0 and finished_step(folder / run) is None,
    )
