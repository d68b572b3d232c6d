"""Does the diffusion model use its context? Losses with misplaced patches, frames and conditions.

Each test changes what surrounds a part of the latents and measures the loss on the part itself. A
model that denoises each patch alone has the same loss, so the ratio of the two losses is 1.

Shape letters (docs/glossary.md): B batch, T latent frames, C channels, H, W height and width in
latent cells, L text rows, D width of text states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.schedule import NoiseSchedule, denoising_loss


@dataclass(frozen=True)
class Probe:
    """What the losses of one test are computed from.

    semantic_BTCHW: semantic latent of the control branch; None runs the main transformer alone.
    """

    latents_BTCHW: Tensor
    noise_BTCHW: Tensor
    text_BLD: Tensor
    semantic_BTCHW: Tensor | None = None


def squared_error(
    model: ControlledDiffusion, schedule: NoiseSchedule, probe: Probe, timestep: int
) -> Tensor:
    """Squared error of the velocity at one timestep, float32 [B, T, C, H, W]."""
    latents_BTCHW = probe.latents_BTCHW
    timestep_B = torch.full((len(latents_BTCHW),), timestep).to(latents_BTCHW.device)

    def network(noised_BTCHW: Tensor, timestep_B: Tensor) -> Tensor:
        semantic_BTCHW = probe.semantic_BTCHW
        return model(noised_BTCHW, timestep_B, probe.text_BLD, semantic_BTCHW=semantic_BTCHW)

    prediction = model.config.transformer.prediction
    result = denoising_loss(
        network, schedule, latents_BTCHW, probe.noise_BTCHW, timestep_B, prediction=prediction
    )
    target_BTCHW = schedule.velocity(latents_BTCHW, probe.noise_BTCHW, timestep_B)
    return (result.velocity - target_BTCHW).square()


def checkerboard(height: int, width: int, patch: int) -> Tensor:
    """Every second patch of a frame, bool [height, width]."""
    row = torch.arange(height) // patch
    column = torch.arange(width) // patch
    return (row[:, None] + column) % 2 == 0


def misplace(latents_BTCHW: Tensor) -> Tensor:
    """The same clips moved by half a frame, so that colours are right and places wrong."""
    height, width = latents_BTCHW.shape[-2:]
    return latents_BTCHW.roll((height // 2, width // 2), (-2, -1))


def misplaced_neighbours(latents_BTCHW: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Latents whose every second patch comes from another place, and where the others are.

    Returns [B, T, C, H, W] and bool [H, W], true where the latents are unchanged.
    """
    height, width = latents_BTCHW.shape[-2:]
    kept_HW = checkerboard(height, width, patch).to(latents_BTCHW.device)
    # Half a frame can be an even number of patches: one more puts another content beside each.
    moved_BTCHW = misplace(latents_BTCHW).roll(patch, -2)
    return torch.where(kept_HW, latents_BTCHW, moved_BTCHW), kept_HW


def misplaced_frames(latents_BTCHW: Tensor) -> Tensor:
    """Latents whose odd frames are moved by half a frame, [B, T, C, H, W]."""
    result_BTCHW = latents_BTCHW.clone()
    result_BTCHW[:, 1::2] = misplace(latents_BTCHW)[:, 1::2]
    return result_BTCHW


@torch.no_grad()
def neighbour_losses(
    model: ControlledDiffusion, schedule: NoiseSchedule, probe: Probe, timestep: int
) -> tuple[float, float]:
    """Loss of half the patches between right and between misplaced neighbours."""
    patch = model.config.transformer.patch_size
    moved_BTCHW, kept_HW = misplaced_neighbours(probe.latents_BTCHW, patch)
    moved = Probe(moved_BTCHW, probe.noise_BTCHW, probe.text_BLD, probe.semantic_BTCHW)
    right = squared_error(model, schedule, probe, timestep)[..., kept_HW]
    wrong = squared_error(model, schedule, moved, timestep)[..., kept_HW]
    return right.mean().item(), wrong.mean().item()


@torch.no_grad()
def frame_losses(
    model: ControlledDiffusion, schedule: NoiseSchedule, probe: Probe, timestep: int
) -> tuple[float, float]:
    """Loss of the even frames between right and between misplaced frames."""
    moved_BTCHW = misplaced_frames(probe.latents_BTCHW)
    moved = Probe(moved_BTCHW, probe.noise_BTCHW, probe.text_BLD, probe.semantic_BTCHW)
    right = squared_error(model, schedule, probe, timestep)[:, ::2]
    wrong = squared_error(model, schedule, moved, timestep)[:, ::2]
    return right.mean().item(), wrong.mean().item()


def spread_over_clips(semantic_BTCHW: Tensor, latents_BTCHW: Tensor) -> float:
    """Standard deviation of the semantic latent over clips, relative to that of the latents.

    It is 0 for a condition that is the same for all clips, however large it is.
    """
    semantic = semantic_BTCHW.float().var(dim=0, unbiased=False).mean()
    latents = latents_BTCHW.float().var(dim=0, unbiased=False).mean()
    return float((semantic / latents).sqrt())
