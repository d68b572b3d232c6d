"""Tests of `landiff evaluate`: which conditions the language model uses.

Letters: K codes of a clip, L text rows, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
import torch

from landiff.data_pipeline.loading.loader import Sample
from landiff.launchers.results.instruments import Reading, compared
from landiff.launchers.results.swaps import Swap
from landiff.model_zoo.evaluate import conditions
from landiff.model_zoo.lm import LanguageModel
from landiff.training.lm.batch import grid_of


def lm_readings(
    lm: LanguageModel,
    samples: Sequence[Sample],
    text_column: str,
    swaps: Sequence[Swap],
    device: torch.device,
    progress: Callable[[], None],
) -> list[Reading]:
    """Losses with another motion score, and with one attribute of the caption changed."""
    texts_LD = [sample.tensors[text_column].float().to(device) for sample in samples]
    scores = [sample.meta.motion_score for sample in samples]

    def loss(index: int, text: int, motion_score: float) -> float:
        codes_K = samples[index].tensors["tokens"].to(torch.int64).numpy()
        progress()
        grid = grid_of(samples[index].meta)
        return conditions.code_loss(lm, codes_K, texts_LD[text], motion_score, grid)

    right = [loss(index, index, scores[index]) for index in range(len(samples))]
    opposite = opposite_scores(scores)
    wrong = [loss(index, index, opposite[index]) for index in range(len(samples))]
    readings = [
        compared("lm: another motion score", None, fmean(right), fmean(wrong), "the motion score")
    ]
    for swap in swaps:
        own = [right[index] for index in swap.clips]
        other = []
        for index, partner in zip(swap.clips, swap.partners, strict=True):
            other.append(loss(index, partner, scores[index]))
        name = f"lm: another {swap.attribute} in the caption"
        what = f"the {swap.attribute} in the text"
        readings.append(compared(name, None, fmean(own), fmean(other), what))
    return readings


def opposite_scores(scores: Sequence[float]) -> list[float]:
    """For each clip the score at the other end of the order, for the lowest the highest."""
    order = np.argsort(scores, kind="stable")
    result = [0.0] * len(scores)
    for place, index in enumerate(order):
        result[index] = scores[order[len(scores) - 1 - place]]
    return result


def num_passes(num_samples: int, swaps: Sequence[Swap]) -> int:
    """Forward passes of `lm_readings`."""
    return 2 * num_samples + sum(len(swap.clips) for swap in swaps)
