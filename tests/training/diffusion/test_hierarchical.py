"""Hierarchical ZeRO: weights are gathered from a copy that neighboring ranks hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest
import torch

from landiff.configs import ConfigError
from landiff.training.diffusion import zero
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.engine import DeepSpeedEngine, build_engine
from landiff.training.diffusion.zero_settings import deepspeed_config
from landiff.training.distributed import World
from landiff.training.layout import check_batch
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.diffusion.tiny import batch, config, make_zoo
from tests.training.toy import alone

BEFORE, AFTER = 2, 1  # steps, around a save


def settings(folder: Path, hpz: int) -> DiffusionTrainConfig:
    """Two micro-batches on four ranks. Some parameters are small enough not to be partitioned."""
    return config(
        folder,
        "control",
        zero__stage=3,
        zero__hpz_partition_size=hpz,
        zero__parameter_persistence_threshold=40,
        data__global_batch_size=8,
        data__micro_batch_size=1,
        ema__decay=0.5,
    )


def go(engine: DeepSpeedEngine, world: World, first: int, steps: int) -> list[tuple[float, ...]]:
    """(loss, gradient norm, loss with averaged weights) of some steps."""
    found = []
    for step in range(first, first + steps):
        samples = batch(engine.config, step, world)
        result = engine.train_step(samples)
        inputs = engine.objective.at(samples).inputs(list(samples.micro_batches[0]))
        engine.zero.eval()
        with torch.no_grad(), engine.weights(ema=True):
            averaged = engine.objective.loss(engine.zero, inputs).loss
        found.append((float(result.loss), float(result.grad_norm), float(averaged)))
    return found


def weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {name: zero.read_full(p) for name, p in engine.module.named_parameters()}


def train(world: World, folder: Path) -> dict[str, Any]:
    """Curves and weights without and with copies; the last steps again from the checkpoint."""
    flat = build_engine(settings(folder, 1), world)
    found: dict[str, Any] = {"flat": go(flat, world, 0, BEFORE)}
    place = folder / "saved"
    if world.rank == 0:
        place.mkdir()
    world.barrier()
    saving.save(flat, place)
    world.barrier()
    found["flat"] += go(flat, world, BEFORE, AFTER)
    found["flat weights"] = weights(flat)
    copies = build_engine(settings(folder, 2), world)
    found["copies"] = go(copies, world, 0, BEFORE + AFTER)
    found["copies weights"] = weights(copies)
    shares = set()
    for parameter in copies.module.parameters():
        copy = getattr(parameter, "ds_secondary_tensor", None)
        if copy is not None and not parameter.requires_grad:
            shares.add(round(copy.numel() / parameter.ds_numel, 1))
    found["shares"] = shares
    copies.load(place)
    found["again"] = go(copies, world, BEFORE, AFTER)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hierarchical")
    make_zoo(folder)
    return run_distributed(train, 4, folder)


def test_losses_and_weights_are_those_without_copies(ranks):
    for rank in ranks:
        assert rank["copies"] == rank["flat"]
        assert len(set(rank["flat"])) == BEFORE + AFTER
        for name, tensor in rank["flat weights"].items():
            assert torch.equal(rank["copies weights"][name], tensor), name


def test_a_checkpoint_replaces_the_copies(ranks):
    for rank in ranks:
        assert rank["again"] == rank["flat"][BEFORE:]


def test_a_rank_keeps_its_part_of_a_copy_of_frozen_weights(ranks):
    for rank in ranks:
        assert rank["shares"] == {0.5}


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"hpz_partition_size = 2 needs zero.stage = 3"):
        config(tmp_path, zero__stage=2, zero__hpz_partition_size=2)
    three = settings(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"hpz_partition_size = 3 does not divide .* 3 or 6"):
        check_batch(three, 4)
    assert check_batch(three, 2) == 4
    with pytest.raises(ConfigError, match="set it to 4"):
        deepspeed_config(three, replace(alone(), size=12, local_size=4))
    optimization = deepspeed_config(three, replace(alone(), size=12, local_size=6))
    assert optimization["zero_optimization"]["zero_hpz_partition_size"] == 3
    optimization = deepspeed_config(three, replace(alone(), size=3, local_size=3))
    assert "zero_hpz_partition_size" not in optimization["zero_optimization"]
