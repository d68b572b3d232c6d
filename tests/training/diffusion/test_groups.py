"""Parameter groups of the diffusion model: updates, and checkpoints of other groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest
import torch

from landiff.model_zoo.convert.formats.deepspeed import ZeroLayout, export_diffusion, read_deepspeed
from landiff.training.checks import check_groups
from landiff.training.diffusion import zero
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.engine import build_engine
from landiff.training.diffusion.model import build_phase_model, load_tokenizer, trained_names
from landiff.training.diffusion.step import Objective
from landiff.training.optim import clip_gradients, rate_of_step
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.diffusion.tiny import batch, config, make_zoo

STEPS = 2
DECAY = 0.5
GROUPS = [
    {"match": "control.input.time_*", "weight_decay_scale": 0},
    {"match": "control.projections.*"},
    {"match": "control.*", "lr_scale": 0.1},
]
OTHER_SCALES = [*GROUPS[:2], {"match": "control.*", "lr_scale": 0.2}]
LAYOUTS = [(3, "fp32"), (2, "bf16")]


def config_of(
    folder: Path, stage: int, precision: str, groups: list[dict[str, Any]], **changes: Any
) -> DiffusionTrainConfig:
    return config(
        folder,
        "control",
        zero__stage=stage,
        precision=precision,
        data__global_batch_size=2,
        data__micro_batch_size=1,
        ema="{decay: 0.9}",
        optim__weight_decay=DECAY,
        optim__groups=json.dumps(groups),
        phases=json.dumps([{"from_step": 1, "optim": {"lr": 1e-3}}]),
    )


def step(engine: Any, world: Any, number: int) -> tuple[float, float, list[torch.Tensor]]:
    """Loss, gradient norm, and this rank's float32 weights after the step."""
    result = engine.train_step(batch(engine.config, number, world))
    masters = [master.detach().clone() for master in zero.master_weights(engine.zero)]
    return float(result.loss), float(result.grad_norm), masters


def save(engine: Any, world: Any, folder: Path) -> None:
    if world.rank == 0:
        folder.mkdir(parents=True)
    world.barrier()
    saving.save(engine, folder)
    world.barrier()


def train_layouts(world: Any, folder: Path) -> dict[Any, dict[str, Any]]:
    """Each layout: steps with groups, a save, a step, and the same step from the file.

    And the file loaded with other scales and without groups, saved again, and loaded with groups.
    """
    found: dict[Any, dict[str, Any]] = {}
    for layout in LAYOUTS:
        place = folder / "-".join(map(str, layout))
        engine = build_engine(config_of(folder, *layout, GROUPS), world)
        step(engine, world, 0)
        step(engine, world, 1)
        save(engine, world, place / "before")
        results: dict[str, Any] = {"straight": step(engine, world, STEPS)}
        for name, groups in (("scales", OTHER_SCALES), ("none", [])):
            engine = build_engine(config_of(folder, *layout, groups), world)
            engine.load(place / "before")
            results[name] = {group["lr_scale"] for group in engine.zero.optimizer.param_groups}
            save(engine, world, place / name)
        engine = build_engine(config_of(folder, *layout, GROUPS), world)
        for name in ("before", "scales", "none"):
            engine.load(place / name)
            results[f"from {name}"] = step(engine, world, STEPS)
        found[layout] = results
    return found


def plain(folder: Path) -> dict[str, torch.Tensor]:
    """Weights after the same steps without DeepSpeed, with a group for each tensor."""
    settings = config_of(folder, 1, "fp32", [])
    model = build_phase_model(settings)
    device = torch.device("cpu")
    objective = Objective(settings, device, load_tokenizer(settings, device))
    scales = []
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = 1.0
        decay = DECAY if parameter.ndim >= 2 else 0.0
        if name.startswith("control.input.time_"):
            decay = 0.0
        elif name.startswith("control.") and not name.startswith("control.projections."):
            rate = 0.1
        scales.append(rate)
        groups.append({"params": [parameter], "weight_decay": decay})
    optim = settings.optim
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    for step in range(STEPS):
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = scale * rate_of_step(settings, step)
        optimizer.zero_grad()
        part = batch(settings, step)
        inputs = objective.at(part).inputs(list(part.samples))
        objective.loss(model, inputs).loss.backward()
        clip_gradients(model.parameters(), optim.clip_grad)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("groups")
    make_zoo(folder)
    return folder, run_distributed(train_layouts, 2, folder, timeout_s=300)[0]


def test_groups_are_those_of_a_plain_adamw(trained):
    folder, _ = trained
    _, _, weights = export_diffusion(folder / "3-fp32" / "before")
    for name, expected in plain(folder).items():
        # two orders of the same sums in float32; a wrong scale moves weights by 1e-4 or more
        torch.testing.assert_close(weights[name], expected, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_resumes_bit_equal_also_after_a_time_without_groups(trained, layout):
    results = trained[1][layout]
    loss, norm, masters = results["straight"]
    for name in ("before", "scales", "none"):
        assert results[f"from {name}"][:2] == (loss, norm)
        for found, expected in zip(results[f"from {name}"][2], masters, strict=True):
            assert torch.equal(found, expected)
    # The settings of the run apply, not those of the file.
    assert (results["scales"], results["none"]) == ({0.2, 1.0}, {1.0})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_moments_and_averages_do_not_depend_on_the_groups(trained, layout):
    folder = trained[0] / "-".join(map(str, layout))
    before = read_deepspeed(folder / "before" / "zero")
    assert len(before.groups) == len(ZeroLayout.read(folder / "before").groups) == 4
    assert ZeroLayout.read(folder / "none").groups == []
    state = read_deepspeed(folder / "none" / "zero")
    assert (state.trainable, state.optimizer_steps) == (before.trainable, STEPS)
    for name, tensor in before.weights.items():
        assert torch.equal(state.weights[name], tensor), name
    assert state.moments.keys() == before.moments.keys() == {"exp_avg", "exp_avg_sq", "ema"}
    for moment, tensors in before.moments.items():
        for name, tensor in tensors.items():
            assert torch.equal(state.moments[moment][name], tensor), (moment, name)


def test_frozen_and_unknown_names_are_refused(tmp_path):
    groups = [{"match": "transformer.*"}, {"match": "control.block.*"}, {"match": "control.*"}]
    groups.append({"match": "control.blocks.*"})
    settings = config_of(tmp_path, 1, "fp32", groups)
    found = [str(problem) for problem in check_groups(settings.optim, trained_names(settings))]
    assert len(found) == 3
    assert "groups.0.match = transformer.* matches no parameter that is trained" in found[0]
    assert "did you mean 'control.blocks.*." in found[1]
    assert "groups.3.match = control.blocks.* matches only parameters of entries before" in found[2]
