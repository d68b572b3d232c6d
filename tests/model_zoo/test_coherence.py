"""Instruments of the diffusion model: what is misplaced, and what a loss ratio says."""

from __future__ import annotations

import torch
from torch import Tensor

from landiff.launchers.results.instruments import verdict_of
from landiff.model_zoo.config import ScheduleConfig
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.evaluate import coherence
from landiff.model_zoo.evaluate.coherence import Probe
from landiff.model_zoo.schedule import NoiseSchedule
from tests.model_zoo.tiny_diffusion import TINY, randomize

SCHEDULE = NoiseSchedule(ScheduleConfig())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def probe() -> Probe:
    return Probe(
        normal(2, 3, 4, 4, 8, seed=0), normal(2, 3, 4, 4, 8, seed=1), normal(2, 5, 12, seed=2)
    )


def test_half_of_the_patches_stay_and_the_others_come_from_elsewhere():
    latents = torch.arange(64.0).view(1, 1, 1, 8, 8)
    moved, kept = coherence.misplaced_neighbours(latents, 2)
    assert kept.sum() == 32 and kept[:2, :2].all() and not kept[:2, 2:4].any()
    assert torch.equal(moved[..., kept], latents[..., kept])
    assert (moved[..., ~kept] != latents[..., ~kept]).all()
    frames = coherence.misplaced_frames(latents.expand(1, 4, 1, 8, 8))
    changed = (frames != latents).flatten(2).any(dim=2)[0]
    assert changed.tolist() == [False, True, False, True]


def test_a_model_without_attention_has_the_same_loss_beside_wrong_neighbours():
    model = ControlledDiffusion(TINY)
    randomize(model)
    with torch.no_grad():
        right, wrong = coherence.neighbour_losses(model, SCHEDULE, probe(), 600)
        assert right != wrong
        for block in model.transformer.blocks:
            torch.nn.init.zeros_(block.out.weight)
        for losses in (coherence.neighbour_losses, coherence.frame_losses):
            right, wrong = losses(model, SCHEDULE, probe(), 600)
            # Patches are computed alone, in batches that may round differently.
            torch.testing.assert_close(right, wrong, rtol=1e-5, atol=0)


def test_the_spread_of_a_condition_counts_differences_between_clips_only():
    latents = normal(6, 3, 4, 4, 8, seed=3)
    same = latents[:1].expand(6, -1, -1, -1, -1)
    assert coherence.spread_over_clips(100 * same, latents) == 0
    torch.testing.assert_close(coherence.spread_over_clips(2 * latents, latents), 2.0)


def test_verdicts():
    assert verdict_of(1.0, "the text") == "does not use the text"
    assert verdict_of(1.1, "the text") == "hardly uses the text"
    assert verdict_of(1.5, "the text") == "uses the text"
