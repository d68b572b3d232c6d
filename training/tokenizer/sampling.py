"""Keyed choice of the vectors that become codes, by k-means at the start and for dead codes.

vector-quantize-pytorch chooses them on each rank with the rank's generator, so the codebook would
depend on the number of ranks and on all earlier random numbers. Here the choice is keyed by (seed,
purpose, step, micro-batch), over the vectors of all ranks in the order of the global batch. It is
the same in every layout, and there is no generator state to save.

Shape letters: M vectors of this rank's micro-batch (clips x codes of a clip), E width of a code
vector, N chosen vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from landiff.model_zoo import keyed_random
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.distributed import World


class KeyedSampling:
    """Replaces the two sampling functions of the library's codebook."""

    def __init__(self, seed: int, world: World) -> None:
        """`seed`: `loop.seed`."""
        self.seed = seed
        self.world = world
        self._place = (0, 0)
        self._positions: list[int] = []

    def install(self, tokenizer: SemanticTokenizer) -> None:
        """Replace the sampling functions of `tokenizer`."""
        codebook = tokenizer.quantizer._codebook
        codebook.sample_fn = self._sampler("codebook start")
        codebook.replace_sample_fn = self._sampler("dead codes")

    def place(self, step: int, micro_batch: int, positions: Sequence[int]) -> None:
        """Set the key of the random numbers in the next forward. Call before each forward.

        positions: of this rank's samples in the global batch, in the order of the micro-batch.
        """
        self._place = (step, micro_batch)
        self._positions = list(positions)

    def _sampler(self, purpose: str) -> Callable[[Tensor, int], Tensor]:
        """A sampling function as the library calls it, for one codebook."""

        def sample(vectors_1ME: Tensor, number: int) -> Tensor:
            return self._sample(purpose, vectors_1ME[0], int(number))[None]

        return sample

    def _sample(self, purpose: str, vectors_ME: Tensor, number: int) -> Tensor:
        """Choose `number` of all ranks' vectors, without repetition if there are enough.

        Returns [N, E], equal on all ranks. Every rank fills in the rows it has, and the sum is
        complete. The communication is [N, E] for any number of vectors.
        """
        per_clip = len(vectors_ME) // len(self._positions)
        gathered: list[int] = []
        for part in self.world.gather(self._positions):
            gathered.extend(part)
        positions = sorted(gathered)
        total = len(positions) * per_clip
        generator = keyed_random.generator(self.seed, purpose, *self._place)
        if number <= total:
            chosen = torch.randperm(total, generator=generator)[:number]
        else:
            chosen = torch.randint(total, (number,), generator=generator)
        clip_of_slot = {}
        for clip, position in enumerate(self._positions):
            clip_of_slot[positions.index(position)] = clip
        rows = []
        sources = []
        for row, index in enumerate(chosen.tolist()):
            slot, code = divmod(index, per_clip)
            if slot in clip_of_slot:
                rows.append(row)
                sources.append(clip_of_slot[slot] * per_clip + code)
        result_NE = vectors_ME.new_zeros(number, vectors_ME.shape[1])
        result_NE[rows] = vectors_ME[sources]
        if self.world.size > 1:
            dist.all_reduce(result_NE)
        return result_NE
