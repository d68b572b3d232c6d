"""The language model trainer with `fp8`: losses, layouts, checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from landiff.configs import ConfigError
from landiff.model_zoo.convert.formats.megatron import read_lm
from landiff.training.lm.checks import check
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.engine import MegatronEngine
from landiff.training.lm.layers import Float8ColumnLinear, Float8RowLinear
from landiff.training.lm.model import InitialWeights
from tests.distributed import run_distributed, run_on_gpus
from tests.quantize_package import add_torchao, assert_missing_torchao_is_named
from tests.training import saving
from tests.training.lm.samples import steps, tiny_config

STEPS = 6
BEFORE = 4  # steps before a checkpoint
MODEL = {"hidden_size": 64, "ffn_size": 96}  # 16 divides them, with two tensor-parallel ranks too
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "sequence": {"tensor": 2, "sequence": True},
    "context": {"context": 2},
    "data": {"distributed_optimizer": True, "overlap": True},
}


def config_of(folder: Path, parallel: dict[str, Any] | None = None, **changes: Any):
    values = {"fp8": True, "precision": "bf16", "ema": {"decay": 0.5}, "model": MODEL, **changes}
    return tiny_config(folder, parallel, loop={"steps": STEPS, "seed": 7}, **values)


def train(config: LMTrainConfig) -> list[tuple[float, float]]:
    engine = MegatronEngine(config)
    found = steps(engine, 0, STEPS)
    engine.close()
    return found


def one_layer(folder: Path, *, compiled: bool) -> list[tuple[float, float]]:
    """Two steps of a model of one layer."""
    config = config_of(folder, model={**MODEL, "num_layers": 1})
    engine = MegatronEngine(config)
    if compiled:
        engine.model.compile_blocks(backend="aot_eager")
    found = steps(engine, 0, 2)
    engine.close()
    return found


def described(engine: MegatronEngine) -> dict[str, tuple]:
    """Shapes and dtypes of this rank's weights, master weights and averages, by name."""
    return {name: (tuple(x.shape), x.dtype) for name, x in engine.local_weights()}


def float8_layers(engine: MegatronEngine) -> list[str]:
    kinds = (Float8ColumnLinear, Float8RowLinear)
    return [name for name, module in engine.model.named_modules() if isinstance(module, kinds)]


def resumed(config: LMTrainConfig, folder: Path) -> list[tuple[float, float]]:
    engine = MegatronEngine(config)
    engine.load_weights(InitialWeights(config.model, 99))  # all must come from the file
    engine.load(folder)
    found = steps(engine, BEFORE, STEPS)
    engine.close()
    return found


def checkpoints(folder: Path) -> dict[str, Any]:
    """A checkpoint before the first step and one after some, with and without fp8."""
    found: dict[str, Any] = {}
    for fp8 in (True, False):
        config = config_of(folder, fp8=fp8)
        engine = MegatronEngine(config)
        found[f"described {fp8}"] = described(engine)
        saving.save(engine, folder / f"first {fp8}")
        curve = steps(engine, 0, BEFORE)
        saving.save(engine, folder / f"later {fp8}")
        found["fp8" if fp8 else "bf16"] = curve + steps(engine, BEFORE, STEPS)
        found[f"layers {fp8}"] = float8_layers(engine)
        engine.close()
    for fp8 in (True, False):
        found[f"resumed {fp8}"] = resumed(config_of(folder, fp8=fp8), folder / "later True")
    return found


def one_process(world: Any, folder: Path) -> dict[str, Any]:
    add_torchao()
    return {
        "recompute": train(config_of(folder, recompute=True)),
        "eager": one_layer(folder, compiled=False),
        "compiled": one_layer(folder, compiled=True),
        **checkpoints(folder),
    }


def two_processes(world: Any, folder: Path) -> dict[str, Any]:
    add_torchao()
    return {name: train(config_of(folder, layout)) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("float8")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return run_distributed(one_process, 1, folder, timeout_s=400)[0]


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_distributed(two_processes, 2, folder)


def losses(curve: list[tuple[float, float]]) -> list[float]:
    return [loss for loss, _ in curve]


def norms(curve: list[tuple[float, float]]) -> list[float]:
    return [norm for _, norm in curve]


def test_all_linear_layers_of_blocks_and_no_others_multiply_in_float8(found):
    names = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1")
    expected = []
    for layer in range(2):
        expected += [f"decoder.layers.{layer}.{name}" for name in (*names, "mlp.linear_fc2")]
    assert found["layers True"] == expected
    assert found["layers False"] == []


def test_training_follows_bfloat16(found):
    """Products err by 4 to 6 %, in random directions: sums over many of them err less."""
    assert found["bf16"][0][0] - found["bf16"][-1][0] > 0.15
    assert losses(found["fp8"]) == pytest.approx(losses(found["bf16"]), abs=0.01)
    assert norms(found["fp8"]) == pytest.approx(norms(found["bf16"]), rel=0.05)
    assert found["fp8"][0] != found["bf16"][0]


def test_scales_are_the_same_however_a_layer_is_computed(found):
    assert found["recompute"] == found["fp8"]
    assert found["compiled"] == found["eager"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_differ_by_rounding(found, ranks, layout):
    """Ranks scale their parts of weights and activations, so that these are rounded otherwise."""
    assert ranks[0][layout] == ranks[1][layout]
    assert losses(ranks[0][layout]) == pytest.approx(losses(found["fp8"]), abs=0.01)
    assert norms(ranks[0][layout]) == pytest.approx(norms(found["fp8"]), rel=0.05)


def test_checkpoints_are_those_without_fp8(found, folder):
    """Before the first step in every bit, later in all names, shapes and dtypes."""
    assert found["described True"] == found["described False"]
    first = folder / "first True"
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) > 3
    for name in names:
        same = folder / "first False" / name
        assert (first / name).read_bytes() == same.read_bytes(), name
    entries = []
    for fp8 in (True, False):
        reader = FileSystemReader(folder / f"later {fp8}")
        entries.append(reader.read_metadata().state_dict_metadata)
    assert entries[0] == entries[1] and len(entries[0]) > 50
    config = config_of(folder).model
    exported = [read_lm(folder / f"later {fp8}", config) for fp8 in (True, False)]
    assert exported[0].meta.keys() == exported[1].meta.keys()


def test_runs_resume_with_and_without_fp8(found):
    """A checkpoint is a start for both: bit for bit with the setting that wrote it."""
    assert found["resumed True"] == found["fp8"][BEFORE:]
    assert losses(found["resumed False"]) == pytest.approx(losses(found["fp8"][BEFORE:]), abs=0.01)
    assert found["resumed False"] != found["resumed True"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layers": "te"}, "fp8 = true has no layers of Transformer Engine .*use layers = local"),
        ({"init_from": "lm", "lora": {}}, r"fp8 = true has no adapters \(lora\); set fp8 = false"),
        ({"model": {"hidden_size": 40}}, "model.hidden_size = 40 is not; change it, or set fp8 ="),
        (
            {"model": {"ffn_size": 80, "hidden_size": 64}, "parallel": {"tensor": 2}},
            "multiples of 16, and model.ffn_size / parallel.tensor = 40 is not",
        ),
        (
            {"model": {"hidden_size": 96, "num_heads": 12}, "parallel": {"tensor": 4}},
            "the width of all heads / parallel.tensor = 24 is not",
        ),
    ],
)
def test_what_float8_cannot_multiply_is_refused_in_the_config(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        tiny_config(tmp_path, **{"fp8": True, "model": MODEL, **changes})


def test_a_missing_torchao_is_named_before_ranks_start(tmp_path):
    assert_missing_torchao_is_named(check, config_of(tmp_path), config_of(tmp_path, fp8=False))


def two_steps(world: Any, folder: Path, fp8: bool) -> list[tuple[float, float]]:
    add_torchao()
    config = config_of(folder, fp8=fp8)
    engine = MegatronEngine(config)
    found = steps(engine, 0, 2)
    engine.close()
    return found


@pytest.mark.gpu
def test_a_gpu_trains_as_in_bfloat16(tmp_path):
    assert torch.cuda.is_available()
    fp8, bf16 = (run_on_gpus(two_steps, 1, tmp_path, each)[0] for each in (True, False))
    assert losses(fp8) == pytest.approx(losses(bf16), abs=0.01)
    assert norms(fp8) == pytest.approx(norms(bf16), rel=0.05)
    assert fp8 != bf16
