"""Effect of the conditions: losses with the right condition and with one of another clip.

Shape letters (docs/glossary.md): B batch, S positions of a sequence, K codes of a clip, T latent
frames, C channels, H, W height and width in latent cells, h, w height and width in feature cells,
L text rows, D width of text states, V vocabulary.
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
    """For each clip the index of another clip with another key.

    keys: what the condition is made from, the caption or the hash of the video.

    Raises ConfigError if all keys are the same.
    """
    count = len(keys)
    partners = []
    for index, key in enumerate(keys):
        following = [(index + step) % count for step in range(1, count)]
        others = [other for other in following if keys[other] != key]
        if not others:
            raise ConfigError(
                f"all {count} clips have {key!r}, so there is no other condition to compare with; "
                "evaluate on clips of at least two videos with different captions"
            )
        partners.append(others[len(others) // 2])
    return partners


def frequency_baseline(codes_BK: np.ndarray, codebook_size: int) -> float:
    """Nats per code of the best predictor that knows only how often each code occurs."""
    codes = torch.from_numpy(codes_BK.astype(np.int64))
    return float(code_entropy(count_codes(codes, codebook_size).double()))


@torch.no_grad()
def lm_code_loss(
    model: LanguageModel,
    codes_K: np.ndarray,
    text_LD: Tensor,
    num_frames: int,
    motion_score: float,
) -> float:
    """Cross-entropy of the codes of one clip, in nats per code.

    Structural tokens are left out: they are nearly certain and would lower the mean.
    """
    layout = model.layout
    ids = torch.from_numpy(layout.build(codes_K, len(text_LD)))[None].to(text_LD.device)
    frames_B = torch.tensor([float(num_frames)], device=ids.device)
    motion_score_B = torch.tensor([motion_score], device=ids.device)
    logits_SV = model(ids, text_LD[None], frames_B, motion_score_B)[0].float()
    is_code_S = (ids[0] >= 0) & (ids[0] < layout.codebook_size)
    is_code_S[0] = False  # nothing predicts the first position
    positions = is_code_S.nonzero().squeeze(1)
    return functional.cross_entropy(logits_SV[positions - 1], ids[0, positions]).item()


@torch.no_grad()
def diffusion_loss(
    model: ControlledDiffusion,
    schedule: NoiseSchedule,
    latents_BTCHW: Tensor,
    text_BLD: Tensor,
    features_BTChw: Tensor,
    *,
    noise_BTCHW: Tensor,
    timestep_B: Tensor,
    prefix: int = 0,
    skip: int = 0,
) -> float:
    """Mean squared error of the velocity over the latent frames from `skip` on.

    prefix: number of latent frames at the start that the model receives without noise.
    """
    noised_BTCHW = schedule.noised(latents_BTCHW, noise_BTCHW, timestep_B)
    if prefix:
        parts = [latents_BTCHW[:, :prefix], noised_BTCHW[:, prefix:]]
        noised_BTCHW = torch.cat(parts, dim=1)
    output_BTCHW = model(noised_BTCHW, timestep_B, text_BLD, features_BTChw)
    velocity_BTCHW = schedule.as_velocity(
        output_BTCHW, noised_BTCHW, timestep_B, model.config.transformer.prediction
    )
    target_BTCHW = schedule.velocity(latents_BTCHW, noise_BTCHW, timestep_B)
    error = functional.mse_loss(velocity_BTCHW[:, skip:], target_BTCHW[:, skip:])
    return error.item()
