"""Prompts and seeds from the arguments of a `LanDiffPipeline` call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# A seed of torch.Generator can be up to twice as large, and later chunks count on from a seed.
LARGEST_SEED = 1 << 63


def seeds_of(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[int]:
    """Seeds of the videos of a batch.

    Raises ValueError for several generators whose number is not the size of the batch.
    """
    if generator is None:
        return torch.randint(0, 1 << 31, (batch,)).tolist()
    if isinstance(generator, torch.Generator):
        first = generator.initial_seed()
        return [(first + 1000 * index) % LARGEST_SEED for index in range(batch)]
    if len(generator) != batch:
        raise ValueError(
            f"{len(generator)} generators for {batch} prompts; give one, or one for each"
        )
    return [one.initial_seed() % LARGEST_SEED for one in generator]


def repeated(prompt: str | Sequence[str], count: int) -> list[str]:
    """A list with each prompt `count` times in a row."""
    if isinstance(prompt, str):
        return [prompt] * count
    repeated: list[str] = []
    for one in prompt:
        repeated += [one] * count
    return repeated
