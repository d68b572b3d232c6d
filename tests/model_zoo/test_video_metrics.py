"""Metrics of sets of videos, against computations that share nothing with them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from landiff.model_zoo.evaluate.video_metrics import (
    FRAMES_PER_PASS,
    flicker,
    frame_difference,
    frechet_distance,
    kernel_distance,
    video_vector,
)


def vectors(count: int, seed: int, width: int = 6) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.normal(size=(count, width)) @ draw.normal(size=(width, width)))


def test_the_frechet_distance_is_that_of_the_matrix_root():
    first, second = vectors(40, 0), vectors(30, 1) + 0.5
    means = first.numpy().mean(0) - second.numpy().mean(0)
    one, other = np.cov(first.numpy(), rowvar=False), np.cov(second.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(one @ other).real
    wanted = means @ means + np.trace(one + other - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-9)  # float64


def test_the_frechet_distance_of_fewer_videos_than_features_is_finite_and_0_for_equal_sets():
    few = vectors(3, 2, width=8)
    # float64 sums of numbers of about 10
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(few, few + 2.0) == pytest.approx(8 * 4.0, rel=1e-12)


def test_the_kernel_distance_is_the_sum_over_pairs():
    first, second = vectors(5, 3).numpy(), vectors(4, 4).numpy()

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    def mean(pairs):
        values = [kernel(a, b) for a, b in pairs]
        return sum(values) / len(values)

    wanted = mean(itertools.permutations(first, 2)) + mean(itertools.permutations(second, 2))
    wanted -= 2 * mean(itertools.product(first, second))
    found = kernel_distance(torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_a_distance_needs_two_vectors_in_each_set(distance):
    with pytest.raises(ValueError, match="two"):
        distance(vectors(1, 0), vectors(5, 1))


def test_flicker_ignores_an_even_change_and_frame_difference_does_not():
    ramp = torch.arange(0, 50, 5, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)
    assert flicker(ramp) == 0.0 and frame_difference(ramp) == 5.0
    blink = ramp.clone()
    blink[1::2] += 7
    # Every frame differs by 7 from the mean of its neighbours; steps are 12 and -2 in turn.
    assert flicker(blink) == 7.0 and frame_difference(blink) == pytest.approx((5 * 12 + 4 * 2) / 9)
    assert flicker(ramp[:2]) == frame_difference(ramp[:1]) == 0.0


class MeanColour:
    """A network whose features are the mean colours of 2 x 2 cells."""

    name, fingerprint, channels, cell = "mean-colour", "0" * 16, 3, 2

    def __call__(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(frames_BTHWC[0].movedim(-1, 1).float(), 2)
        return cells[None]


def test_a_video_vector_holds_content_and_change_whatever_the_length():
    draw = np.random.default_rng(0)
    frames = torch.from_numpy(draw.integers(0, 256, (FRAMES_PER_PASS + 3, 4, 6, 3), np.uint8))
    colours = frames.numpy().astype(np.float64).mean(axis=(1, 2))
    change = np.abs(np.diff(colours, axis=0)).mean(axis=0)
    wanted = np.concatenate([colours.mean(axis=0), change])
    found = video_vector(MeanColour(), frames)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)  # float32 features
    assert video_vector(MeanColour(), frames[:1])[3:].eq(0).all()
