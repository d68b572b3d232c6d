"""LoRA adapters of the diffusion model: trained in every ZeRO stage, exported, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import peft  # noqa: F401 - the same
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn

from landiff.configs import ConfigError
from landiff.model_zoo import registry
from landiff.model_zoo.config import DiffusionConfig
from landiff.model_zoo.convert.formats.diffusers_transformer import (
    OUTPUT_NORM_EPS,
    RULES,
    diffusers_config,
)
from landiff.model_zoo.convert.known_formats import open_source, write_target
from landiff.model_zoo.convert.parts import MAIN
from landiff.model_zoo.convert.rules import apply_rules
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.lora.base import apply_adapter, base_fingerprint
from landiff.model_zoo.lora.config import AdapterConfig
from landiff.model_zoo.lora.files import DIFFUSERS_FILE
from landiff.model_zoo.lora.parts import merged as merged_parts
from landiff.training.checks import Launch
from landiff.training.diffusion.checks import check
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.engine import DeepSpeedEngine, build_engine
from landiff.training.diffusion.model import load_tokenizer
from landiff.training.diffusion.step import Objective
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.diffusion.tiny import MODEL, batch, config, make_zoo

STAGES = (1, 2, 3)
BEFORE, AFTER = 2, 2  # steps, around the save
LORA = {"lora__rank": 4, "lora__alpha": 8}


def lora_config(folder: Path, phase: str, **changes: Any) -> DiffusionTrainConfig:
    targets = {"lora__targets": "[modulation, qkv, out, mlp_in, mlp_out]"}
    return config(folder, phase, **{"init_from": "whole", **LORA, **targets, **changes})


def steps(engine: DeepSpeedEngine, world: Any, first: int, count: int) -> list[float]:
    found = []
    for step in range(first, first + count):
        found.append(float(engine.train_step(batch(engine.config, step, world)).loss))
    return found


def train(world: Any, settings: DiffusionTrainConfig, folder: Path) -> dict[str, Any]:
    engine = build_engine(settings, world)
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in names) and names
    found: dict[str, Any] = {"before": steps(engine, world, 0, BEFORE)}
    if world.rank == 0:
        folder.mkdir(parents=True)
    world.barrier()
    saving.save(engine, folder)
    world.barrier()
    found["after"] = steps(engine, world, BEFORE, AFTER)
    found["resumed"] = resume(world, settings, folder)
    return found


def resume(world: Any, settings: DiffusionTrainConfig, folder: Path) -> list[float]:
    engine = build_engine(settings, world)
    engine.load(folder)
    return steps(engine, world, BEFORE, AFTER)


def all_stages(world: Any, folder: Path) -> dict[Any, Any]:
    """Both phases in all stages, and a move of each to another stage; bfloat16 in stage 3."""
    found: dict[Any, Any] = {}
    for phase in ("main", "control"):
        for stage in STAGES:
            name = f"{phase}-{stage}-{world.size}"
            settings = lora_config(folder, phase, zero__stage=stage)
            found[phase, stage] = train(world, settings, folder / name)
        settings = lora_config(folder, phase, zero__stage=1)
        found[phase, "moved"] = resume(world, settings, folder / f"{phase}-3-{world.size}")
    settings = lora_config(folder, "main", zero__stage=3, precision="bf16", ema__decay=0.5)
    found["bf16"] = train(world, settings, folder / "bf16")
    plain = build_engine(config(folder, "main", init_from="whole"), world)
    found["base"] = steps(plain, world, 0, 1)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    make_zoo(folder)
    model = DiffusionConfig.model_validate(MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = registry.build_module("diffusion", model).state_dict()
        state = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in state.items()}
    registry.export(folder / "zoo", "whole", "diffusion", model, state, {})
    main = {
        name.removeprefix(MAIN): tensor for name, tensor in state.items() if name.startswith(MAIN)
    }
    registry.export(folder / "zoo", "same-main", "transformer", model.transformer, main, {})
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[Any, Any]:
    return run_distributed(all_stages, 2, folder)[0]


def test_training_starts_at_the_loss_of_the_base(found):
    for stage in STAGES:
        # B = 0 adds exact zeros; stages reduce the losses of both ranks in one order
        assert found["main", stage]["before"][0] == found["base"][0]


@pytest.mark.parametrize("phase", ["main", "control"])
def test_every_stage_learns_the_same_and_resumes_bit_for_bit(found, phase):
    first = found[phase, 1]
    for stage in STAGES:
        trained = found[phase, stage]
        assert trained["resumed"] == trained["after"]
        # float32 sums in another order
        assert trained["after"] == pytest.approx(first["after"], rel=1e-5)
    assert found[phase, "moved"] == pytest.approx(first["after"], rel=1e-5)
    assert found["bf16"]["resumed"] == found["bf16"]["after"]


def entry_of(folder: Path, phase: str) -> registry.ZooEntry:
    """The adapter in a ZeRO-3 checkpoint, exported."""
    (part,) = open_source(folder / f"{phase}-3-2").parts
    adapter = part.config_as(AdapterConfig)
    return registry.export(folder / "zoo", f"lora-{phase}", "adapter", adapter, part.tensors, {})


def whole_model(folder: Path) -> ControlledDiffusion:
    model = registry.load_model(registry.resolve(folder / "zoo", "whole"))
    assert isinstance(model, ControlledDiffusion)
    return model


def mean_loss(folder: Path, phase: str, model: nn.Module) -> float:
    """Loss of global batch number BEFORE."""
    settings = lora_config(folder, phase)
    device = torch.device("cpu")
    objective = Objective(settings, device, load_tokenizer(settings, device))
    losses = []
    with torch.no_grad():
        for samples in batch(settings, BEFORE).micro_batches:
            losses.append(objective.loss(model, objective.inputs(samples)).loss)
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("phase", ["main", "control"])
def test_an_exported_adapter_gives_the_loss_of_the_run_merged_or_not(folder, found, phase):
    adapter = entry_of(folder, phase)
    losses = []
    for merged in (False, True):
        model = whole_model(folder)
        apply_adapter(model, adapter, name="a", scale=1.0, merged=merged)
        trained = model.transformer if phase == "main" else model
        losses.append(mean_loss(folder, phase, trained))
    # float32: (W + s B A) x and W x + s B (A x) are rounded at other places
    assert losses == pytest.approx([found[phase, 3]["after"][0]] * 2, rel=5e-6)


def test_an_adapter_of_the_main_transformer_fits_it_alone_and_in_a_whole_model(folder, found):
    adapter = entry_of(folder, "main")
    config = adapter.config
    assert isinstance(config, AdapterConfig) and config.base_kind == "transformer"
    for name in ("whole", "same-main"):
        entry = registry.resolve(folder / "zoo", name)
        assert base_fingerprint(entry, "transformer") == config.base
    whole = open_source(registry.resolve(folder / "zoo", "whole").path).parts[0]
    (merged,) = merged_parts([whole, open_source(adapter.path).parts[0]])
    model = whole_model(folder)
    apply_adapter(model, adapter, name="a", scale=1.0, merged=True)
    for name, tensor in model.state_dict().items():
        # one rounding of s B A, which is computed in another order
        torch.testing.assert_close(merged.tensors[name], tensor, rtol=0, atol=1e-7, msg=name)


def test_diffusers_loads_an_adapter_of_the_main_transformer(folder, found, tmp_path):
    adapter = entry_of(folder, "main")
    write_target(tmp_path / "out", "diffusers", open_source(adapter.path).parts, {})
    ours = whole_model(folder).transformer
    theirs = CogVideoXTransformer3DModel(**diffusers_config(ours.config)).eval()
    theirs.load_state_dict(apply_rules(ours.state_dict(), RULES, "to_theirs"))
    theirs.norm_out.norm.eps = OUTPUT_NORM_EPS
    theirs.load_lora_adapter(
        str(tmp_path / "out"), prefix="transformer", weight_name=DIFFUSERS_FILE
    )
    apply_adapter(ours, adapter, name="a", scale=1.0, merged=False)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 48, 4, 4, generator=draw)
    text = torch.randn(2, 3, 6, generator=draw)
    timestep = torch.tensor([1, 900])
    with torch.no_grad():
        expected = ours(latents, timestep, text)
        computed = theirs(latents, text, timestep, return_dict=False)[0]
    torch.testing.assert_close(computed, expected, rtol=0, atol=2e-5)  # float32, other kernels


def test_an_adapter_of_a_control_branch_needs_a_trained_one(folder):
    settings = lora_config(folder, "control", init_from="main")
    text = "\n".join(str(problem) for problem in check(settings, Launch(2)))
    assert "init_from = main is a transformer; name an entry of kind diffusion" in text
    with pytest.raises(ConfigError, match="lora needs init_from"):
        config(folder, "main", **LORA)
