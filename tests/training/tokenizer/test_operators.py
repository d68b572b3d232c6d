"""The number of operators of a training step, and what it reads on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from landiff.training.distributed import World
from landiff.training.tokenizer.engine import TokenizerEngine
from tests.distributed import run_distributed
from tests.training.host_reads import counted_host_reads
from tests.training.operators import READ, CountedOperators
from tests.training.tokenizer.tiny import batch, config

COUNTED_STEPS = (1, 2, 5)
# Of the model of tests/training/tokenizer/tiny.py.
OPERATORS_OF_MICRO_BATCH = 1096
OTHER_OPERATORS = 106
TOLERANCE = 0.02


def operators_of_steps(world: World, folder: Path) -> dict[int, list[tuple[int, int, Any]]]:
    """By number of micro-batches: operators, scalar reads and reads by function of some steps."""
    found: dict[int, list[tuple[int, int, Any]]] = {}
    for number in (1, 2):
        data = {"manifest": "unused", "global_batch_size": 8, "micro_batch_size": 8 // number}
        optim = {"lr": 3e-3, "warmup_steps": 5, "fused": True}
        engine = TokenizerEngine(config(folder, data=data, optim=optim), world)
        found[number] = []
        for step in range(COUNTED_STEPS[-1] + 1):
            with CountedOperators() as operators, counted_host_reads("_features") as reads:
                engine.train_step(batch(step, micro_batches=number))
            if step in COUNTED_STEPS:
                count = operators.by_name.total()
                found[number].append((count, operators.by_name[READ], dict(reads)))
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[tuple[int, int, Any]]]:
    folder = tmp_path_factory.mktemp("operators")
    return run_distributed(operators_of_steps, 1, folder)[0]


def test_the_number_of_operators_is_fixed_and_does_not_grow_with_the_step(counted):
    for number, steps in counted.items():
        expected = OTHER_OPERATORS + number * OPERATORS_OF_MICRO_BATCH
        counts = [count for count, _, _ in steps]
        assert counts == pytest.approx([expected] * len(COUNTED_STEPS), rel=TOLERANCE)


def test_a_step_reads_only_loss_and_norm_and_both_at_once(counted):
    for number, steps in counted.items():
        for _, scalars, reads in steps:
            assert reads == {"read_scalars": 1}
            # On the CPU, one_hot looks for the smallest and the largest index.
            assert scalars == 2 * number
