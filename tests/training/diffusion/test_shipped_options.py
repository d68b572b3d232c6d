"""The packaged options at tiny size: checkpoints hold the last weights and resume bit-equal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest
import torch

from landiff.configs import load
from landiff.model_zoo.convert.formats.deepspeed import (
    CLASSES,
    SHARDS,
    START,
    add_frozen,
    frozen_file,
    read_deepspeed,
)
from landiff.model_zoo.convert.lazy import Stored
from landiff.model_zoo.convert.pickles import read_pickle
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.engine import DeepSpeedEngine, build_engine
from landiff.training.distributed import World
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.diffusion.tiny import batch, config, make_zoo

NAMES = [
    "landiff/diffusion-main",
    "landiff/diffusion-control",
    "nano/diffusion-main",
    "nano/diffusion-control",
]
STEPS = 2  # before the checkpoint; one more follows
# tiny, or of the machine
KEPT = {
    "run",
    "zoo",
    "data",
    "loop",
    "model",
    "text_column",
    "init_from",
    "tokenizer",
    "prefix",
    "preview_codec",
}


@dataclass(frozen=True)
class Found:
    """(loss, gradient norm) of the step after the checkpoint."""

    straight: tuple[float, float]
    resumed: tuple[float, float]


def shipped_config(folder: Path, name: str) -> DiffusionTrainConfig:
    """The options of a packaged config with the tiny model and data."""
    shipped = load(DiffusionTrainConfig, name)
    fields = [key for key in DiffusionTrainConfig.model_fields if key not in KEPT]
    update = {key: getattr(shipped, key) for key in fields}
    # Compiled blocks have tests of their own; this one needs no compiler.
    return config(folder, shipped.phase).model_copy(update=update | {"compile_blocks": False})


def train(engine: DeepSpeedEngine, world: World, first: int, end: int) -> tuple[float, float]:
    """Steps `first` to `end` - 1 -> (loss, gradient norm) of the last one."""
    for step in range(first, end):
        result = engine.train_step(batch(engine.config, step, world))
    return float(result.loss), float(result.grad_norm)


def save(engine: DeepSpeedEngine, world: World, folder: Path) -> None:
    if world.rank == 0:
        folder.mkdir(parents=True)
    world.barrier()
    saving.save(engine, folder)
    world.barrier()


def save_and_resume(world: World, folder: Path) -> dict[str, Found]:
    """For every name write before, and a step later after (trained on) and resumed (loaded)."""
    found = {}
    for name in NAMES:
        settings, place = shipped_config(folder, name), folder / name
        engine = build_engine(settings, world)
        train(engine, world, 0, STEPS)
        save(engine, world, place / "before")
        straight = train(engine, world, STEPS, STEPS + 1)
        save(engine, world, place / "after")
        other = settings.model_copy(update={"loop": settings.loop.model_copy(update={"seed": 4})})
        engine = build_engine(other, world)  # from other weights
        engine.load(place / "before")
        engine.objective.config = engine.config = settings
        resumed = train(engine, world, STEPS, STEPS + 1)
        save(engine, world, place / "resumed")
        found[name] = Found(straight, resumed)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Found]]]:
    folder = tmp_path_factory.mktemp("shipped")
    make_zoo(folder)
    return folder, run_distributed(save_and_resume, 2, folder)


def working_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the module of a ZeRO 1 or 2 checkpoint computes with."""
    path = folder / SHARDS / START
    model = read_pickle(path, CLASSES)
    if frozen_file(path).exists():
        add_frozen(model, read_pickle(frozen_file(path), CLASSES))
    module = model["module"]
    return {name: stored.read() for name, stored in module.items() if isinstance(stored, Stored)}


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_cast_masters(trained, name):
    folder, _ = trained
    for step in ("before", "after"):
        state = read_deepspeed(folder / name / step / SHARDS)
        weights = working_weights(folder / name / step)
        assert weights.keys() == state.weights.keys() and state.trainable
        for key, weight in weights.items():
            assert torch.equal(state.weights[key].to(weight.dtype), weight), key


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_equal(trained, name):
    folder, ranks = trained
    for found in ranks:
        assert found[name].resumed == found[name].straight
    before, after, resumed = (
        read_deepspeed(folder / name / step / SHARDS) for step in ("before", "after", "resumed")
    )
    parts = [(after.weights, resumed.weights)]
    parts += [(after.moments[key], resumed.moments[key]) for key in after.moments]
    for expected, other in parts:
        assert expected.keys() == other.keys()
        for key in expected:
            assert torch.equal(other[key], expected[key]), key
    assert any(not torch.equal(before.weights[key], after.weights[key]) for key in after.trainable)
