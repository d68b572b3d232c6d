"""`landiff doctor`'s bandwidth check: one rank of a few, on one machine or on all nodes of an allocation.

torchrun --nproc-per-node=8 -m landiff.launchers.doctor.all_reduce
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from landiff.launchers.local.children import follow_parent
from landiff.training import distributed

REPEATS = 5


def main() -> None:
    """Rank 0 prints one line. A wrong sum is an error on all ranks."""
    follow_parent()
    with distributed.start(timeout_s=120.0) as world:
        elements = (64 << 20) if world.backend == "nccl" else (1 << 20)  # float32
        values = torch.full((elements,), float(world.rank + 1), device=world.device)
        expected = world.size * (world.size + 1) / 2
        dist.all_reduce(values)
        if not bool((values == expected).all()):
            raise RuntimeError(
                f"rank {world.rank}: an all-reduce of {world.size} ranks gave {values[0].item()} instead of {expected}"
            )
        started = time.perf_counter()
        for _ in range(REPEATS):
            dist.all_reduce(values)
        if world.backend == "nccl":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / REPEATS
        moved = (
            2 * (world.size - 1) / world.size * values.numel() * 4
        )  # bytes over each rank's link
        if world.rank == 0:
            sys.stdout.write(
                f"{world.backend}, {world.size} ranks, {values.numel() * 4 >> 20} MiB: {moved / seconds / 1e9:.2f} GB/s bus bandwidth, {seconds * 1000:.1f} ms\n"
            )


if __name__ == "__main__":
    main()
