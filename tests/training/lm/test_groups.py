"""Parameter groups of the language model: updates, and checkpoints of other groups."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from landiff.model_zoo.convert.formats.megatron import read_lm
from landiff.model_zoo.lm import LanguageModel
from landiff.training.lm.checks import check_parameter_groups
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.engine import MegatronEngine
from landiff.training.lm.model import InitialWeights
from landiff.training.optim import clip_gradients, rate_of_step
from tests.distributed import run_distributed
from tests.training.lm.checkpoints import (
    assert_equal,
    assert_weights_are_cast_masters,
    fresh,
    save,
    tensors_of,
    train,
)
from tests.training.lm.samples import plain_loss, tiny_batch, tiny_config

STEPS = 3
DECAY = 0.5
GROUPS = [
    {"match": "token_embedding.*", "weight_decay_scale": 0},
    {"match": "blocks.0.*", "lr_scale": 0.1},
    {"match": "head.*", "lr_scale": 2, "weight_decay_scale": 0.5},
]
PHASE = {"from_step": 2, "optim": {"lr": 1e-3}}
DISTRIBUTED = {"distributed_optimizer": True, "overlap": True}
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline 2": ({"pipeline": 2}, "fp32"),  # a stage without an embedding
    "data 2, bf16": (DISTRIBUTED, "bf16"),
    "tensor 2, bf16": ({"tensor": 2}, "bf16"),
}


def config_of(folder: Path, layout: str, groups: list[dict[str, Any]]) -> LMTrainConfig:
    parallel, precision = LAYOUTS[layout]
    optim = {"lr": 3e-3, "weight_decay": DECAY, "groups": groups}
    return tiny_config(folder, parallel, precision=precision, optim=optim, phases=[PHASE])


def train_layouts(world: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Each layout: steps with groups, a save, a step, and the same step from the file.

    And the file loaded without groups, saved again, and loaded with groups.
    """
    found: dict[str, dict[str, Any]] = {}
    for layout in LAYOUTS:
        place = folder / layout
        engine = MegatronEngine(config_of(folder, layout, GROUPS))
        train(engine, 0, STEPS)
        save(engine, place / "before")
        results = {"straight": train(engine, STEPS, STEPS + 1)}
        save(engine, place / "after")
        engine.close()
        engine = fresh(config_of(folder, layout, []))
        engine.load(place / "before")
        save(engine, place / "none")
        engine.close()
        engine = fresh(config_of(folder, layout, GROUPS))
        for name in ("before", "none"):
            engine.load(place / name)
            results[name] = train(engine, STEPS, STEPS + 1)
            save(engine, place / f"after {name}")
        engine.close()
        found[layout] = results
    return found


def plain(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the plain model after the same steps, with a group for each tensor."""
    config = config_of(folder, "pipeline 2", [])
    model = LanguageModel(config.model)
    model.load_state_dict(InitialWeights(config.model, config.loop.seed))
    scales = []
    groups = []
    for name, parameter in model.named_parameters():
        rate = 0.1 if name.startswith("blocks.0.") else 1.0
        decay = DECAY if parameter.ndim >= 2 else 0.0
        if name.startswith("head."):
            rate, decay = 2.0, DECAY / 2
        elif name.startswith("token_embedding."):
            decay = 0.0
        scales.append(rate)
        groups.append({"params": [parameter], "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    for step in range(STEPS):
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = scale * rate_of_step(config, step)
        optimizer.zero_grad()
        plain_loss(model, tiny_batch(config, step), config).backward()
        clip_gradients(model.parameters(), config.optim.clip_grad)
        optimizer.step()
    return model.state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("groups")
    return folder, run_distributed(train_layouts, 2, folder, timeout_s=300)


def test_groups_are_those_of_a_plain_adamw(trained):
    folder, _ = trained
    weights = read_lm(folder / "pipeline 2" / "before", config_of(folder, "pipeline 2", []).model)
    for name, expected in plain(folder).items():
        # Adam divides by the size of the gradient, so rounding moves weights of tiny gradients:
        # one of them by 1.6e-5. A wrong scale moves the largest of a tensor by 1e-4 or more.
        torch.testing.assert_close(weights[name], expected, atol=3e-5, rtol=0, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_resumes_bit_equal_also_after_a_time_without_groups(trained, layout):
    folder, ranks = trained
    for results in ranks:
        assert results[layout]["before"] == results[layout]["straight"]
        assert results[layout]["none"] == results[layout]["straight"]
    before = tensors_of(folder / layout / "before")
    assert_weights_are_cast_masters(before)
    assert_equal(tensors_of(folder / layout / "none"), before)
    after = tensors_of(folder / layout / "after")
    assert_equal(tensors_of(folder / layout / "after before"), after)
    assert_equal(tensors_of(folder / layout / "after none"), after)


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("blocks.*.wq.weight", r"groups\.0\.match = blocks\.\*\.wq.* did you mean 'blocks\.\*\.w"),
        ("blocks.*.w1.*", "w1.weight and blocks.0.w3.weight are one tensor"),
    ],
)
def test_a_pattern_that_fits_no_tensor_is_refused(tmp_path, match, message):
    config = config_of(tmp_path, "pipeline 2", [{"match": match, "lr_scale": 0.5}])
    (problem,) = check_parameter_groups(config)
    assert re.search(message, str(problem))
