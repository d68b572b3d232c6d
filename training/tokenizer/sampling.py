"""Keyed choice of the vectors that become codes, by k-means at the start and for dead codes.

vector-quantize-pytorch chooses them on each rank with the rank's generator, so the codebook would
depend on the number of ranks and on all earlier random numbers. Here the choice is keyed by (seed,
purpose, step, micro-batch), over the vectors of all ranks in the order of the global batch. It is
the same in every layout, and there is no generator state to save.

The library also reads on the host whether k-means is done, whether codes are dead and how many,
which waits for the device in each micro-batch. Here as many vectors are chosen as there are codes,
and the device takes those it needs. The result is the same.

Shape letters: M vectors of this rank's micro-batch (clips x codes of a clip), E width of a code
vector, N chosen vectors, C codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from landiff.model_zoo import keyed_random
from landiff.model_zoo.device import to_device
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.distributed import World


class KeyedSampling:
    """Replaces the initialization of the library's codebook and the replacement of dead codes.

    started: whether k-means is known to be done. Set it to False where the codebook's state
        changes other than by training, as when a checkpoint is loaded.
    """

    def __init__(self, seed: int, world: World) -> None:
        """`seed`: `loop.seed`."""
        self.seed = seed
        self.world = world
        self.started = False
        self._step = 0
        self._micro_batch = 0
        self._own: list[list[int]] = []  # positions by micro-batch
        self._all: list[list[list[int]]] = []  # by rank

    def install(self, tokenizer: SemanticTokenizer) -> None:
        """Replace the functions of the codebook of `tokenizer`."""
        codebook = tokenizer.quantizer._codebook
        start = codebook.init_embed_

        def start_once(vectors_1ME: Tensor, mask: None = None) -> None:
            if not self.started:
                start(vectors_1ME, mask)
                self.started = True

        def replace_dead_codes(vectors_1ME: Tensor, seq_mask: None = None) -> None:
            self._replace_dead_codes(codebook, vectors_1ME[0])

        codebook.sample_fn = self._sampler("codebook start")
        codebook.init_embed_ = start_once
        codebook.expire_codes_ = replace_dead_codes

    def begin_step(self, step: int, positions: Sequence[Sequence[int]]) -> None:
        """Set the key of the random numbers of a step. Collective.

        positions: of this rank's samples in the global batch, by micro-batch.
        """
        self._step = step
        self._own = [list(part) for part in positions]
        self._all = self.world.gather(self._own)

    def place(self, micro_batch: int) -> None:
        """Set the micro-batch of the next forward. Call before each forward of a step."""
        self._micro_batch = micro_batch

    def _sampler(self, purpose: str) -> Callable[[Tensor, int], Tensor]:
        """A sampling function as the library calls it, for one codebook."""

        def sample(vectors_1ME: Tensor, number: int) -> Tensor:
            per_clip = vectors_1ME.shape[1] // len(self._own[self._micro_batch])
            chosen_N = self._choose(purpose, self._num_clips() * per_clip, number)
            return self._vectors_at(chosen_N, vectors_1ME[0])[None]

        return sample

    @torch.no_grad()
    def _replace_dead_codes(self, codebook: Codebook, vectors_ME: Tensor) -> None:
        """Replace dead codes by chosen vectors, the first dead code by the first and so on."""
        if not codebook.has_dead_code_replacement or not codebook.training:
            return
        dead_C = codebook.cluster_size[0] < codebook.threshold_ema_dead_code
        place_C = dead_C.cumsum(0).sub(1).clamp(min=0)
        codes = len(dead_C)
        total = self._num_clips() * (len(vectors_ME) // len(self._own[self._micro_batch]))
        # The first of them are those that a smaller number would give.
        chosen_N = self._choose("dead codes", total, min(codes, total))
        if codes <= total:
            sampled_CE = self._vectors_at(chosen_N, vectors_ME)[place_C]
        else:
            repeated_C = self._choose("dead codes", total, codes)
            both_NE = self._vectors_at(torch.cat([chosen_N, repeated_C]), vectors_ME)
            few_CE = both_NE[place_C.clamp(max=total - 1)]
            many_CE = both_NE[place_C + total]
            sampled_CE = torch.where(dead_C.sum() <= total, few_CE, many_CE)
        sampled_CE = sampled_CE.to(codebook.embed.dtype)
        size = codebook.reset_cluster_size
        dead_C1 = dead_C[:, None]
        embed_CE = codebook.embed[0]
        average_CE = codebook.embed_avg[0]
        embed_CE.copy_(torch.where(dead_C1, sampled_CE, embed_CE))
        average_CE.copy_(torch.where(dead_C1, sampled_CE * size, average_CE))
        codebook.cluster_size[0].masked_fill_(dead_C, size)

    def _num_clips(self) -> int:
        """Clips of the micro-batch on all ranks."""
        return sum(len(rank[self._micro_batch]) for rank in self._all)

    def _choose(self, purpose: str, total: int, number: int) -> Tensor:
        """`number` of `total` places, int64 [N] on the host, without repetition if it can be."""
        generator = keyed_random.generator(self.seed, purpose, self._step, self._micro_batch)
        if number <= total:
            return torch.randperm(total, generator=generator)[:number]
        return torch.randint(total, (number,), generator=generator)

    def _vectors_at(self, chosen_N: Tensor, vectors_ME: Tensor) -> Tensor:
        """Vectors of all ranks at places in the order of the global batch, [N, E].

        They are equal on all ranks. Every rank fills in the rows it has, and the sum is complete.
        The communication is [N, E] for any number of vectors.
        """
        own = self._own[self._micro_batch]
        per_clip = len(vectors_ME) // len(own)
        positions = sorted(position for rank in self._all for position in rank[self._micro_batch])
        clip_of_slot = torch.full((len(positions),), -1)
        for clip, position in enumerate(own):
            clip_of_slot[positions.index(position)] = clip
        clip_N = clip_of_slot[chosen_N // per_clip]
        missing = len(vectors_ME)  # the row of zeros below
        source_N = torch.where(clip_N < 0, missing, clip_N * per_clip + chosen_N % per_clip)
        filled = torch.cat([vectors_ME, vectors_ME.new_zeros(1, vectors_ME.shape[1])])
        result_NE = filled[to_device(source_N, vectors_ME.device)]
        if self.world.size > 1:
            dist.all_reduce(result_NE)
        return result_NE
