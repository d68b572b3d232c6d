"""Random generators keyed by (seed, purpose, place), where a place is a position for instance.

A random number depends only on its key, not on the rank, the batch or earlier random numbers. A run
on another number of ranks, or a resumed one, generates the same numbers for the same sample.
"""

from __future__ import annotations

import hashlib

import torch


def key(seed: int, purpose: str, *place: int | str) -> int:
    """A seed of 63 bits for one purpose at one place, e.g. `key(seed, "noise", position)`.

    Runs and columns on disk were computed with these keys, so the formula must not change.
    """
    text = "/".join([str(seed), purpose, *map(str, place)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, *place: int | str) -> torch.Generator:
    """A new CPU generator for a key.

    Draw on the CPU and move the result, so that the numbers do not depend on the device.
    """
    return torch.Generator().manual_seed(key(seed, purpose, *place))
