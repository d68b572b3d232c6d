"""The semantic condition: sizes, start at zero, frames kept apart."""

from __future__ import annotations

import pytest
import torch

from landiff.model_zoo.config import SemanticConditionConfig
from landiff.model_zoo.semantic_condition import SemanticCondition

TINY = SemanticConditionConfig(
    feature_channels=6,
    base_channels=32,
    channel_multipliers=(1, 2, 1),
    num_res_blocks=1,
    out_channels=8,
)


def test_every_level_but_one_doubles_the_grid():
    model = SemanticCondition(TINY, latent_channels=3)
    assert model.scale == 4
    assert model(torch.randn(2, 3, 6, 2, 5)).shape == (2, 3, 3, 8, 20)


def test_untrained_condition_is_zero_and_its_projection_learns_first():
    model = SemanticCondition(TINY, latent_channels=3)
    latent = model(torch.randn(1, 2, 6, 2, 2))
    assert not latent.any()
    (latent - 1).square().mean().backward()
    moved = {n for n, p in model.named_parameters() if p.grad.abs().max() > 0}
    assert moved == {"projection.weight", "projection.bias"}


def test_frames_do_not_mix():
    model = SemanticCondition(TINY, latent_channels=3)
    torch.nn.init.normal_(model.projection.weight)
    features = torch.randn(1, 3, 6, 2, 2)
    changed = features.clone()
    changed[:, 1] += 1
    different = (model(changed) != model(features)).flatten(2).any(-1)
    assert different.tolist() == [[False, True, False]]


def test_widths_that_groups_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"= \[48, 96\] must be multiples of 32"):
        SemanticCondition(
            TINY.model_copy(update={"base_channels": 48, "channel_multipliers": (1, 2)}), 3
        )
