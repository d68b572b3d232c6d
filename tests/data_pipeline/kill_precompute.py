"""Kill precompute tasks or a reading trainer inside writes, fsyncs, renames, locks and reads.

    python -m tests.data_pipeline.kill_precompute precompute WORK KILLS SEED
    python -m tests.data_pipeline.kill_precompute captions WORK KILLS SEED
    python -m tests.data_pipeline.kill_precompute loader WORK KILLS SEED

Both run in forks of this process, so that a kill costs a fraction of a second. Four tasks share one
folder, and three of four have a planned kill. Prints the number of kills.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from landiff.configs.files import remove_abandoned, write_text
from landiff.configs.loader import load
from landiff.configs.ownership import OwnedError
from landiff.data_pipeline.format.schema import RAW
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.precompute import commands as precompute
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from tests.data_pipeline.data_sets import write_column, write_raw
from tests.data_pipeline.ingest_helpers import contents
from tests.data_pipeline.kills import Killer, forked, killed
from tests.data_pipeline.precompute_data import write_clips
from tests.model_zoo.frozen.tiny_vlm import write_qwen

TASKS = 4
COLUMNS = {
    "latents": {"encoder": {"kind": "dct"}},
    "latents-second": {"encoder": {"kind": "dct"}, "sample_seed": 1},
}
LARGEST_PLAN = {"precompute": 160, "captions": 80, "loader": 220}


def started(plan: int, work: Callable[[], None]) -> int:
    """`work` in a fork; its process id."""

    def prepare(killer: Killer) -> None:
        killer.watch(os, "fsync", "replace", "unlink", "preadv")
        killer.watch(fcntl, "flock")
        killer.watch_tars()

    return forked(work, Killer(plan), prepare)


# -------------------------------------------------------------------------------------- precompute


def one_task(config: PrecomputeConfig, number: int) -> None:
    with suppress(OwnedError):  # of two processes that make one unit
        precompute.run(config, task=(number, TASKS))


def captions_columns(work: Path) -> dict[str, object]:
    """A column that a vision-language model writes."""
    from landiff.model_zoo.frozen import vlm  # once, for all forks

    assert vlm
    model = work / "model"
    model.mkdir()
    assert not killed(started(0, lambda: write_qwen(model)))
    prompts = [{"text": "a bird", "max_tokens": 6}, {"text": "runs {caption}", "max_tokens": 3}]
    encoder = {"kind": "vlm", "path": str(model), "frames": 2, "prompts": prompts}
    return {"captions-qwen": {"encoder": encoder}}


def kill_tasks(
    work: Path, kills: int, draw: random.Random, what: str, columns: dict[str, object]
) -> int:
    raw = work / "raw-shards"
    write_clips(raw, [2, 1, 2, 0, 1, 2])
    config = {
        name: load(
            PrecomputeConfig,
            {
                "data": work / name,
                "zoo": work / "zoo",
                "columns": columns,
                "device": "cpu",
                "batch_size": 1,
                "decode_threads": 1,
                "encode_threads": 2,
            },
        )
        for name in ("expected", "data")
    }
    shutil.copytree(raw, work / "expected")
    for number in range(TASKS):
        assert not killed(started(0, lambda number=number: one_task(config["expected"], number)))
    assert not killed(started(0, lambda: precompute.finalize(config["expected"])))
    expected, done = contents(work / "expected"), 0
    while done < kills:
        shutil.copytree(raw, work / "data")
        ended = False
        while not ended:
            plans = [0] * TASKS
            for number in range(TASKS):
                if done < kills and draw.random() < 0.75:
                    plans[number] = draw.randrange(2, LARGEST_PLAN[what])
            # sometimes with a duplicate of task 0
            numbers = [0, 1, 2, 3] if draw.random() < 0.7 else [0, 1, 2, 3, 0]
            pids = [
                started(plan, lambda number=number: one_task(config["data"], number))
                for number, plan in zip(numbers, [*plans, 0], strict=False)
            ]
            deaths = sum([killed(pid) for pid in pids])
            done += deaths
            if not deaths:
                ended = not killed(
                    started(
                        draw.randrange(2, 20) if done < kills else 0,
                        lambda: precompute.finalize(config["data"]),
                    )
                )
                done += not ended
        assert contents(work / "data") == expected, (
            "the result of killed processes differs from that of others"
        )
        shutil.rmtree(work / "data")
    return done


# ------------------------------------------------------------------------------ a trainer's loader


def train(data: Path, run: Path, steps: int) -> None:
    """Take batches, write what came, and save the state every other step, as a trainer does."""
    run.mkdir(exist_ok=True)
    remove_abandoned(run)
    config = DataConfig(
        manifest=data, global_batch_size=5, shuffle_window=2, seed=3, checksum=True, read_threads=2
    )
    with Loader(config, ["tokens"], dp_rank=0, dp_size=1) as loader:
        seen: list[list[str]] = []
        if (run / "state.json").exists():
            state = json.loads((run / "state.json").read_text())
            seen = state["seen"]
            loader.load_state_dict(state["loader"])
        while len(seen) < steps:
            seen.append([sample.key for sample in loader.next_batch().samples])
            if len(seen) % 2 == 0 or len(seen) == steps:
                write_text(
                    run / "state.json", json.dumps({"seen": seen, "loader": loader.state_dict()})
                )


def kill_trainers(work: Path, kills: int, draw: random.Random) -> int:
    write_raw(work / "data", [6, 5, 7, 2])
    write_column(work / "data", "tokens")
    steps, done = 12, 0  # 60 samples: three epochs of 20
    assert not killed(started(0, lambda: train(work / "data", work / "expected", steps)))
    expected = contents(work / "expected")
    keys = []
    for step in json.loads((work / "expected" / "state.json").read_text())["seen"]:
        keys += step
    assert all(len(set(keys[at : at + 20])) == 20 for at in (0, 20, 40)), (
        "each sample once an epoch"
    )
    while done < kills:
        while killed(
            started(
                draw.randrange(2, LARGEST_PLAN["loader"]) if done < kills else 0,
                lambda: train(work / "data", work / "run", steps),
            )
        ):
            done += 1
        assert contents(work / "run") == expected, (
            "the result of killed processes differs from that of others"
        )
        shutil.rmtree(work / "run")
    return done


def main(what: str, work: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    draw, folder = random.Random(int(seed)), Path(work)
    if what == "loader":
        print(kill_trainers(folder, int(kills), draw))
        return
    columns = captions_columns(folder) if what == "captions" else COLUMNS
    done = kill_tasks(folder, int(kills), draw, what, columns)
    assert read_manifest(folder / "expected").columns.keys() == columns.keys()
    assert (folder / "expected" / RAW).is_dir()
    print(done)


if __name__ == "__main__":
    main(*sys.argv[1:])
