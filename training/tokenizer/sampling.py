"""Which vectors become codes: at the start (k-means) and when dead codes are replaced.

vector-quantize-pytorch draws them rank by rank from each rank's own generator, so the codebook would depend
on the number of ranks and on everything drawn before. Here the choice is keyed by (seed, purpose, step,
micro-batch) over the vectors of all ranks in the order of the global batch: the same vectors on any layout,
and no generator to save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training import rng
from landiff.training.distributed import World


class KeyedSampling:
    """Stands in for the two sampling functions of the library's codebook."""

    def __init__(self, seed: int, world: World) -> None:
        self.seed = seed
        self.world = world
        self._place = (0, 0)
        self._positions: list[int] = []

    def install(self, tokenizer: SemanticTokenizer) -> None:
        codebook = tokenizer.quantizer._codebook
        codebook.sample_fn = self._sampler("codebook start")
        codebook.replace_sample_fn = self._sampler("dead codes")

    def place(self, step: int, micro_batch: int, positions: Sequence[int]) -> None:
        """Say before each forward which samples of the global batch this rank is about to see, in their order."""
        self._place = (step, micro_batch)
        self._positions = list(positions)

    def _sampler(self, purpose: str) -> Callable[[Tensor, int], Tensor]:
        def sample(vectors_1ME: Tensor, number: int) -> Tensor:
            return self._sample(purpose, vectors_1ME[0], int(number))[None]

        return sample

    def _sample(self, purpose: str, vectors_ME: Tensor, number: int) -> Tensor:
        """`number` of all ranks' vectors, [number, E] on every rank; without repeats where there are enough.

        M = clips of this rank x N. Every rank fills in the rows that it has, the sum is the whole: what
        travels is [number, E], however many vectors there are.
        """
        per_clip = len(vectors_ME) // len(self._positions)
        positions = sorted(
            position for part in self.world.gather(self._positions) for position in part
        )
        total = len(positions) * per_clip
        generator = rng.generator(self.seed, purpose, *self._place)
        if number <= total:
            chosen = torch.randperm(total, generator=generator)[:number]
        else:
            chosen = torch.randint(total, (number,), generator=generator)
        clip_of_slot = {
            positions.index(position): clip for clip, position in enumerate(self._positions)
        }
        rows, sources = [], []
        for row, index in enumerate(chosen.tolist()):
            slot, code = divmod(index, per_clip)
            if slot in clip_of_slot:
                rows.append(row)
                sources.append(clip_of_slot[slot] * per_clip + code)
        result_RE = vectors_ME.new_zeros(number, vectors_ME.shape[1])
        result_RE[rows] = vectors_ME[sources]
        if self.world.size > 1:
            dist.all_reduce(result_RE)
        return result_RE
