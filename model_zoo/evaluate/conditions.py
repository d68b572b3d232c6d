"""Do the models use what they are told? The loss with the right condition against the loss with a wrong one.

Letters: B clips, K codes of a clip, T latent frames, C H W latent sizes, L text rows, D text width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from landiff.configs.base import ConfigError
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.evaluate.codebook import code_entropy, count_codes
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.schedule import NoiseSchedule


def wrong_partners(keys: Sequence[str]) -> list[int]:
    """For each clip another one that differs in `keys` (its caption, its video). Raises ConfigError if there is none."""
    count = len(keys)
    partners = []
    for i in range(count):
        others = [
            (i + step) % count for step in range(1, count) if keys[(i + step) % count] != keys[i]
        ]
        if not others:
            raise ConfigError(
                f"all {count} clips share {keys[i]!r}, so there is no other condition to compare with; evaluate on "
                "clips of at least two videos with different captions"
            )
        partners.append(others[len(others) // 2])
    return partners


def frequency_baseline(codes_BK: np.ndarray, codebook_size: int) -> float:
    """Nats per code of the best predictor that knows only how often each code occurs in these clips."""
    codes = torch.from_numpy(codes_BK.astype(np.int64))
    return float(code_entropy(count_codes(codes, codebook_size).double()))


@torch.no_grad()
def lm_code_loss(
    model: LanguageModel, codes: np.ndarray, text_LD: Tensor, num_frames: int, motion_score: float
) -> float:
    """Nats per code of one clip, structural tokens left out (they cost next to nothing and would flatter)."""
    layout = model.layout
    ids = torch.from_numpy(layout.build(codes, len(text_LD)))[None].to(text_LD.device)
    device = ids.device
    logits_SV = model(
        ids,
        text_LD[None],
        torch.tensor([float(num_frames)], device=device),
        torch.tensor([motion_score], device=device),
    )[0].float()
    is_code_S = (ids[0] >= 0) & (ids[0] < layout.codebook_size)
    is_code_S[0] = False  # nothing predicts the first position
    places = is_code_S.nonzero().squeeze(1)
    return functional.cross_entropy(logits_SV[places - 1], ids[0, places]).item()


@torch.no_grad()
def diffusion_loss(
    model: ControlledDiffusion,
    schedule: NoiseSchedule,
    latents_BTCHW: Tensor,
    text_BLD: Tensor,
    features_BTChw: Tensor,
    noise_BTCHW: Tensor,
    timestep_B: Tensor,
    *,
    prefix: int = 0,
    skip: int = 0,
) -> float:
    """Mean squared error of the velocity over latent frames `skip` and later; the first `prefix` are given clean."""
    noised = schedule.noised(latents_BTCHW, noise_BTCHW, timestep_B)
    if prefix:
        noised = torch.cat([latents_BTCHW[:, :prefix], noised[:, prefix:]], dim=1)
    velocity = model(noised, timestep_B, text_BLD, features_BTChw)
    target = schedule.velocity(latents_BTCHW, noise_BTCHW, timestep_B)
    return functional.mse_loss(velocity[:, skip:].float(), target[:, skip:]).item()
