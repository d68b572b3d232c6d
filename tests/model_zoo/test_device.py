"""Devices of jobs without ranks."""

from __future__ import annotations

import pytest

from landiff.configs.base import ConfigError
from landiff.model_zoo.device import pick_device


@pytest.mark.parametrize("name", ["tpu", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"device = {name} cannot be used: .*set device=auto"):
        pick_device(name)
    assert pick_device("cpu").type == "cpu"
