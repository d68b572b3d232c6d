"""Processes that train together: rank, device, and small messages between ranks.

Within training/, only this file reads the environment variables of torchrun and srun: RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS, and the
launchers' LANDIFF_OWNER. If none is set, there is one process.

There are two process groups. The default group is for the engines' tensors (NCCL on CUDA, otherwise
gloo). Flags and JSON are exchanged over a separate gloo group: reading them does not wait for the
device, and it works while a collective of the engine hangs.
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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from landiff.configs import ownership
from landiff.configs.base import ConfigError
from landiff.configs.ownership import OWNER
from landiff.configs.problems import Problem, require_none
from landiff.configs.secrets import RedactingFormatter
from landiff.model_zoo import attention
from landiff.training.checkpoint.errors import clear_errors, write_error
from landiff.training.config import LoopConfig
from landiff.training.observe.step_times import StartTimes

if TYPE_CHECKING:
    from landiff.training.observe.heartbeat import Heartbeat

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class World:
    """This process and the other ranks.

    All methods but `beat` are collective: every rank calls them, in the same order.

    backend: "nccl" or "gloo", of the default group.
    local_size: ranks of this node, 0 if the launcher does not say.
    step: finished optimizer steps, for the error file.
    stop_signalled: whether this rank received SIGTERM or SIGUSR1.
    stop_file: a request to stop if it exists; rank 0 checks for it.
    stopping: whether a rank was asked to stop, as the last `agree` found. Equal on all ranks.
    control: the gloo group. None for a single process.
    heartbeat: of the run, None outside one.
    start_times: of this process, until its first step.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str
    local_size: int = 0
    step: int = 0
    stop_signalled: bool = False
    stop_file: Path | None = None
    stopping: bool = False
    control: dist.ProcessGroup | None = field(default=None, repr=False)
    heartbeat: Heartbeat | None = field(default=None, repr=False)
    start_times: StartTimes = field(default_factory=StartTimes, repr=False)

    def beat(self) -> None:
        """Record progress within a step, so that a long validation or preview is not a hang."""
        if self.heartbeat is not None:
            self.heartbeat.beat(self.step)

    def any_true(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one rank. One all-reduce of 4 bytes between CPUs."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag), dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return bool(votes)

    def agree(self, number: int) -> int:
        """The largest `number` of all ranks; also sets `stopping`.

        One all-reduce of 8 bytes between CPUs (0.1 ms on one node, about 1 ms over hundreds).
        """
        file_exists = self.rank == 0 and self.stop_file is not None and self.stop_file.exists()
        stop = self.stop_signalled or file_exists
        if self.size > 1:
            votes = torch.tensor([number, int(stop)], dtype=torch.int32)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
            number, stop = int(votes[0]), bool(votes[1])
        self.stopping = stop
        return number

    def all_true(self, flag: bool) -> bool:
        """Whether `flag` is true on all ranks."""
        return not self.any_true(not flag)

    def group_of_neighbors(self, size: int) -> dist.ProcessGroup | None:
        """A group of this rank and others: ranks 0 to `size` - 1, the next `size` ranks, and so on.

        `size` divides the number of ranks. None for 1. Only the ranks of a group wait for each
        other, so that starting takes no longer with more ranks.
        """
        if size == 1:
            return None
        assert self.size % size == 0, (self.size, size)
        first = self.rank // size * size
        return dist.new_group(range(first, first + size), use_local_synchronization=True)

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        self.any_true(False)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on all ranks. It must be JSON-serializable."""
        return self.gather(value if self.rank == 0 else None)[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of CPU tensors over all ranks, in place. One all-reduce between CPUs."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def require_none(self, check: Callable[[], list[Problem]]) -> None:
        """Run `check` on rank 0 and raise its problems as one ConfigError on all ranks."""
        texts = []
        if self.rank == 0:
            texts = [problem.text for problem in check()]
        require_none([Problem(text) for text in self.broadcast(texts)])

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank on all ranks, ordered by rank.

        Values must be JSON-serializable and small: all are padded to the longest.
        """
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
        values = []
        for part, size in zip(gathered, sizes.tolist(), strict=True):
            values.append(json.loads(part[:size].numpy().tobytes()))
        return values

    def send_to_first(self, values: list[Any]) -> list[Any]:
        """The `values` of all ranks on rank 0, ordered by rank, and none on the others.

        Values are pickled. Only rank 0 waits for other ranks.
        """
        if self.rank > 0:
            dist.send_object_list([values], dst=0, group=self.control)
            return []
        found = list(values)
        for other in range(1, self.size):
            received: list[Any] = [None]
            dist.recv_object_list(received, src=other, group=self.control)
            found += received[0]
        return found


def choose_kernels(loop: LoopConfig) -> None:
    """Apply `loop.attention` and `loop.deterministic` to this process. Call before any model."""
    attention.prefer(loop.attention)
    if loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Only warns of operators without such a kernel.
        torch.use_deterministic_algorithms(True, warn_only=True)


def keep_launch_order() -> None:
    """Let CUDA start kernels in the order of their launch. Call before CUDA is initialized.

    Megatron-core's tensor-parallel layers launch communication before the matrix multiplication
    that hides it, and need this order.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


@contextmanager
def start(run: Path | None = None, timeout_s: float = 1800.0) -> Iterator[World]:
    """Join the process group, and on rank 0 take ownership of the run folder `run`.

    The process group is destroyed at the end of the block. An exception inside the block is written
    to `run/errors/rank_<n>.txt` and propagates. SIGTERM and SIGUSR1 do not end the process; they
    set `world.stop_signalled`, which the ranks share in each step (`World.agree`).

    Raises OwnedError on rank 0 if another process owns `run`.
    """
    rank = _variable("RANK", 0)
    size = _variable("WORLD_SIZE", 1)
    local_rank = _variable("LOCAL_RANK", 0)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK = {rank} does not fit WORLD_SIZE = {size}; the launcher sets both")
    # Libraries read these variables.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    _connect_gloo_on_demand()
    _set_up_logging(rank)
    _limit_threads()
    device = _device(local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    local_size = _variable("LOCAL_WORLD_SIZE", 0)
    world = World(rank, size, local_rank, device, backend, local_size)
    world.start_times.end("imports")
    owned: AbstractContextManager[object] = nullcontext()
    if run is not None and rank == 0:
        token = os.environ.get(ownership.TOKEN, "")
        owned = ownership.take(run / OWNER, f"run folder {run}", inherited=token)
    with owned:
        yield from _joined(world, run, timeout_s)


def _joined(world: World, run: Path | None, timeout_s: float) -> Iterator[World]:
    """The part of `start` that runs as the owner of `run`."""
    previous = _handle_stop_signals(world)
    if run is not None:
        clear_errors(run, world.rank, world.size)
    failed = True
    try:
        _join(world, timedelta(seconds=timeout_s))
        world.start_times.end("process_groups")
        yield world
        failed = False
    except BaseException as error:
        if run is not None:
            write_error(run, world.rank, world.step, error)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        # After a failure NCCL would wait for ranks that no longer respond. With gloo the other
        # ranks notice the closed socket.
        abandon = failed and world.backend == "nccl"
        if dist.is_initialized() and not abandon:
            dist.destroy_process_group()


def _variable(name: str, default: int) -> int:
    """An environment variable as a number. Raises ConfigError."""
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"environment variable {name} = {text!r} is not a number; the launcher sets it"
        ) from None


def _device(local_rank: int) -> torch.device:
    """The CUDA device of this rank, or the CPU.

    If the launcher makes one device visible to each rank, it is that one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK = {local_rank}, but this node has {count} CUDA devices; launch at most "
            f"{count} ranks a node"
        )
    device = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


def _set_up_logging(rank: int) -> None:
    """Log warnings of libraries on all ranks, and this project's messages on rank 0 only."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        RedactingFormatter(f"%(asctime)s [{rank}] %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("landiff").setLevel(logging.INFO if rank == 0 else logging.ERROR)


def _connect_gloo_on_demand() -> None:
    """Let gloo connect two ranks when they first exchange data. Call before the first group.

    Otherwise each group connects all pairs of its ranks, and the start takes longer with more
    ranks.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def _limit_threads() -> None:
    """Divide the cores of this process among the ranks of the node, unless OMP_NUM_THREADS is set.

    A rank gets at least one thread.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // _variable("LOCAL_WORLD_SIZE", 1)))


def _handle_stop_signals(world: World) -> dict[int, Any]:
    """Make the stop signals set `world.stop_signalled`. Returns the previous handlers."""

    def remember(number: int, frame: FrameType | None) -> None:
        world.stop_signalled = True

    return {number: signal.signal(number, remember) for number in STOP_SIGNALS}


def _join(world: World, timeout: timedelta) -> None:
    """Initialize both process groups."""
    device_id = world.device if world.backend == "nccl" else None
    if world.size == 1 and "MASTER_ADDR" not in os.environ:  # a single process needs no port
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
            f"{' and '.join(missing)} not set, but WORLD_SIZE = {world.size}; launch with torchrun "
            "or `landiff train`"
        )
    dist.init_process_group(
        world.backend, rank=world.rank, world_size=world.size, timeout=timeout, device_id=device_id
    )
    if world.size > 1:
        world.control = dist.new_group(backend="gloo", timeout=timeout)
        # Connects neighbors. A rank whose neighbor ends gets an error from then on; before, it
        # would wait for the connection without end.
        world.barrier()
        if world.backend == "gloo":
            dist.barrier()
