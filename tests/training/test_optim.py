"""Learning rate and AdamW."""

import pytest
import torch
from torch import nn

from landiff.training.config import OptimConfig
from landiff.training.optim import adamw, clip_gradients, learning_rate, set_learning_rate


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


def test_matrices_decay_vectors_and_frozen_parameters_do_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    model[2].requires_grad_(False)
    optimizer = adamw(model.parameters(), OptimConfig(lr=0.1, weight_decay=0.5))
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
    set_learning_rate(optimizer, 0.01)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


@pytest.mark.parametrize(
    ("limit", "expected"), [(1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (10.0, [3.0, 4.0])]
)
def test_clipping_bounds_the_norm_and_reports_the_one_before(limit, expected):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([parameter], limit)) == 5.0
    torch.testing.assert_close(parameter.grad, torch.tensor(expected))
