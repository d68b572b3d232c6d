"""Heartbeat and hang detection: aborts a run whose steps stop progressing. Torch-free.

    <run>/heartbeat/rank_0003     time and step of the last beat; `landiff status` shows its age
    <run>/hangs/rank_0003.txt     stacks of a rank without a step for `loop.hang_timeout_s`
    <run>/hangs/nccl_rank_3       NCCL's flight recorder; read the files of all ranks with
                                  torch.distributed.flight_recorder.fr_trace
    <run>/hangs/gloo_rank_3.json  the same of gloo: the last collectives between CPUs, with the
                                  one that hangs

A rank that hangs writes these files and then waits, because the other ranks hang in a collective
with it and write theirs a moment later. It ends with exit code 1, and the process that started it
restarts it. A rank that writes no stacks was stopped or its machine is down: the other ranks wait
for it, and write its error file.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from landiff.training.checkpoint.errors import RankLost, error_path, write_cause, write_error
from landiff.training.checkpoint.run_folder import HANGS, heartbeat_path, stacks_path

log = logging.getLogger(__name__)

WRITE_EVERY_S = 5.0
PEERS_GRACE_S = 5.0  # for the other ranks to write their stacks
HARD_MARGIN_S = 60.0  # after this much longer C code ends the process, even if Python is stuck


class HangError(RuntimeError):
    """No step was finished for too long."""


class Heartbeat:
    """Records progress and aborts the process when it stops.

    A context manager around the training loop. Call `beat` after every step.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        timeout_s: float,
        grace_s: float = PEERS_GRACE_S,
        world_size: int = 1,
    ) -> None:
        """`timeout_s` = 0 records beats and disables hang detection."""
        self.run = run
        self.rank = rank
        self.timeout_s = timeout_s
        self.grace_s = grace_s
        self.world_size = world_size
        self.path = heartbeat_path(run, rank)
        self.step = 0
        self._last_beat = 0.0
        self._last_write = 0.0
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        """Start hang detection."""
        self._over.clear()
        self._last_beat = time.monotonic()
        if self.timeout_s:
            self._arm_faulthandler()
            self._watch = threading.Thread(target=self._detect, name="heartbeat", daemon=True)
            self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End hang detection."""
        self._over.set()
        if self._watch is not None:
            self._watch.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int) -> None:
        """Record that `step` steps are finished.

        The file is written every few seconds. A failure to write it does not stop training.
        """
        self.step = step
        self._last_beat = time.monotonic()
        if self._last_beat - self._last_write < WRITE_EVERY_S:
            return
        self._last_write = self._last_beat
        if self.timeout_s:
            self._arm_faulthandler()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(f"{time.time():.1f} step {step}\n", encoding="utf-8")
        except OSError as error:
            log.warning("the heartbeat file could not be written: %s", error)

    def _arm_faulthandler(self) -> None:
        """Let C code end the process if the watching thread cannot run."""
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(
            self.timeout_s + HARD_MARGIN_S, exit=True, file=sys.__stderr__
        )

    def _detect(self) -> None:
        """Abort the process after `timeout_s` without a beat. Runs in its own thread."""
        while not self._over.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() - self._last_beat > self.timeout_s:
                self._abort()

    def _abort(self) -> None:
        """Write what is needed to find the cause, and end the process."""
        silence = f"no step for {self.timeout_s:g} s after step {self.step} (loop.hang_timeout_s)"
        try:
            self._write_stacks(silence)
            folder = self.run / HANGS
            error = HangError(f"{silence}; stacks of all ranks in {folder}")
            write_error(self.run, self.rank, self.step, error)
            for name, trace in flight_recorders().items():
                (folder / name.format(rank=self.rank)).write_bytes(trace)
        finally:
            time.sleep(self.grace_s)
            with suppress(OSError):
                self._blame_silent_ranks()
            os._exit(1)

    def _write_stacks(self, silence: str) -> None:
        """Write the stacks of all threads."""
        path = stacks_path(self.run, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"rank {self.rank} on {os.uname().nodename}: {silence}\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)

    def _blame_silent_ranks(self) -> None:
        """Write the error files of ranks that wrote neither stacks nor an error."""
        for rank in range(self.world_size):
            if stacks_path(self.run, rank).exists() or error_path(self.run, rank).exists():
                continue
            error = RankLost(
                f"rank {rank} hangs after step {self.step}: no step for {self.timeout_s:g} s "
                "(loop.hang_timeout_s), and unlike the other ranks it could not write its stacks; "
                "its process was stopped, or its machine does not respond"
            )
            write_cause(self.run, rank, error, self.step)


def flight_recorders() -> dict[str, bytes]:
    """Contents of torch's flight recorders by file name.

    Empty if torch is not loaded or TORCH_FR_BUFFER_SIZE is 0.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    c10d = getattr(getattr(torch, "_C", None), "_distributed_c10d", None)
    if c10d is None:
        return {}
    found = {}
    if hasattr(c10d, "_dump_nccl_trace") and torch.cuda.is_initialized():
        found["nccl_rank_{rank}"] = c10d._dump_nccl_trace()
    if hasattr(c10d, "_dump_fr_trace_json"):
        found["gloo_rank_{rank}.json"] = c10d._dump_fr_trace_json()
    return {name: trace for name, trace in found.items() if b"entries" in trace}
