"""The moving average of the language model in every layout, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from landiff.launchers.cli import main
from landiff.model_zoo import registry
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader
from landiff.model_zoo.convert.formats.megatron import write_megatron_config
from landiff.model_zoo.convert.formats.megatron_optimizer import MASTERS
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.lm.checkpoints import evaluate, fresh, save
from tests.training.lm.samples import tiny_batch, tiny_config

PREFIX = "optimizer.state.ema."
EMA = {"decay": 0.9, "every": 2, "from_step": 7}
KEPT = 0.9**2
STEPS = 20
DISTRIBUTED = {"distributed_optimizer": True, "overlap": True}
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "tensor 2": ({"tensor": 2, "sequence": True}, "bf16"),
    "pipeline 2": ({"pipeline": 2}, "fp32"),
    "data 2": (DISTRIBUTED, "bf16"),
    "data 2, fp32": (DISTRIBUTED, "fp32"),
}
# saved as, loaded as: only the distributed optimizer loads what the distributed optimizer has saved
MOVES = [
    ("tensor 2", "tensor 2"),
    ("pipeline 2", "pipeline 2"),
    ("data 2", "data 2"),
    ("data 2", "tensor 2, distributed"),
]
LOADERS = {
    **LAYOUTS,
    "tensor 2, distributed": ({"tensor": 2, **DISTRIBUTED}, "bf16"),
    "one": ({}, "fp32"),
    "one, distributed": (DISTRIBUTED, "fp32"),
}
MOVES_TO_ONE = [("pipeline 2", "one"), ("data 2, fp32", "one, distributed")]


def config_of(folder: Path, layout: str) -> LMTrainConfig:
    parallel, precision = LOADERS[layout]
    data = {"global_batch_size": 2, "micro_batch_size": 1}
    return tiny_config(folder, parallel, precision=precision, data=data, ema=EMA)


def step(engine: MegatronEngine, number: int) -> None:
    engine.train_step(tiny_batch(engine.config, number, engine.dp_rank, engine.dp_size))


def train(engine: MegatronEngine) -> list[torch.Tensor]:
    """Trains, and averages this rank's master weights as docs/training.md says."""
    average: list[torch.Tensor] = []
    for number in range(STEPS):
        step(engine, number)
        masters = [weight.detach().clone() for weight in engine.ema.weights]
        if number + 1 <= EMA["from_step"]:
            average = masters
        elif (number + 1) % EMA["every"] == 0:
            pairs = zip(average, masters, strict=True)
            average = [KEPT * old + (1 - KEPT) * new for old, new in pairs]
    return average


def averages_in(folder: Path, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    reader = DistReader(folder)
    keys = [key for key in reader.entries if key.startswith(prefix)]
    return {key.removeprefix(prefix): reader.read(key) for key in keys}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def copied(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.local_weights()}


def train_all(world: Any, folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for layout in LAYOUTS:
        engine = MegatronEngine(config_of(folder, layout))
        expected = train(engine)
        pairs = zip(engine.ema.averages, expected, strict=True)
        differences = [float((ours - theirs).abs().max()) for ours, theirs in pairs]
        save(engine, folder / layout)
        before = copied(engine)
        with engine.weights(True):
            inside = copied(engine)
            evaluated = evaluate(engine)
        with engine.weights(False):
            after = copied(engine)
            raw = evaluate(engine)
        found[layout] = {
            "difference": max(differences, default=0.0),
            "restored": equal(before, after),
            "evaluated": evaluated,
            "differs": evaluated != raw and not equal(inside, after),
        }
        step(engine, STEPS)
        with engine.weights(True):
            pass  # directly after a step, when `overlap` has not gathered the weights yet
        step(engine, STEPS + 1)
        save(engine, folder / f"{layout}, next")
        engine.close()
    return found


def resume_all(world: Any, folder: Path, moves: list[tuple[str, str]]) -> list[float]:
    """Loads, saves and goes on without entering the context. Returns losses under the average."""
    found = []
    for saved, layout in moves:
        engine = fresh(config_of(folder, layout))
        engine.load(folder / saved)
        save(engine, folder / f"{saved} to {layout}")
        with engine.weights(True):
            found.append(evaluate(engine))
        engine.close()
        engine = fresh(config_of(folder, layout))
        engine.load(folder / saved)
        step(engine, STEPS)
        step(engine, STEPS + 1)
        save(engine, folder / f"{saved} to {layout}, next")
        engine.close()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("ema")
    found = run_distributed(train_all, 2, folder, timeout_s=600)
    [losses, _] = run_distributed(resume_all, 2, folder, MOVES, timeout_s=600)
    [single] = run_distributed(resume_all, 1, folder, MOVES_TO_ONE, timeout_s=600)
    return folder, found, dict(zip([*MOVES, *MOVES_TO_ONE], [*losses, *single], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_equals_a_plain_reference_over_20_steps(trained, layout):
    for rank in trained[1]:
        # float32 rounding of weights below 2
        assert rank[layout]["difference"] < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_passes_read_it_inside_the_context_only(trained, layout):
    for rank in trained[1]:
        assert rank[layout]["restored"]
        assert rank[layout]["differs"]


@pytest.mark.parametrize("move", [*MOVES, *MOVES_TO_ONE], ids=" to ".join)
def test_checkpoints_keep_it_exactly_in_every_layout(trained, move):
    folder, found, losses = trained
    saved, layout = move
    before = averages_in(folder / saved)
    assert len(before) > 10
    assert before.keys() == averages_in(folder / saved, "optimizer.state.exp_avg.").keys()
    assert equal(averages_in(folder / f"{saved} to {layout}"), before)
    # float32 sums in another order; bfloat16 has 8 bits
    tolerance = 1e-5 if LOADERS[layout][1] == "fp32" else 5e-3
    assert losses[move] == pytest.approx(found[0][saved]["evaluated"], rel=tolerance)


@pytest.mark.parametrize("move", [move for move in MOVES if move[0] == move[1]], ids=" to ".join)
def test_resume_is_bit_equal_to_a_run_that_has_entered_the_context(trained, move):
    folder, _, _ = trained
    straight = averages_in(folder / f"{move[0]}, next", "")
    assert equal(averages_in(folder / f"{move[0]} to {move[1]}, next", ""), straight)


DIRECT = {  # names of weights that both have in one shape -> Megatron's
    "final_norm.weight": "decoder.final_layernorm.weight",
    "blocks.1.w2.weight": "decoder.layers.1.mlp.linear_fc2.weight",
    "micro.frames.fc0.weight": "micro.frames.fc0.weight",
}


@pytest.mark.parametrize("layout", ["tensor 2", "data 2"])
def test_a_conversion_takes_it_unless_told_otherwise(trained, tmp_path, capsys, layout):
    saved = trained[0] / layout
    write_megatron_config(saved, config_of(tmp_path, layout).model)
    averages = averages_in(saved)
    raw = averages_in(saved, f"optimizer.state.{MASTERS[layout == 'data 2']}.")
    for words, kind, expected in (([], "ema", averages), (["--weights", "raw"], "raw", raw)):
        zoo = tmp_path / kind
        assert main(["convert", str(saved), "--zoo", str(zoo), "--name", "it", *words]) == 0
        assert ("moving average" in capsys.readouterr().out) == (kind == "ema")
        entry = registry.resolve(zoo, "it")
        assert entry.provenance["weights"] == kind
        weights = entry.load()
        for ours, theirs in DIRECT.items():
            assert torch.equal(weights[ours], expected[theirs]), ours


def test_a_checkpoint_is_converted_with_it_and_the_optimizer(trained, tmp_path):
    saved = trained[0] / "data 2"
    write_megatron_config(saved, config_of(tmp_path, "data 2").model)
    words = ["convert", str(saved), "--to", "megatron", "--out", str(tmp_path / "out")]
    assert main([*words, "parallel.distributed_optimizer=false"]) == 0
    assert equal(averages_in(tmp_path / "out"), averages_in(saved))
