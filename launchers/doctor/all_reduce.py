"""Bandwidth check of `landiff doctor`: a rank of an all-reduce, on one machine or on several nodes.

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
NCCL_ELEMENTS = 64 << 20  # of float32
GLOO_ELEMENTS = 1 << 20


def main() -> None:
    """All-reduce a tensor; rank 0 prints one line. Raises RuntimeError if the sum is wrong."""
    follow_parent()
    with distributed.start(timeout_s=120.0) as world:
        elements = NCCL_ELEMENTS if world.backend == "nccl" else GLOO_ELEMENTS
        values = torch.full((elements,), float(world.rank + 1), device=world.device)
        expected = world.size * (world.size + 1) / 2
        dist.all_reduce(values)
        if not bool((values == expected).all()):
            raise RuntimeError(
                f"rank {world.rank}: an all-reduce of {world.size} ranks gave "
                f"{values[0].item()} instead of {expected}"
            )
        started = time.perf_counter()
        for _ in range(REPEATS):
            dist.all_reduce(values)
        if world.backend == "nccl":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / REPEATS
        size = elements * values.element_size()
        moved = 2 * (world.size - 1) / world.size * size  # bytes over the link of each rank
        if world.rank == 0:
            sys.stdout.write(
                f"{world.backend}, {world.size} ranks, {size >> 20} MiB: "
                f"{moved / seconds / 1e9:.2f} GB/s bus bandwidth, {seconds * 1000:.1f} ms\n"
            )


if __name__ == "__main__":
    main()
