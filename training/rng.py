"""Chance, keyed by what it is for: (seed, purpose, place in the data), never by rank.

A run with two ranks, or one that was killed and resumed, draws the same numbers for the same sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def key(seed: int, purpose: str, *place: int) -> int:
    """A 63-bit seed for one purpose at one place, e.g. key(seed, "noise", epoch, position)."""
    text = "/".join([str(seed), purpose, *map(str, place)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *place: int) -> torch.Generator:
    """A fresh CPU generator for that key. Draw on the CPU and move: the numbers then do not depend on the device."""
    return torch.Generator().manual_seed(key(seed, purpose, *place))


@contextmanager
def seeded(seed: int, purpose: str, *place: int) -> Iterator[None]:
    """torch's global CPU generator under that key inside the block, as before after it: for code that takes no
    generator, such as the initialisation of modules (build on the CPU, then move)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, purpose, *place))
        yield
