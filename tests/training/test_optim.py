"""Learning rate and AdamW."""

import math

import pytest
import torch
from torch import nn

from landiff.configs import load
from landiff.training.config import OptimConfig
from landiff.training.optim import (
    adamw,
    clip_gradients,
    learning_rate,
    rate_of_step,
    set_rate_and_decay,
    step_count,
)
from tests.training.toy import ToyConfig


def test_warmup_rises_linearly_to_the_full_rate():
    config = OptimConfig(lr=0.4, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(6)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    )


def test_cosine_ends_at_the_minimum_and_passes_the_middle_half_way():
    config = OptimConfig(lr=1.0, warmup_steps=10, decay="cosine", min_lr=0.2)
    assert learning_rate(config, 10, 110) == 1.0
    assert learning_rate(config, 60, 110) == pytest.approx(0.6)
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)
    assert learning_rate(config, 500, 110) == pytest.approx(0.2)


def test_linear_decay_ends_after_its_steps_or_with_the_run():
    config = OptimConfig(lr=1.0, warmup_steps=10, decay="linear", min_lr=0.2)
    assert learning_rate(config, 60, 110) == pytest.approx(0.6)
    short = config.model_copy(update={"decay_steps": 20})
    rates = [learning_rate(short, step, 110) for step in (10, 20, 30, 100)]
    assert rates == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.mark.parametrize(
    ("shape", "quarter"), [("linear", 0.8), ("cosine", 0.882843), ("sqrt", 0.6)]
)
def test_wsd_is_stable_until_its_last_steps(shape, quarter):
    config = OptimConfig(
        lr=1.0, warmup_steps=10, decay="wsd", decay_steps=40, decay_shape=shape, min_lr=0.2
    )
    rates = [learning_rate(config, step, 110) for step in (4, 10, 70, 80, 110)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, quarter, 0.2])
    longer = [learning_rate(config, step, 1110) for step in (70, 1070, 1080)]
    assert longer == pytest.approx([1.0, 1.0, quarter])  # more steps move only the decay


def test_a_constant_or_cosine_rate_is_that_of_earlier_versions_to_the_bit():
    def earlier(config: OptimConfig, step: int, total_steps: int) -> float:
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        if config.decay == "constant":
            return config.lr
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return config.min_lr + (config.lr - config.min_lr) * cosine

    for decay in ("constant", "cosine"):
        config = OptimConfig(lr=3e-4, warmup_steps=7, decay=decay, min_lr=3e-5)
        for total in (5, 7, 8, 1000):
            for step in range(1010):
                assert learning_rate(config, step, total) == earlier(config, step, total)


def test_matrices_decay_vectors_and_frozen_parameters_do_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    model[2].requires_grad_(False)
    optimizer = adamw(model.named_parameters(), OptimConfig(lr=0.1, weight_decay=0.5))
    decays = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decays[id(parameter)] = group["weight_decay"]
    assert decays == {
        id(model[0].weight): 0.5,
        id(model[0].bias): 0.0,
        id(model[1].weight): 0.0,
        id(model[1].bias): 0.0,
    }
    set_rate_and_decay(optimizer, 0.01, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_the_first_entry_that_matches_a_name_scales_rate_and_decay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    groups = [
        {"match": "0.weight", "weight_decay_scale": 0},
        {"match": "[01].*", "lr_scale": 0.5, "weight_decay_scale": 2},
        {"match": "*", "weight_decay_scale": 2},
    ]
    config = OptimConfig(lr=0.1, weight_decay=0.5, groups=groups)
    optimizer = adamw(model.named_parameters(), config)
    set_rate_and_decay(optimizer, 0.01, 0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[parameter]] = (group["lr"], group["weight_decay"])
    assert found == {
        "0.weight": (0.01, 0.0),
        "0.bias": (0.005, 0.0),
        "1.weight": (0.005, 0.0),
        "1.bias": (0.005, 0.0),
        "2.weight": (0.01, 1.0),
        "2.bias": (0.01, 0.0),
    }
    assert len(optimizer.param_groups) == 3
    set_rate_and_decay(optimizer, 0.01, 0.2)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.4}


def test_a_phase_with_other_decay_and_clipping_alone_keeps_the_schedule(tmp_path):
    optim = {"lr": 1.0, "warmup_steps": 4, "decay": "linear"}
    phases = [
        {"from_step": 2, "optim": {"weight_decay": 0.5, "clip_grad": 0.0}},
        {"from_step": 6, "optim": {"lr": 0.5, "weight_decay": 0.25}},
    ]
    config = load(
        ToyConfig, {"run": tmp_path, "loop": {"steps": 10}, "optim": optim, "phases": phases}
    )
    plain = config.model_copy(update={"phases": ()})
    steps = range(6)
    assert [rate_of_step(config, i) for i in steps] == [rate_of_step(plain, i) for i in steps]
    assert rate_of_step(config, 6) == 0.5  # a schedule of its own, without warmup
    values = [(config.at(i).optim.weight_decay, config.at(i).optim.clip_grad) for i in (1, 2, 6)]
    assert values == [(0.01, 1.0), (0.5, 0.0), (0.25, 0.0)]
    assert config.at(2).optim.warmup_steps == 4


def test_the_update_is_fused_on_cuda_or_where_the_config_says_so():
    config = OptimConfig(lr=0.1)
    for device, fused in (("cpu", None), ("cuda", True)):
        parameter = nn.Parameter(torch.zeros(2, 2))
        optimizer = adamw([("weight", parameter)], config, torch.device(device))
        assert optimizer.defaults["fused"] is fused
        assert step_count(3.0, parameter, fused).equal(torch.tensor(3.0))
    chosen = OptimConfig(lr=0.1, fused=True)
    assert adamw([("weight", parameter)], chosen, torch.device("cpu")).defaults["fused"] is True
    meta = torch.zeros(1, device="meta")
    assert step_count(torch.tensor(3.0), meta, True).device.type == "meta"
    assert step_count(torch.tensor(3.0), meta, None).device.type == "cpu"


@pytest.mark.parametrize(
    ("limit", "expected"), [(1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (10.0, [3.0, 4.0])]
)
def test_clipping_bounds_the_norm_and_reports_the_one_before(limit, expected):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([parameter], limit)) == 5.0
    torch.testing.assert_close(parameter.grad, torch.tensor(expected))
