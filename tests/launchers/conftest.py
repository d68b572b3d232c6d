"""Fixtures of all tests of commands."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from landiff.launchers.project import space


@pytest.fixture(autouse=True)
def large_disk(monkeypatch):
    """A disk with space for every packaged config, since the checks compare it with their needs."""
    monkeypatch.setattr(space, "free_bytes", lambda folder: 1 << 50)


@pytest.fixture
def network(monkeypatch):
    """Hub ids that are not cached are no mistakes, as without HF_HUB_OFFLINE."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
