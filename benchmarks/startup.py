"""Start of a trainer over many ranks, on the CPU: seconds by part and number of ranks.

    python -m benchmarks.startup --ranks 1 2 4 8 16

Ranks are forked from a process that has imported everything, since imports take equally long for
any number of ranks. They share the cores, so wall times grow with their number even if no rank does
more: rely on the CPU seconds of a rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks import lm
from benchmarks.support.models import load_preset
from landiff.launchers.results.sampling.processes import free_port
from landiff.training import distributed
from landiff.training.guard import Guard
from landiff.training.lm.engine import MegatronEngine

PARTS = ("process groups", "model", "first step", "second step")
TEXT_LENGTH = 8


def start_rank(folder: Path) -> list[tuple[float, float]]:
    """Starts a rank, trains two steps. Returns CPU and wall seconds by part."""
    marks = [(time.process_time(), time.perf_counter())]

    def mark() -> None:
        marks.append((time.process_time(), time.perf_counter()))

    with distributed.start() as world:
        world.barrier()
        mark()
        sizes = load_preset("nano").lm.model_copy(update={"num_layers": 1})
        config = lm.train_config(sizes, folder, 1, "fp32")
        data = config.data.model_copy(update={"global_batch_size": world.size})
        config = config.model_copy(update={"data": data})
        engine = MegatronEngine(config, Guard(config.loop, world))
        world.barrier()
        mark()
        batch = lm.make_batch(config, TEXT_LENGTH)
        for _ in range(2):
            engine.train_step(batch)
            mark()
        engine.close()
    found = []
    for (cpu, wall), (next_cpu, next_wall) in itertools.pairwise(marks):
        found.append((next_cpu - cpu, next_wall - wall))
    return found


def start(ranks: int, folder: Path) -> list[list[tuple[float, float]]]:
    """`start_rank` in processes that are forked from this one. Returns their results."""
    port = free_port()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            variables |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in variables.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
            code = 1
            try:
                (folder / f"{rank}.json").write_text(json.dumps(start_rank(folder)))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"a rank of {ranks} has failed")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    header = "".join(f"{part:>24}" for part in PARTS)
    print(f"{'ranks':>5}{header}   (CPU ms of a rank, wall s of the slowest)")
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            found = start(ranks, Path(folder))
        cells = []
        for part in range(len(PARTS)):
            cpu = sum(rank[part][0] for rank in found) / ranks
            wall = max(rank[part][1] for rank in found)
            cells.append(f"{cpu * 1000:>14.0f} {wall:>7.2f} s")
        print(f"{ranks:>5}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
