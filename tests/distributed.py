"""Run a module-level function in several gloo processes, fast.

Importing torch costs seconds, so one clean process imports each test module once and forks the
ranks on demand (a `Nursery`). It never computes anything itself: forking after torch has started
threads would hang the children.

    def check_sum(world, number):
        ...
        return something_that_pickles

    def test_sum():
        assert run_distributed(check_sum, 2, 5) == [..., ...]
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landiff.launchers.results.sampling.processes import free_port

ROOT = Path(__file__).resolve().parent.parent
ALIVE: list[Nursery] = []  # at most one
ONE_RANK = "--rank"
REQUEST = "request.pickle"


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds every rank's traceback and output."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Run `function(world, *args)` in `world_size` processes. Returns the results by rank.

    It runs inside `landiff.training.distributed.start()`. `function` is defined at module level,
    and arguments and results can be pickled. Raises RankError.
    """
    ranks = nursery(function.__module__).start(function, world_size, args, started=True)
    return ranks.results(timeout_s)


def run_on_gpus(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 600.0
) -> list[Any]:
    """As `run_distributed`, in new processes that see the GPUs, one for each rank.

    The nursery hides GPUs, and a process that is forked after CUDA was asked for cannot use it.
    """
    folder = Path(tempfile.mkdtemp(prefix="gpus-"))
    (folder / REQUEST).write_bytes(pickle.dumps((function.__module__, function.__name__, args)))
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            **_rank_variables(rank, world_size, port),
        }
        with (folder / f"rank_{rank}.out").open("w") as output:
            command = [sys.executable, "-m", "tests.distributed", ONE_RANK, str(folder), str(rank)]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            )
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):  # the others may wait for it without end
            deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    codes = [process.wait() for process in processes]
    if any(codes):
        texts = [path.read_text()[-4000:] for path in sorted(folder.glob("*.out"))]
        raise RankError(f"exit codes by rank: {codes}\n" + "\n".join(texts))
    found = [folder / f"rank_{rank}.pickle" for rank in range(world_size)]
    return [pickle.loads(path.read_bytes()) for path in found]


def _rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def nursery(module: str) -> Nursery:
    """The nursery of this process, which has imported a test module. Raises RankError.

    It keeps the environment variables of its start.
    """
    if not ALIVE:
        ALIVE.append(Nursery())
    ALIVE[-1].load(module)
    return ALIVE[-1]


class Nursery:
    """A process that imports test modules and forks ranks."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=os.getcwd(),
        )
        theirs.close()
        self.file = ours.makefile("rwb")
        ours.close()

    def load(self, module: str) -> None:
        """Imports a module. Raises RankError."""
        pickle.dump(module, self.file)
        self.file.flush()
        try:
            pickle.load(self.file)
        except EOFError:
            raise RankError(f"could not import {module} in a process of its own") from None

    def start(
        self,
        function: Callable[..., Any],
        world_size: int,
        args: Sequence[Any],
        *,
        started: bool = False,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Ranks:
        """Fork `world_size` ranks that call `function(*args)`, with `started` also `world`.

        The children write into `folder`: rank_<n>.out, rank_<n>.pickle.
        """
        folder = Path(tempfile.mkdtemp(prefix="ranks-")) if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        target = (function.__module__, function.__name__)
        pickle.dump(
            (
                target,
                world_size,
                tuple(args),
                started,
                dict(environment or {}),
                str(folder),
                os.getcwd(),
            ),
            self.file,
        )
        self.file.flush()
        return Ranks(self, pickle.load(self.file), folder)

    def wait(self, timeout_s: float) -> tuple[int, int] | None:
        """(pid, exit code or -signal) of the next rank that ended, or None after `timeout_s`."""
        pickle.dump(timeout_s, self.file)
        self.file.flush()
        return pickle.load(self.file)

    def close(self) -> None:
        self.file.close()
        self.process.wait(timeout=60)  # a busy machine frees large processes slowly


@dataclass
class Ranks:
    """Processes of one job."""

    nursery: Nursery
    pids: list[int]
    folder: Path  # rank_<n>.out (text) and rank_<n>.pickle (result)

    def wait(
        self, timeout_s: float, *, grace_s: float = 10.0, ended: Sequence[tuple[int, int]] = ()
    ) -> list[int]:
        """Exit codes by rank (-n: killed by signal n).

        When one fails, the others get `grace_s` to notice. Ranks still alive after that or after
        `timeout_s` are killed. `ended`: what `Nursery.wait` already reported of them.
        """
        codes = dict(ended)
        deadline = time.monotonic() + (grace_s if any(codes.values()) else timeout_s)
        while len(codes) < len(self.pids):
            ended = self.nursery.wait(max(0.0, deadline - time.monotonic()))
            if ended is None:
                self.kill(codes)
                deadline = time.monotonic() + 10
                continue
            pid, code = ended
            if pid not in self.pids:
                continue  # of a test that failed
            codes[pid] = code
            if code != 0:
                deadline = min(deadline, time.monotonic() + grace_s)
        return [codes[pid] for pid in self.pids]

    def kill(self, ended: Mapping[int, int] | None = None, number: int = signal.SIGKILL) -> None:
        for pid in self.pids:
            if pid not in (ended or {}):
                os.kill(pid, number)

    def output(self) -> str:
        texts = []
        for rank in range(len(self.pids)):
            text = (self.folder / f"rank_{rank}.out").read_text(errors="replace")
            texts.append(f"---- rank {rank}\n{text[-4000:]}")
        return "\n".join(texts)

    def results(self, timeout_s: float) -> list[Any]:
        codes = self.wait(timeout_s)
        if any(codes):
            raise RankError(f"exit codes by rank: {codes}\n{self.output()}")
        return [
            pickle.loads((self.folder / f"rank_{rank}.pickle").read_bytes())
            for rank in range(len(self.pids))
        ]


# -------------------------------------------------------------------- inside the nursery


def _serve(descriptor: int) -> None:
    """Import, fork and reap on request until the other side closes."""
    connection = socket.socket(fileno=descriptor)
    file = connection.makefile("rwb")
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    alive: set[int] = set()
    while True:
        try:
            request = pickle.load(file)
        except EOFError:
            break
        if isinstance(request, str):
            _import(request)
            _send(file, "ready")
        elif isinstance(request, tuple):
            _import(request[0][0])
            port = free_port()
            pids = [_fork(rank, port, *request) for rank in range(request[1])]
            alive.update(pids)
            _send(file, pids)
        else:
            _send(file, _reap(alive, request, read_end))
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def _import(module: str) -> None:
    """Imports a module, whose objects garbage collections of the ranks then leave alone.

    Each would look at a million objects of torch and copy their memory, in every rank.
    """
    importlib.import_module(module)
    gc.freeze()


def _send(file: Any, value: Any) -> None:
    pickle.dump(value, file)
    file.flush()


def _reap(alive: set[int], timeout_s: float, wakeup: int) -> tuple[int, int] | None:
    deadline = time.monotonic() + timeout_s
    while True:
        if alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                alive.discard(pid)
                return pid, os.waitstatus_to_exitcode(status)
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        if select.select([wakeup], [], [], left)[0]:
            os.read(wakeup, 4096)


def _fork(
    rank: int,
    port: int,
    target: tuple[str, str],
    world_size: int,
    args: Sequence[Any],
    started: bool,
    environment: dict[str, str],
    folder: str,
    cwd: str,
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        output = os.open(f"{folder}/rank_{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(cwd)
        os.environ.update(_rank_variables(rank, world_size, port) | environment)
        _call(
            getattr(importlib.import_module(target[0]), target[1]),
            args,
            started,
            Path(folder) / f"rank_{rank}.pickle",
        )
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(
    function: Callable[..., Any], args: Sequence[Any], started: bool, result_path: Path
) -> None:
    import torch

    torch.set_num_threads(1)
    if started:
        from landiff.training import distributed

        with distributed.start() as world:
            result = function(world, *args)
    else:
        result = function(*args)
    result_path.write_bytes(pickle.dumps(result))


def _run_rank(folder: Path, rank: int) -> None:
    """One rank of `run_on_gpus`."""
    module, name, args = pickle.loads((folder / REQUEST).read_bytes())
    function = getattr(importlib.import_module(module), name)
    _call(function, args, True, folder / f"rank_{rank}.pickle")


if __name__ == "__main__":
    if sys.argv[1] == ONE_RANK:
        _run_rank(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        _serve(int(sys.argv[1]))
