"""Losses under right and wrong conditions.

They are those of validation during training and of `landiff evaluate`: a model that ignores a
condition has the same loss with another clip's.

Shape letters (docs/glossary.md): B batch, N targets of the language model, K codes of a clip, T
latent frames, C channels, H, W height and width in latent cells, h, w height and width in feature
cells, L text rows, D width of text states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from landiff.model_zoo.evaluate.codebook import code_entropy, count_codes
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.schedule import NoiseSchedule, Prediction, denoising_loss
from landiff.model_zoo.token_layout import CODE, TokenLayout
from landiff.model_zoo.tokenizer import Grid

# ------------------------------------------------------------------------------- language model

KINDS = ("codes", "structural", "codes with partner")
VALUES = ("loss", "correct", "count")


def target_places(
    layout: TokenLayout, num_codes: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Frame of each target of a clip, from the first SI to EOS, and whether the target is a code.

    The others are structural tokens. EOS counts with the last frame.
    """
    template = layout.template(layout.num_frames(num_codes))
    is_start = (template == layout.start_iframe) | (template == layout.start_pframe)
    return np.cumsum(is_start) - 1, template == CODE


@dataclass(frozen=True)
class Targets:
    """What the positions of a row predict.

    ids_N: the token that follows each position.
    frame_N: semantic frame of the target. -1 where nothing is predicted or the clip does not count.
    is_code_N: whether the target is a code; otherwise it is a structural token.
    has_partner_N: whether the clip has a partner with another caption.
    """

    ids_N: Tensor
    frame_N: Tensor
    is_code_N: Tensor
    has_partner_N: Tensor


def token_sums(logits_NV: Tensor, targets: Targets, frames: int) -> Tensor:
    """Sums over the targets of each kind and frame, float64 [KINDS, frames, VALUES].

    VALUES are the sum of losses, the number of correct predictions, and the number of targets.
    frames: at least that of any target.
    """
    loss_N = functional.cross_entropy(logits_NV, targets.ids_N, reduction="none")
    correct_N = logits_NV.argmax(-1) == targets.ids_N
    values = [loss_N.double(), correct_N.double(), torch.ones_like(loss_N).double()]
    values_N3 = torch.stack(values, dim=1)
    counted_N = targets.frame_N >= 0
    is_code_N = targets.is_code_N
    sums = []
    for kind_N in (is_code_N, ~is_code_N, is_code_N & targets.has_partner_N):
        chosen_N = counted_N & kind_N
        total = values_N3.new_zeros(frames, len(VALUES))
        sums.append(total.index_add(0, targets.frame_N[chosen_N], values_N3[chosen_N]))
    return torch.stack(sums)


@torch.no_grad()
def code_loss(
    model: LanguageModel,
    codes_K: NDArray[np.int64],
    text_LD: Tensor,
    motion_score: float,
    grid: Grid,
) -> float:
    """Cross-entropy of the codes of one clip, in nats per code.

    grid: its rows and columns of feature cells.

    Structural tokens are left out: they are nearly certain and would lower the mean.
    """
    layout = model.layout
    frames = layout.num_frames(len(codes_K))
    ids_S = torch.from_numpy(layout.build(codes_K, len(text_LD))).to(text_LD.device)
    frames_B = torch.tensor([float(frames)], device=ids_S.device)
    motion_score_B = torch.tensor([motion_score], device=ids_S.device)
    grid_B2 = torch.tensor([grid], dtype=torch.float32, device=ids_S.device)
    logits_BSV = model(ids_S[None], text_LD[None], frames_B, motion_score_B, grid_B2=grid_B2)
    logits_SV = logits_BSV[0].float()
    places = target_places(layout, len(codes_K))
    frame_N, is_code_N = [torch.from_numpy(array).to(ids_S.device) for array in places]
    start = len(ids_S) - len(frame_N)  # of the body
    targets = Targets(ids_S[start:], frame_N, is_code_N, torch.ones_like(is_code_N))
    loss, _, count = token_sums(logits_SV[start - 1 : -1], targets, frames)[0].sum(0).tolist()
    return loss / count


def frequency_baseline(codes_BK: np.ndarray, codebook_size: int) -> float:
    """Nats per code of the best predictor that knows only how often each code occurs."""
    codes = torch.from_numpy(codes_BK.astype(np.int64))
    return float(code_entropy(count_codes(codes, codebook_size).double()))


# ------------------------------------------------------------------------------- diffusion model


@dataclass(frozen=True)
class ClipConditions:
    """Conditions of a batch of clips.

    features_BTchw: semantic features. None in phase main.
    prefix: latent frames at the start that the model receives without noise.
    """

    text_BLD: Tensor
    features_BTchw: Tensor | None
    prefix: int = 0


def variants(
    own: ClipConditions, other: ClipConditions, prefix: int, latent_frames: int
) -> dict[str, ClipConditions]:
    """The conditions that are compared, by name.

    own: the clips' own text and tokens. prefix: the same after a prefix; left out if there is none,
    and if the clips are not longer. other_caption and other_tokens: with the text, and in phase
    control with the tokens, of the other clips.
    """
    found = {"own": own}
    if 0 < prefix < latent_frames:
        found["prefix"] = replace(own, prefix=prefix)
    found["other_caption"] = replace(own, text_BLD=other.text_BLD)
    if own.features_BTchw is not None:
        found["other_tokens"] = replace(own, features_BTchw=other.features_BTchw)
    return found


@torch.no_grad()
def frame_errors(
    model: Callable[..., Tensor],
    schedule: NoiseSchedule,
    conditions: ClipConditions,
    *,
    latents_BTCHW: Tensor,
    noise_BTCHW: Tensor,
    timestep_B: Tensor,
    prediction: Prediction,
) -> Tensor:
    """Squared error of the velocity of each latent frame, prefix included, float32 [B, T].

    model: a diffusion model, or an engine around it.
    """
    given = () if conditions.features_BTchw is None else (conditions.features_BTchw,)

    def network(noised_BTCHW: Tensor, timestep_B: Tensor) -> Tensor:
        return model(noised_BTCHW, timestep_B, conditions.text_BLD, *given)

    return denoising_loss(
        network,
        schedule,
        latents_BTCHW,
        noise_BTCHW,
        timestep_B,
        fixed_frames=conditions.prefix,
        prediction=prediction,
    ).per_frame
