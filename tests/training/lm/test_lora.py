"""LoRA adapters of the language model: trained and saved in any layout, equal to peft's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel

from landiff.configs import ConfigError
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader
from landiff.model_zoo.convert.formats.megatron import EMA_PREFIX
from landiff.model_zoo.convert.known_formats import Options, open_source
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.lora.base import apply_adapter
from landiff.model_zoo.lora.config import AdapterConfig
from landiff.model_zoo.lora.parts import merged as merged_parts
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.engine import MegatronEngine
from landiff.training.lm.model import InitialWeights
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.lm.samples import evaluate, plain_loss, tiny_batch, tiny_config

LORA = {"rank": 4, "alpha": 8.0, "targets": ["wqkv", "wo", "w1", "w3", "w2"]}
SHIPPED = {"tensor": 2, "sequence": True, "distributed_optimizer": True, "overlap": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2": {"parallel": {"tensor": 2}},
    "tensor 2, sequence, recompute": {
        "parallel": {"tensor": 2, "sequence": True},
        "recompute": True,
    },
    "pipeline 2": {"parallel": {"pipeline": 2}},
    "data 2, distributed optimizer": {"parallel": {"distributed_optimizer": True, "overlap": True}},
    "shipped": {"parallel": SHIPPED, "precision": "bf16", "ema": {"decay": 0.5}},
}
BEFORE, AFTER = 3, 2  # steps, around the save


def lora_config(folder: Path, lora: Any = LORA, **changes: Any) -> LMTrainConfig:
    return tiny_config(folder, init_from="base", lora=lora, **changes)


def steps(engine: MegatronEngine, first: int, count: int) -> list[tuple[float, float]]:
    found = []
    for step in range(first, first + count):
        batch = tiny_batch(engine.config, step, engine.dp_rank, engine.dp_size)
        result = engine.train_step(batch)
        found.append((float(result.loss), float(result.grad_norm)))
    return found


def evaluated(engine: MegatronEngine) -> float:
    return evaluate(engine, tiny_batch(engine.config, 9, engine.dp_rank, engine.dp_size))


def make_folder(folder: Path) -> Path:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    return folder


def train(config: LMTrainConfig, folder: Path) -> dict[str, Any]:
    """Trains, saves and trains on; then resumes."""
    plain = MegatronEngine(config.model_copy(update={"lora": None}))
    base = evaluated(plain)
    plain.close()
    engine = MegatronEngine(config)
    found: dict[str, Any] = {"base": base, "start": evaluated(engine)}
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in engine.model.named_parameters()
        if not parameter.requires_grad
    }
    found["before"] = steps(engine, 0, BEFORE)
    saving.save(engine, make_folder(folder))
    dist.barrier()
    found["evaluated"] = evaluated(engine)
    found["after"] = steps(engine, BEFORE, AFTER)
    parameters = dict(engine.model.named_parameters())
    found["frozen"] = all(torch.equal(parameters[name], frozen[name]) for name in frozen)
    engine.close()
    found["resumed"] = resume(config, folder)
    return found


def resume(config: LMTrainConfig, folder: Path) -> list[tuple[float, float]]:
    engine = MegatronEngine(config)
    engine.load(folder)
    found = steps(engine, BEFORE, AFTER)
    engine.close()
    return found


def one_process(world: Any, folder: Path) -> dict[str, Any]:
    config = lora_config(folder)
    found = train(config, folder / "one")
    other = lora_config(folder, LORA | {"rank": 2})
    engine = MegatronEngine(other)
    with pytest.raises(ConfigError, match=r"holds another adapter \(stored.rank = 4"):
        engine.load(folder / "one")
    engine.close()
    return found


def two_processes(world: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, options in LAYOUTS.items():
        found[name] = train(lora_config(folder, **options), folder / name)
    moved = LAYOUTS["tensor 2, sequence, recompute"]
    found["moved"] = resume(lora_config(folder, **moved), folder / "one")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    model = tiny_config(folder).model
    registry.export(folder / "zoo", "base", "lm", model, dict(InitialWeights(model, 5)), {})
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run_distributed(one_process, 1, folder)[0]


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    return run_distributed(two_processes, 2, folder)[0]


def test_training_starts_at_the_loss_of_the_base_and_leaves_it_unchanged(one, two):
    for found in (one, *(two[name] for name in LAYOUTS)):
        assert found["start"] == found["base"]  # B = 0: the update adds exact zeros
        assert found["evaluated"] < found["base"] and found["frozen"]


def test_a_resumed_run_is_bit_equal(one, two):
    for found in (one, *(two[name] for name in LAYOUTS)):
        assert found["resumed"] == found["after"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_one_process(one, two, layout):
    # float32 sums in another order, through AdamW steps; bfloat16 has 8 bits
    tolerance = 5e-3 if layout == "shipped" else 2e-5
    found = two[layout]
    for ours, theirs in zip(
        found["before"] + found["after"], one["before"] + one["after"], strict=True
    ):
        assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
        assert ours[1] == pytest.approx(theirs[1], rel=10 * tolerance)


def test_only_the_adapter_has_moments_and_moving_averages(folder, two):
    """The shipped precision, with all options."""
    entries = DistReader(folder / "shipped").entries
    for prefix in ("optimizer.state.exp_avg.", EMA_PREFIX):
        names = [name for name in entries if name.startswith(prefix)]
        assert len(names) == 2 * 4 * 2, names  # A and B of four layers of Megatron in two blocks
        assert all(name.endswith((".lora_A", ".lora_B")) for name in names)


@pytest.fixture(scope="module")
def adapter(folder: Path, one: dict[str, Any]) -> registry.ZooEntry:
    """The adapter of the run in one process, exported to the zoo."""
    models = ModelConfig(lm=tiny_config(folder).model)  # a run stores it in the checkpoint
    (part,) = open_source(folder / "one", Options(models)).parts
    config = part.config_as(AdapterConfig)
    return registry.export(folder / "zoo", "adapter", "adapter", config, part.tensors, {})


def base_model(folder: Path) -> LanguageModel:
    model = registry.load_model(registry.resolve(folder / "zoo", "base"))
    assert isinstance(model, LanguageModel)
    return model


def test_an_exported_adapter_gives_the_loss_of_the_run_merged_or_not(folder, one, adapter):
    config = lora_config(folder).model_copy(update={"text_dropout": 0.0})  # as in `evaluate`
    batch = tiny_batch(config, 9)
    kept, merged = base_model(folder), base_model(folder)
    apply_adapter(kept, adapter, name="a", scale=1.0, merged=False)
    apply_adapter(merged, adapter, name="a", scale=1.0, merged=True)
    losses = [float(plain_loss(model, batch, config)) for model in (kept, merged)]
    # float32: (W + s B A) x and W x + s B (A x) are rounded at other places
    assert losses == pytest.approx([one["evaluated"]] * 2, rel=2e-6)
    assert set(merged.state_dict()) == set(base_model(folder).state_dict())
    off = base_model(folder)
    apply_adapter(off, adapter, name="a", scale=0.0, merged=True)
    for name, tensor in base_model(folder).state_dict().items():
        assert torch.equal(off.state_dict()[name], tensor), name


def test_peft_loads_the_folder_of_an_entry(folder, adapter):
    model = PeftModel.from_pretrained(base_model(folder), str(adapter.path))
    kept = base_model(folder)
    apply_adapter(kept, adapter, name="default", scale=1.0, merged=False)
    expected = kept.state_dict()
    for name, tensor in model.base_model.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_conversion_merges_an_adapter_into_its_base_only(folder, adapter):
    base = registry.resolve(folder / "zoo", "base")
    sources = [open_source(entry.path).parts[0] for entry in (base, adapter)]
    (whole,) = merged_parts(sources)
    model = base_model(folder)
    apply_adapter(model, adapter, name="a", scale=1.0, merged=True)
    for name, tensor in model.state_dict().items():
        # one rounding of s B A, which is computed in another order
        torch.testing.assert_close(whole.tensors[name], tensor, rtol=0, atol=1e-7, msg=name)
    other = base_model(folder)
    other.head.weight.data[0, 0] += 1
    stranger = registry.export(
        folder / "zoo", "stranger", "lm", other.config, other.state_dict(), {}
    )
    with pytest.raises(ConfigError, match=f"with fingerprint {base.fingerprint}, and the sources"):
        merged_parts([open_source(stranger.path).parts[0], sources[1]])


def test_a_checkpoint_moves_to_another_layout(one, two):
    for ours, theirs in zip(two["moved"], one["after"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=2e-5)
