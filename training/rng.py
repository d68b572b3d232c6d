"""Seeding of torch's global generator with the keys of `landiff.model_zoo.keyed_random`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from landiff.model_zoo import keyed_random


@contextmanager
def seeded(seed: int, purpose: str, *place: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block, and restore its state afterwards.

    For code that takes no generator, such as the initialization of modules. Build modules on the
    CPU and then move them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_random.key(seed, purpose, *place))
        yield
