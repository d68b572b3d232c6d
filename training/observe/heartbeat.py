"""A sign of life per rank, and an end to silence: a step that never comes must not cost the night. Torch-free.

    <run>/heartbeat/rank_0003    time and step of its last beat; its age is what `landiff status` shows
    <run>/hangs/rank_0003.txt    all stacks of a rank that had no step for `loop.hang_timeout_s`
    <run>/hangs/nccl_rank_3      NCCL's flight recorder; torch.distributed.flight_recorder.fr_trace reads all ranks' together
    <run>/hangs/gloo_rank_3.json gloo's: the last collectives between CPUs, the one that hangs among them

A rank that hangs leaves these, waits until its peers (which wait for it in a collective, and so are late too)
have left theirs, and ends with code 1; whoever started it starts it again. A rank that leaves no stacks
is the one that the others wait for (it was stopped, or its machine is gone): they write its error file.
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

log = logging.getLogger(__name__)

WRITE_EVERY_S = 5.0
PEERS_GRACE_S = 5.0
SECOND_NET_S = 60.0  # where Python itself is stuck, C ends the process this much later


class HangError(RuntimeError):
    """No step for too long."""


class Heartbeat:
    """Use as a context manager around the loop; `beat` after every step."""

    def __init__(
        self,
        run: Path,
        rank: int,
        timeout_s: float,
        grace_s: float = PEERS_GRACE_S,
        world_size: int = 1,
    ) -> None:
        """`timeout_s` = 0 keeps the beat and switches the watch off."""
        self.world_size = world_size
        self.run, self.rank, self.timeout_s, self.grace_s = run, rank, timeout_s, grace_s
        self.path = run / "heartbeat" / f"rank_{rank:04d}"
        self.step = 0
        self._last = self._written = 0.0
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        self._over.clear()
        self._last = time.monotonic()
        if self.timeout_s:
            faulthandler.dump_traceback_later(
                self.timeout_s + SECOND_NET_S, exit=True, file=sys.__stderr__
            )
            self._watch = threading.Thread(target=self._look, name="heartbeat", daemon=True)
            self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._watch is not None:
            self._watch.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int) -> None:
        """`step` steps are finished. Writes a file now and then; a disk that refuses does not stop training."""
        self.step, self._last = step, time.monotonic()
        if self._last - self._written < WRITE_EVERY_S:
            return
        self._written = self._last
        if self.timeout_s:
            faulthandler.dump_traceback_later(
                self.timeout_s + SECOND_NET_S, exit=True, file=sys.__stderr__
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(f"{time.time():.1f} step {step}\n", encoding="utf-8")
        except OSError as error:
            log.warning("no heartbeat: %s", error)

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self.timeout_s / 4)):
            if time.monotonic() - self._last > self.timeout_s:
                self._end()

    def _end(self) -> None:
        """Leave what a person needs to find the cause; end the process."""
        silence = f"no step for {self.timeout_s:g} s after step {self.step} (loop.hang_timeout_s)"
        try:
            folder = self.run / "hangs"
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank_{self.rank:04d}.txt", "w", encoding="utf-8") as file:
                file.write(f"rank {self.rank} on {os.uname().nodename}: {silence}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            write_error(
                self.run,
                self.rank,
                self.step,
                HangError(f"{silence}; stacks of all ranks in {folder}"),
            )
            for name, trace in flight_recorders().items():
                (folder / name.format(rank=self.rank)).write_bytes(trace)
        finally:
            time.sleep(self.grace_s)
            with suppress(OSError):
                self._blame_silent_ranks()
            os._exit(1)

    def _blame_silent_ranks(self) -> None:
        for rank in range(self.world_size):
            if (
                not (self.run / "hangs" / f"rank_{rank:04d}.txt").exists()
                and not error_path(self.run, rank).exists()
            ):
                write_cause(
                    self.run,
                    rank,
                    RankLost(
                        f"rank {rank} stands still after step {self.step}: no step for {self.timeout_s:g} s (loop.hang_timeout_s), and unlike "
                        "the other ranks it could not write its stacks; its process was stopped, or its machine does not answer"
                    ),
                    self.step,
                )


def flight_recorders() -> dict[str, bytes]:
    """What torch's recorders hold, by file name; nothing where torch was not loaded or TORCH_FR_BUFFER_SIZE is 0."""
    torch = sys.modules.get("torch")
    c10d = getattr(getattr(torch, "_C", None), "_distributed_c10d", None)
    found = {}
    if hasattr(c10d, "_dump_nccl_trace") and torch.cuda.is_initialized():
        found["nccl_rank_{rank}"] = c10d._dump_nccl_trace()
    if hasattr(c10d, "_dump_fr_trace_json"):
        found["gloo_rank_{rank}.json"] = c10d._dump_fr_trace_json()
    return {name: trace for name, trace in found.items() if b"entries" in trace}
