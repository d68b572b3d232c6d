"""Keyed random numbers of the trainers: (seed, purpose, place in the data), never the rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from landiff.model_zoo.keyed_random import generator, key

__all__ = ["generator", "key", "seeded"]


@contextmanager
def seeded(seed: int, purpose: str, *place: int) -> Iterator[None]:
    """Seeds torch's global CPU generator inside the block and restores its state afterwards.

    For code that takes no generator, such as the initialization of modules. Build modules on the
    CPU, then move them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, purpose, *place))
        yield
