"""Joins and drift of long videos."""

from __future__ import annotations

import math

import pytest
import torch

from landiff.model_zoo.evaluate.drift import DriftMeter


def meter(features=None) -> DriftMeter:
    """Chunks of 5 and 4 frames."""
    return DriftMeter(time=2, window=3, clean=1, features=features)


def grey(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 4, 6, 3)


def test_a_jump_at_a_join_and_a_drift_of_colours_are_measured():
    frames = grey(10, 11, 12, 13, 14, 24, 25, 26, 27, 28, 29, 30, 31).clone()
    frames[9:, ..., 0] += 40  # red
    measured = meter()
    measured.add(frames)
    first, second, third = measured.report()
    assert (first["first_frame"], first["frames"]) == (0, 5)
    assert (second["first_frame"], second["frames"]) == (5, 4)
    assert (first["inner_difference"], first["join_difference"]) == (1, None)
    assert (second["join_difference"], second["join_ratio"]) == (10, 10)
    assert first["psnr_to_first"] is None and first["colour_to_first"] == (0, 0, 0)
    assert second["colour_to_first"] == (13.5, 13.5, 13.5)
    assert second["psnr_to_first"] == pytest.approx(20 * math.log10(255 / 13.5), rel=1e-12)
    assert third["colour_to_first"] == (57.5, 17.5, 17.5)
    assert third["join_ratio"] == pytest.approx(1 + 40 / 3, rel=1e-12)


def test_the_parts_in_which_frames_come_do_not_matter():
    """Bit for bit: sums of integers in float64 are exact."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (14, 4, 6, 3), generator=generator, dtype=torch.uint8)

    def features(frames_BTHWC):
        return frames_BTHWC.float().movedim(-1, 2)

    whole = meter(features)
    whole.add(frames)
    parts = meter(features)
    for part in frames.split([1, 0, 6, 2, 5]):
        parts.add(part)
    assert parts.report() == whole.report()
    assert len(whole.report()) == 4 and whole.report()[3]["frames"] == 1
    assert 0 < whole.report()[1]["feature_distance"] < 1
