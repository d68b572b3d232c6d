"""Processes that train together: who am I, which device, and small talk between ranks.

This is the only file that reads environment variables of torchrun or srun: RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS, and LANDIFF_OWNER of our launchers. With
none of them set, there is one process.

Two process groups exist. The default one is for the engines' tensors (NCCL on CUDA, gloo otherwise).
Flags and JSON travel over a gloo group of their own: reading them never waits for the device, and a rank
that failed inside a collective of its engine can still be told apart from one that talks.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from landiff.configs import ownership
from landiff.configs.base import ConfigError
from landiff.configs.ownership import OWNER
from landiff.configs.problems import Problem, require_none
from landiff.configs.secrets import RedactingFormatter
from landiff.training.checkpoint.errors import clear_errors, write_error

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class World:
    """This process among its peers. Every method is collective: all ranks call it, in the same order."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str  # "nccl" or "gloo"
    step: int = 0  # finished optimizer steps, for the error file
    stop_signalled: bool = False  # this rank saw SIGTERM or SIGUSR1
    control: dist.ProcessGroup | None = field(default=None, repr=False)  # gloo; None when alone

    def any_says(self, flag: bool) -> bool:
        """True on all ranks when `flag` is true on one. One all-reduce of 4 bytes between CPUs."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag), dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return bool(votes)

    def all_agree(self, flag: bool) -> bool:
        """True on all ranks when `flag` is true on all of them."""
        return not self.any_says(not flag)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any_says(False)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (JSON-able) on all ranks."""
        return self.gather(value if self.rank == 0 else None)[0]

    def require_none(self, check: Callable[[], list[Problem]]) -> None:
        """Raise the problems that `check` finds on rank 0 as one ConfigError on all ranks."""
        texts = [problem.text for problem in check()] if self.rank == 0 else []
        require_none([Problem(text) for text in self.broadcast(texts)])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (JSON-able) on all ranks, by rank. For small things: the longest sets the size."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self.control)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(data)] = data
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self.control)
        return [
            json.loads(part[:size].numpy().tobytes())
            for part, size in zip(gathered, sizes.tolist(), strict=True)
        ]


@contextmanager
def start(run: Path | None = None, timeout_s: float = 1800.0) -> Iterator[World]:
    """Join the other ranks as the owner of the folder `run`; leave them at the end of the block.

    Raises OwnedError in rank 0 where another process owns `run`.

    An exception inside the block is written to `run/errors/rank_<n>.txt` and goes on (exit code 1). SIGTERM
    and SIGUSR1 no longer end the process: they set `world.stop_signalled`, which the loop looks at.
    """
    rank, size = _variable("RANK", 0), _variable("WORLD_SIZE", 1)
    local_rank = _variable("LOCAL_RANK", 0)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK = {rank} does not fit WORLD_SIZE = {size}; the launcher sets both")
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank)
    )  # libraries look there
    _set_up_logging(rank)
    _limit_threads()
    device = _device(local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    world = World(rank, size, local_rank, device, backend)
    owned: AbstractContextManager[object] = nullcontext()
    if run is not None and rank == 0:
        owned = ownership.take(
            run / OWNER, f"run folder {run}", inherited=os.environ.get(ownership.TOKEN, "")
        )
    with owned:
        yield from _joined(world, run, timeout_s)


def _joined(world: World, run: Path | None, timeout_s: float) -> Iterator[World]:
    """`start` for the owner of `run`."""
    previous = _remember_signals(world)
    if run is not None:
        clear_errors(run, world.rank, world.size)
    failed = True
    try:
        _join(world, timedelta(seconds=timeout_s))
        yield world
        failed = False
    except BaseException as error:
        if run is not None:
            write_error(run, world.rank, world.step, error)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        # After a failure NCCL would wait for peers that no longer answer; gloo's peers learn of it by the closed socket.
        if dist.is_initialized() and not (failed and world.backend == "nccl"):
            dist.destroy_process_group()


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ConfigError(
            f"environment variable {name} = {text!r} is not a number; the launcher sets it"
        ) from None


def _device(local_rank: int) -> torch.device:
    """The CUDA device of this rank, else the CPU. Where the launcher shows each rank one device, that one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK = {local_rank}, but this node has {count} CUDA devices; launch at most {count} ranks a node"
        )
    device = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


def _set_up_logging(rank: int) -> None:
    """Warnings of libraries from everybody; our own words from rank 0 alone, which speaks for what is agreed."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        RedactingFormatter(f"%(asctime)s [{rank}] %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("landiff").setLevel(logging.INFO if rank == 0 else logging.ERROR)


def _limit_threads() -> None:
    """Share the cores that this process may use with the other ranks of the node, unless told otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // _variable("LOCAL_WORLD_SIZE", 1))
        )


def _remember_signals(world: World) -> dict[int, Any]:
    def remember(number: int, frame: FrameType | None) -> None:
        world.stop_signalled = True

    return {number: signal.signal(number, remember) for number in STOP_SIGNALS}


def _join(world: World, timeout: timedelta) -> None:
    device_id = world.device if world.backend == "nccl" else None
    if world.size == 1 and "MASTER_ADDR" not in os.environ:  # alone: no port needed
        dist.init_process_group(
            world.backend,
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            timeout=timeout,
            device_id=device_id,
        )
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} not set, but WORLD_SIZE = {world.size}; launch with torchrun or `landiff train`"
        )
    dist.init_process_group(
        world.backend, rank=world.rank, world_size=world.size, timeout=timeout, device_id=device_id
    )
    if world.size > 1:
        world.control = dist.new_group(backend="gloo", timeout=timeout)
