"""Metrics of sets of videos that need no download: distances of feature sets, flicker.

Shape letters (docs/glossary.md): N videos, D width of a feature vector, T frames, H, W height and
width in pixels, C channels, h, w height and width in feature cells.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from landiff.model_zoo.frozen.base import VisionFeatures

FRAMES_PER_PASS = 16


def frechet_distance(first_ND: Tensor, second_ND: Tensor) -> float:
    """Fréchet distance of two sets of vectors as Gaussians, |m1 - m2|² + tr(S1 + S2 - 2 √(S1 S2)).

    Sets of inception features give the FID, sets of video features the FVD (arXiv 1812.01717).
    Covariances are unbiased. The distance has a bias that falls with the size of the sets, so that
    only sets of equal size are comparable. Raises ValueError for sets of fewer than two vectors.
    """
    first_ND = _checked(first_ND)
    second_ND = _checked(second_ND)
    means = (first_ND.mean(dim=0) - second_ND.mean(dim=0)).square().sum()
    # With S = RᵀR, tr √(S1 S2) is the sum of the singular values of R1 R2ᵀ. No root of a rounded
    # eigenvalue is taken, so that equal sets have a distance of 0.
    first, second = _triangular(first_ND), _triangular(second_ND)
    traces = first.square().sum() + second.square().sum()
    return float(means + traces - 2 * torch.linalg.svdvals(first @ second.T).sum())


def _triangular(vectors_ND: Tensor) -> Tensor:
    """R of [at most N or D, D] with RᵀR the unbiased covariance."""
    centered_ND = vectors_ND - vectors_ND.mean(dim=0)
    return torch.linalg.qr(centered_ND, mode="r")[1] / (len(vectors_ND) - 1) ** 0.5


def kernel_distance(first_ND: Tensor, second_ND: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x·y / D + 1)³: KID, KVD (arXiv 1801.01401).

    The unbiased estimate: it does not depend on the size of the sets and may be below 0. Raises
    ValueError for sets of fewer than two vectors.
    """
    first_ND = _checked(first_ND)
    second_ND = _checked(second_ND)

    def kernel(a_ND: Tensor, b_ND: Tensor) -> Tensor:
        return (a_ND @ b_ND.T / a_ND.shape[1] + 1) ** 3

    def inside(a_ND: Tensor) -> Tensor:
        values = kernel(a_ND, a_ND)
        count = len(a_ND)
        return (values.sum() - values.trace()) / (count * (count - 1))

    between = kernel(first_ND, second_ND).mean()
    return float(inside(first_ND) + inside(second_ND) - 2 * between)


def _checked(vectors_ND: Tensor) -> Tensor:
    """Vectors in float64. Raises ValueError for fewer than two."""
    if len(vectors_ND) < 2:
        raise ValueError(f"{len(vectors_ND)} vector(s): a distance of sets needs two in each")
    return vectors_ND.double()


def flicker(frames_THWC: Tensor) -> float:
    """Mean distance of each pixel to the mean of the frames before and after, of 255.

    Even motion of smooth areas cancels, a change that comes and goes within a frame does not. 0 for
    fewer than three frames. The first and the last frame are not measured.
    """
    if len(frames_THWC) < 3:
        return 0.0
    total = 0.0
    for before, frame, after in zip(frames_THWC, frames_THWC[1:], frames_THWC[2:], strict=False):
        neighbours = (before.double() + after.double()) / 2
        total += float((frame.double() - neighbours).abs().mean())
    return total / (len(frames_THWC) - 2)


def frame_difference(frames_THWC: Tensor) -> float:
    """Mean absolute difference of neighbouring frames, of 255; 0 for a single frame.

    VBench's temporal flickering is 1 - frame_difference / 255, of static videos.
    """
    if len(frames_THWC) < 2:
        return 0.0
    total = 0.0
    for before, frame in itertools.pairwise(frames_THWC):
        total += float((frame.double() - before.double()).abs().mean())
    return total / (len(frames_THWC) - 1)


@torch.no_grad()
def video_vector(network: VisionFeatures, frames_THWC: Tensor) -> Tensor:
    """A vector of content and change of a video, float64 [2 C].

    The mean over time of the network's features, averaged over cells, and their mean absolute
    change between neighbouring frames.

    frames_THWC: uint8, with sides that are multiples of the network's cell.
    """
    parts = []
    for part_THWC in frames_THWC.split(FRAMES_PER_PASS):
        features_1TChw = network(part_THWC[None])
        parts.append(features_1TChw[0].double().mean(dim=(-2, -1)).cpu())
    features_TC = torch.cat(parts)
    change_C = torch.zeros_like(features_TC[0])
    if len(features_TC) > 1:
        change_C = features_TC.diff(dim=0).abs().mean(dim=0)
    return torch.cat([features_TC.mean(dim=0), change_C])
