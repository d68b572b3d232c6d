"""Tests of `landiff evaluate`: which inputs the diffusion model uses, with a verdict.

Letters: B clips, T latent frames, C channels, H W latent sizes, L text rows, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from landiff.launchers.results.swaps import Swap
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.evaluate import coherence
from landiff.model_zoo.evaluate.coherence import Probe
from landiff.model_zoo.schedule import NoiseSchedule

TIMESTEPS = (0.3, 0.6, 0.9)  # fractions of the schedule
PASSES = 4 * len(TIMESTEPS)  # that are counted
USED = 1.15  # ratio of two losses from which a condition counts as used
UNUSED = 1.02
MIN_SPREAD = 0.05  # of the semantic latent over clips


class Reading(TypedDict):
    """One result: what was compared, both losses, their ratio and the verdict."""

    name: str
    timestep: int | None
    right: float | None
    wrong: float | None
    ratio: float
    verdict: str


@dataclass(frozen=True)
class Conditions:
    """Conditions of a batch of clips, and the wrong ones they are compared with.

    swaps: clips whose captions differ in one attribute alone.
    """

    text_BLD: Tensor
    wrong_text_BLD: Tensor
    features_BTChw: Tensor
    wrong_features_BTChw: Tensor
    swaps: Sequence[Swap] = ()


def verdict_of(ratio: float, what: str) -> str:
    """What a ratio of losses says about the use of a condition."""
    if ratio < UNUSED:
        return f"does not use {what}"
    if ratio < USED:
        return f"hardly uses {what}"
    return f"uses {what}"


def compared(name: str, timestep: int | None, right: float, wrong: float, what: str) -> Reading:
    """A reading of two losses. `what` was changed for the second one."""
    ratio = wrong / right
    return Reading(
        name=name,
        timestep=timestep,
        right=right,
        wrong=wrong,
        ratio=ratio,
        verdict=verdict_of(ratio, what),
    )


@torch.no_grad()
def swap_readings(
    model: ControlledDiffusion, schedule: NoiseSchedule, probe: Probe, swaps: Sequence[Swap]
) -> list[Reading]:
    """Loss of the main transformer with one attribute of the caption changed."""
    readings = []
    for swap in swaps:
        for fraction in TIMESTEPS:
            timestep = int(fraction * schedule.config.num_timesteps)
            losses = []
            for texts in (swap.clips, swap.partners):
                part = Probe(
                    probe.latents_BTCHW[swap.clips],
                    probe.noise_BTCHW[swap.clips],
                    probe.text_BLD[texts],
                )
                error = coherence.squared_error(model, schedule, part, timestep)
                losses.append(error.mean().item())
            name = f"main: another {swap.attribute} in the caption"
            what = f"the {swap.attribute} in the text"
            readings.append(compared(name, timestep, losses[0], losses[1], what))
    return readings


@torch.no_grad()
def read_all(
    model: ControlledDiffusion,
    schedule: NoiseSchedule,
    latents_BTCHW: Tensor,
    noise_BTCHW: Tensor,
    conditions: Conditions,
    progress: Callable[[], None],
) -> list[Reading]:
    """All readings: the main transformer alone, then with the control branch."""
    semantic_BTCHW = model.semantic(conditions.features_BTChw)
    wrong_BTCHW = model.semantic(conditions.wrong_features_BTChw)
    main = Probe(latents_BTCHW, noise_BTCHW, conditions.text_BLD)
    other_text = Probe(latents_BTCHW, noise_BTCHW, conditions.wrong_text_BLD)
    control = Probe(latents_BTCHW, noise_BTCHW, conditions.text_BLD, semantic_BTCHW)
    other_tokens = Probe(latents_BTCHW, noise_BTCHW, conditions.text_BLD, wrong_BTCHW)

    def loss(probe: Probe, timestep: int) -> float:
        progress()
        return coherence.squared_error(model, schedule, probe, timestep).mean().item()

    readings = []
    for fraction in TIMESTEPS:
        timestep = int(fraction * schedule.config.num_timesteps)
        alone = loss(main, timestep)
        controlled = loss(control, timestep)
        pairs = {
            "main: misplaced neighbours": (
                coherence.neighbour_losses(model, schedule, main, timestep),
                "neighbouring patches",
            ),
            "main: misplaced frames": (
                coherence.frame_losses(model, schedule, main, timestep),
                "other frames",
            ),
            "main: another caption": (
                (alone, loss(other_text, timestep)),
                "the text",
            ),
            "control: another clip's tokens": (
                (controlled, loss(other_tokens, timestep)),
                "the semantic tokens",
            ),
            "control: main alone": (
                (controlled, alone),
                "the control branch",
            ),
        }
        for name, ((right, wrong), what) in pairs.items():
            readings.append(compared(name, timestep, right, wrong, what))
    readings += swap_readings(model, schedule, main, conditions.swaps)
    spread = coherence.spread_over_clips(semantic_BTCHW, latents_BTCHW)
    verdict = "varies with the clip" if spread >= MIN_SPREAD else "is nearly constant"
    readings.append(
        Reading(
            name="control: spread of the semantic latent",
            timestep=None,
            right=None,
            wrong=None,
            ratio=spread,
            verdict=verdict,
        )
    )
    return readings


def format_readings(readings: Sequence[Mapping[str, object]]) -> str:
    """Readings as a table."""
    lines = [f"{'instrument':<42}{'t':>5}{'right':>9}{'wrong':>9}{'ratio':>8}  verdict"]
    for reading in readings:
        cells = [f"{reading['name']:<42}", f"{reading['timestep'] or '':>5}"]
        for key in ("right", "wrong"):
            value = reading[key]
            cells.append(f"{value:>9.4f}" if isinstance(value, float) else " " * 9)
        lines.append(f"{''.join(cells)}{reading['ratio']:>8.2f}  {reading['verdict']}")
    return "\n".join(lines)
