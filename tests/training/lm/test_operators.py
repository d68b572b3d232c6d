"""The number of operators of a training step, and what it reads on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from landiff.training.distributed import World
from landiff.training.guard import Guard
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.lm.samples import tiny_batch, tiny_config
from tests.training.operators import READ, CountedOperators

STEPS = 4  # the first one has operators of its own, such as those that create Adam's moments
CASES: dict[str, dict[str, Any]] = {
    "two layers": {},
    "three layers": {"model": {"num_layers": 3}},
    "four micro-batches": {"data": {"micro_batch_size": 1}},
    "average": {"ema": {"decay": 0.9}},
    "bf16": {"precision": "bf16"},
}
OPERATORS = {
    "two layers": 1596,
    "three layers": 2059,
    "four micro-batches": 2840,
    "average": 1597,
    "bf16": 1785,
}
TOLERANCE = 0.02  # rows of other lengths take a few operators more or less
SAMPLES = 4


def operators_of_steps(world: World, folder: Path) -> dict[str, list[tuple[int, dict[str, int]]]]:
    """By case: operators and scalar reads by function of each step after the first."""
    found: dict[str, list[tuple[int, dict[str, int]]]] = {}
    for name, changes in CASES.items():
        config = tiny_config(folder, optim={"fused": True}, **changes)
        engine = MegatronEngine(config, Guard(config.loop, world))
        found[name] = []
        for step in range(STEPS):
            with CountedOperators() as operators:
                engine.train_step(tiny_batch(config, step))
            if step > 0:
                assert operators.by_name[READ] == operators.readers.total()
                found[name].append((operators.by_name.total(), dict(operators.readers)))
        engine.close()
    return found


@pytest.fixture(scope="module")
def counted(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[tuple[int, dict[str, int]]]]:
    return run_distributed(operators_of_steps, 1, tmp_path_factory.mktemp("operators"))[0]


def test_the_number_of_operators_is_fixed_and_does_not_grow_with_the_step(counted):
    for name, steps in counted.items():
        counts = [count for count, _ in steps]
        assert counts == pytest.approx([OPERATORS[name]] * (STEPS - 1), rel=TOLERANCE), name


def test_a_step_reads_the_same_scalars_for_any_model_and_batch(counted):
    # Text dropout is drawn on the host, once for each sample. Loss, norm and counts are read once
    # a step, by the engine and in Megatron-core's norm. Rows are packed, and the norm is computed,
    # under the function mode of `landiff.training.lm.device`.
    expected = {"train_step": 2, "__torch_function__": 3 + SAMPLES}
    for name, steps in counted.items():
        assert [reads for _, reads in steps] == [expected] * (STEPS - 1), name
