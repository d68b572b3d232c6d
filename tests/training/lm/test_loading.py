"""A rank of the distributed optimizer reads its part of a checkpoint, written in any layout."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest

from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader
from landiff.model_zoo.convert.formats.megatron_optimizer import STATE
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.device import megatron_device  # noqa: F401 - imports Megatron once
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.lm.checkpoints import fresh, save, train
from tests.training.lm.samples import tiny_config

RANKS = 2


def settings(folder: Path) -> LMTrainConfig:
    """Large enough that tensors take more than the headers of their files."""
    return tiny_config(
        folder,
        {"distributed_optimizer": True},
        precision="bf16",
        ema={"decay": 0.5},
        model={"hidden_size": 256, "ffn_size": 768},
    )


def bytes_read() -> int:
    """Bytes that this process has read with system calls."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("/proc/self/io has no rchar")


def train_and_save(world: Any, folder: Path) -> tuple[float, float]:
    """A checkpoint after one step. -> (loss, gradient norm) of the next step."""
    engine = MegatronEngine(settings(folder))
    train(engine, 0, 1)
    save(engine, folder / f"of-{world.size}")
    found = train(engine, 1, 2)
    engine.close()
    return found


def load(world: Any, folder: Path) -> dict[Any, Any]:
    """By size of the world that wrote a checkpoint: bytes read, and the step after it."""
    found: dict[Any, Any] = {"straight": train_and_save(world, folder)}
    for size in (1, RANKS):
        engine = fresh(settings(folder))
        before = bytes_read()
        engine.load(folder / f"of-{size}")
        count = bytes_read() - before
        found[size] = (count, train(engine, 1, 2))
        engine.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loading")


def test_a_rank_reads_its_part_of_optimizer_and_averages_and_no_weights(folder):
    [alone] = run_distributed(train_and_save, 1, folder)
    for found in run_distributed(load, RANKS, folder):
        for size in (1, RANKS):
            reader = DistReader(folder / f"of-{size}")
            state = 0
            for key, entry in reader.entries.items():
                if key.startswith(STATE):
                    state += prod(entry.size) * entry.properties.dtype.itemsize
            assert len(list((folder / f"of-{size}").glob("__*.distcp"))) == size
            # Headers and metadata are some percent. Whole weights would be an eighth.
            assert state / RANKS < found[size][0] < 0.56 * state
        assert found[RANKS][1] == found["straight"]
        # bfloat16 gradients of two ranks are summed in another order than those of one.
        assert found[1][1] == pytest.approx(alone, rel=1e-3)
