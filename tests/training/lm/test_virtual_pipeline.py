"""Chunks of layers per pipeline stage: the same training, validation and checkpoints as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from landiff.configs import ConfigError
from landiff.training.checks import Launch
from landiff.training.lm.checks import check, check_rows
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.lm.checkpoints import assert_equal, fresh, save, tensors_of
from tests.training.lm.samples import steps, tiny_config, tiny_sample
from tests.training.toy import validation_metrics

VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
DIVIDED = {"distributed_optimizer": True}
ONE: dict[str, dict[str, Any]] = {"one": {}, "one, distributed optimizer": DIVIDED}
TWO: dict[str, dict[str, Any]] = {
    "pipeline 2": {"pipeline": 2},
    "virtual 2": VIRTUAL,
    "virtual 2, overlap": VIRTUAL | {"overlap": True},
    "virtual 2, distributed optimizer": VIRTUAL | DIVIDED | {"overlap": True},
    "pipeline 2, distributed optimizer": {"pipeline": 2} | DIVIDED,
}
MOVES = [  # saved as, loaded as
    ("one", "virtual 2"),
    ("pipeline 2", "virtual 2"),
    ("virtual 2", "virtual 2"),
    ("virtual 2", "pipeline 2"),
    ("virtual 2", "one"),
    ("one, distributed optimizer", "virtual 2, distributed optimizer"),
    ("virtual 2, distributed optimizer", "pipeline 2, distributed optimizer"),
    ("virtual 2, distributed optimizer", "one, distributed optimizer"),
]


def config_of(folder: Path, layout: str, **changes: Any) -> LMTrainConfig:
    """Four layers, four rows in each step, and a moving average."""
    changes = {
        "model": {"num_layers": 4},
        "data": {"global_batch_size": 8},
        "ema": {"decay": 0.9},
        "optim": {"groups": [{"match": "blocks.3.*", "lr_scale": 0.5}]},
        **changes,
    }
    return tiny_config(folder, {**ONE, **TWO}[layout], **changes)


def held_out(engine: MegatronEngine) -> dict[str, float]:
    """Metrics of three clips, also of tokens that are sampled for them."""
    samples = [tiny_sample(engine.config, 1000 + number, number) for number in range(3)]
    return validation_metrics(engine, samples, engine.dp_rank, engine.dp_size, 1)


def train(_: Any, folder: Path, layouts: list[str]) -> dict[str, Any]:
    """Per layout: numbers of four steps and of validation. Checkpoints after steps 1 and 3."""
    found = {}
    for layout in layouts:
        engine = MegatronEngine(config_of(folder, layout))
        numbers = steps(engine, 0, 1)
        save(engine, folder / layout / "first")
        numbers += steps(engine, 1, 3)
        save(engine, folder / layout / "third")
        with engine.weights(ema=True):
            evaluated = held_out(engine)
        found[layout] = {"steps": numbers + steps(engine, 3, 4), "evaluated": evaluated}
        engine.close()
    return found


def move(_: Any, folder: Path, moves: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Loads checkpoints in other layouts, writes them again, and trains on."""
    found = {}
    for saved, loaded in moves:
        engine = fresh(config_of(folder, loaded))
        engine.load(folder / saved / "third")
        save(engine, folder / f"{saved} as {loaded}")
        found[saved, loaded] = steps(engine, 3, 4)
        engine.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("virtual")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    found = run_distributed(train, 1, folder, list(ONE))[0]
    first, second = run_distributed(train, 2, folder, list(TWO))
    for layout in TWO:
        assert second[layout]["steps"] == first[layout]["steps"]  # whatever the stage
    return found | first


@pytest.fixture(scope="module")
def moved(folder: Path, trained: dict[str, Any]) -> dict[tuple[str, str], Any]:
    alone = [pair for pair in MOVES if pair[1] in ONE]
    found = run_distributed(move, 1, folder, alone)[0]
    return found | run_distributed(move, 2, folder, [pair for pair in MOVES if pair[1] in TWO])[0]


@pytest.mark.parametrize("layout", TWO)
def test_every_layout_trains_and_validates_as_one_process(trained, layout):
    for numbers, expected in zip(trained[layout]["steps"], trained["one"]["steps"], strict=True):
        assert numbers == pytest.approx(expected, abs=1e-5)
    assert trained[layout]["evaluated"] == pytest.approx(trained["one"]["evaluated"], abs=1e-5)


@pytest.mark.parametrize("layout", TWO)
def test_gradients_of_all_weights_are_those_of_one_process(folder, trained, layout):
    """Adam's first moment after one step is the gradient times 1 - beta1."""
    expected = tensors_of(folder / "one" / "first")
    found = tensors_of(folder / layout / "first")
    moments = [key for key in expected if ".exp_avg." in key]
    assert len(moments) > 20
    for key in moments:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize(("saved", "loaded"), MOVES)
def test_checkpoints_move_bit_for_bit(folder, trained, moved, saved, loaded):
    before = tensors_of(folder / saved / "third")
    assert_equal(tensors_of(folder / f"{saved} as {loaded}"), before)
    assert any(key.startswith("optimizer.state.ema.") for key in before)
    straight = trained[saved]["steps"][3:]
    if saved == loaded:
        assert moved[saved, loaded] == straight
    assert moved[saved, loaded][0] == pytest.approx(straight[0], abs=1e-5)


def train_rows_of(_: Any, folder: Path, changes: dict[str, Any]) -> list[tuple[float, float]]:
    """Numbers of two steps with a virtual pipeline and other options."""
    engine = MegatronEngine(config_of(folder, "virtual 2", **changes))
    found = steps(engine, 0, 2)
    engine.close()
    return found


@pytest.mark.long
def test_recomputation_changes_nothing(folder, trained):
    numbers = run_distributed(train_rows_of, 2, folder, {"recompute": True})[0]
    assert numbers == trained["virtual 2"]["steps"][:2]


def test_layers_that_the_chunks_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"num_layers = 6 is not a multiple of .* = 2 \* 2 = 4"):
        config_of(tmp_path, "virtual 2", model={"num_layers": 6})


def test_chunks_without_pipeline_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="virtual_pipeline = 2 divides .* pipeline is 1"):
        tiny_config(tmp_path, {"virtual_pipeline": 2}, model={"num_layers": 4})


def test_a_number_of_rows_that_the_schedule_refuses_is_an_error_before_the_start(tmp_path):
    config = config_of(tmp_path, "virtual 2", data={"global_batch_size": 6})  # of two clips a row
    (problem,) = check_rows(config, 2)
    assert "from step 0 on there are 3" in str(problem)
    assert "multiple of 4" in str(problem)
    assert str(problem) in map(str, check(config, Launch(2, inputs_exist=False)))
    assert check_rows(config_of(tmp_path, "virtual 2"), 2) == []
