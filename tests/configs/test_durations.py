"""Durations and sizes as text."""

from __future__ import annotations

import pytest

from landiff.configs.durations import duration, size


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3700, "1:01:40")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (51_200, "51 kB"),
        (3.21e9, "3.2 GB"),
        (1e18, "1000 PB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text
