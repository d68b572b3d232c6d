"""Starts the processes of `--nproc` of commands that sample, and waits for them. Torch-free."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from landiff.configs import ConfigError
from landiff.launchers.cli import CONFIG_ERROR
from landiff.launchers.commands import JobFailed
from landiff.launchers.local.children import environment
from landiff.launchers.local.gpus import one_gpu

PARTNER_LOST = 5  # exit code of a process that ended because the other one of its pair did
PARTNER_S = 10.0  # until a process is ended whose partner has failed
POLL_S = 0.1


def sample_in_processes(
    argv: Sequence[str],
    processes: int,
    *,
    command: str = "sample",
    in_pairs: bool = False,
    stdin: Sequence[str] | None = None,
) -> int:
    """Runs a `landiff` command in several processes, each with a part of the videos.

    Each has a GPU of its own, if there are GPUs.

    command: the word before the options in `argv`.
    in_pairs: two processes generate each video.
    stdin: lines of standard input that this process has read, and each process reads again.

    Returns the exit code of the first process that failed, or 0. Raises the errors of
    `wait_in_pairs`.
    """
    words = without_option(argv, "--nproc")
    position = words.index(command) + 1
    together = 2 if in_pairs else 1
    port = 0
    children = []
    for number in range(processes):
        if number % together == 0:
            port = free_port()
        own = ["--task", f"{number // together}/{processes // together}"]
        if in_pairs:
            own += ["--pair", f"{number % 2}:{port}"]
        program = [sys.executable, "-m", "landiff.launchers.cli"]
        env = environment() | one_gpu(number)
        program += [*words[:position], *own, *words[position:]]
        children.append(start(program, env, stdin))
    if in_pairs:
        wait_in_pairs(children)
        return 0
    codes = [child.wait() for child in children]
    return next((code for code in codes if code), 0)


def start(
    command: Sequence[str], env: Mapping[str, str], stdin: Sequence[str] | None
) -> subprocess.Popen[bytes]:
    """Starts a process that reads the lines `stdin`, or what this process would read if None."""
    if stdin is None:
        return subprocess.Popen(command, env=env)
    with tempfile.TemporaryFile() as file:  # one for each process, which do not share its position
        file.writelines(f"{line}\n".encode() for line in stdin)
        file.seek(0)
        return subprocess.Popen(command, env=env, stdin=file)


def wait_in_pairs(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits for processes of which two neighbours generate a video together.

    The partner of a process that failed is ended, if it does not end by itself. Raises JobFailed
    that names the process that failed first, or ConfigError if it reported a mistake of the user.
    """
    running = set(range(len(children)))
    failed: list[int] = []
    deadlines: dict[int, float] = {}
    while running:
        for number in sorted(running):
            code = children[number].poll()
            if code is None:
                continue
            running.discard(number)
            if code:
                failed.append(number)
                deadlines[number ^ 1] = time.monotonic() + PARTNER_S
        for number, deadline in deadlines.items():
            if number in running and time.monotonic() > deadline:
                children[number].terminate()
        if running:
            time.sleep(POLL_S)
    if not failed:
        return
    causes = [number for number in failed if children[number].returncode != PARTNER_LOST]
    cause = (causes or failed)[0]
    message = describe_failure(cause, len(children), children[cause].returncode)
    if children[cause].returncode == CONFIG_ERROR:
        raise ConfigError(message)
    raise JobFailed(message)


def describe_failure(number: int, processes: int, code: int) -> str:
    """Which process of the pairs failed and how, and what to do."""
    place = "second" if number % 2 else "first"
    ending = f"ended with exit code {code}"
    hint = "its own message is above"
    if code < 0:
        ending = f"was ended by {signal.Signals(-code).name}"
        hint = "the system ends processes in this way if memory is short"
    return (
        f"process {number + 1} of {processes}, the {place} one of a pair of split_guidance, "
        f"{ending}; {hint}. Finished videos are kept: fix the cause and run the same command "
        "again, or generate each video in one process, with split_guidance=false in another `out`"
    )


def free_port() -> int:
    """A port of this machine that no process uses now.

    It is below those that Linux gives to outgoing connections (from 32768 on), so that none of
    them takes it before the caller listens.
    """
    ports = random.SystemRandom()  # no seed: other processes must find others
    while True:
        port = ports.randrange(20_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def without_option(argv: Sequence[str], option: str) -> list[str]:
    """A command line without an option and its value. Words after `--` are kept."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    kept = []
    skip = False
    for word in words[:end]:
        if skip:
            skip = False
        elif word == option:
            skip = True
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return [*kept, *words[end:]]
